"""Makes a checkpoint with random weights: `python -m bench.checkpoints llama-135m FOLDER`.

Hugging Face gives the names and shapes (its model is built without memory, on the meta device), and
the tensors are drawn and written shard by shard, several at a time, on a GPU where there is one:
16 GB take seconds. Which tensor gets which numbers depends on its name and the kind of device.

Weights are normal with deviation 1 / sqrt(inputs), so that a layer keeps the size of what it gets.
The residual stream then grows with the root of the depth, and what the layers add to it outweighs
the embedding: were it the other way round, a model with tied embeddings would say its last token
again and again, and engines that compute wrongly would agree.
"""

import argparse
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import sqrt
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from bench.models import CONFIGS

_END = "<|end|>"
_MAX_WRITERS = 8  # each holds a shard in memory


def make_checkpoint(fields: dict, folder: Path, *, shard_bytes: int = 1 << 28) -> None:
    """Writes a bfloat16 checkpoint with random weights and a tokenizer.

    Args:
        fields: `model_type` and what else `config.json` says.
        folder: does not exist yet; appears when all is written.
        shard_bytes: a file of weights ends before it grows beyond this, unless one tensor does.
    """
    config = AutoConfig.for_model(
        **fields, dtype="bfloat16", bos_token_id=None, eos_token_id=0, pad_token_id=None
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        _write_weights(config, unfinished, shard_bytes)
        _tokenizer(config.vocab_size).save_pretrained(unfinished)
        unfinished.rename(folder)


def _write_weights(config: PreTrainedConfig, folder: Path, shard_bytes: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tensors = model.state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    shards = list(_shards(tensors, shard_bytes))
    files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    write = partial(_write_shard, {name: tensor.shape for name, tensor in tensors.items()})
    with ThreadPoolExecutor(min(_MAX_WRITERS, len(os.sched_getaffinity(0)))) as pool:
        list(pool.map(write, shards, [folder / file for file in files]))
    places = {name: file for shard, file in zip(shards, files, strict=True) for name in shard}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _shards(tensors: dict[str, torch.Tensor], shard_bytes: int) -> Iterator[list[str]]:
    """Names of the tensors of one file after the other."""
    shard, size = [], 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += tensor.nbytes
    yield shard


def _write_shard(shapes: dict[str, torch.Size], names: list[str], file: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = {name: _draw(name, shapes[name], device).cpu() for name in names}
    save_file(drawn, file, metadata={"format": "pt"})


def _draw(name: str, shape: torch.Size, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
    if tensor.dim() == 1:  # the weights of norms
        return tensor.normal_(1.0, 0.05, generator=generator)
    return tensor.normal_(0.0, 1 / sqrt(tensor.shape[-1]), generator=generator)


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """The bytes, and a made-up word for every other id: each id has a text, as in a real one."""
    symbols = [_END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = (f"Ġ{index}" for index in range(len(symbols), vocab_size))
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, *words][:vocab_size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    make_checkpoint(CONFIGS[options.model], options.folder)


if __name__ == "__main__":
    main()
