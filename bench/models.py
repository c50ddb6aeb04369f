"""Which checkpoints a comparison can use: random ones of real shapes, or any folder.

Needs the standard library only, so that the process that drives a comparison stays small.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

#: `config.json` of each, the fields that differ from what transformers assumes.
CONFIGS = {
    "llama-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    # Of the size of llama-135m, with a norm on the heads of q and k.
    "qwen3-135m": {
        "model_type": "qwen3",
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0},
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 8.0},
    },
    # Says nothing about speed: for trying a new peer.
    "tiny": {
        "model_type": "llama",
        "vocab_size": 1024,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
}


def default_cache_folder() -> Path:
    """Where checkpoints are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sglite" / "bench"


def checkpoint_folder(model: str, cache_folder: Path) -> Path:
    """The folder of a checkpoint: `model` itself if it is one, else made once and kept.

    Raises:
        ValueError: neither a folder with a `config.json` nor a name in `CONFIGS`.
    """
    if model not in CONFIGS:
        if (Path(model) / "config.json").is_file():
            return Path(model).resolve()
        raise ValueError(
            f"model={model!r} is neither a folder with a config.json nor one of "
            f"{', '.join(CONFIGS)}"
        )
    maker = Path(__file__).with_name("checkpoints.py")
    recipe = json.dumps(CONFIGS[model]).encode() + maker.read_bytes()
    folder = cache_folder / f"{model}-{hashlib.sha256(recipe).hexdigest()[:10]}"
    if not folder.is_dir():
        command = [sys.executable, "-m", "bench.checkpoints", model, str(folder)]
        subprocess.run(command, cwd=_ROOT, check=True)
    return folder


def vocab_size_of(folder: Path) -> int:
    """How many token ids the model of a checkpoint knows."""
    return json.loads((folder / "config.json").read_text())["vocab_size"]
