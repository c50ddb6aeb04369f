"""GGUF for llama.cpp: `model.gguf` with the weights, and without the tokenizer.

The benches speak in token ids, so the file says that there is no vocabulary. int8 is llama.cpp's
Q8_0: blocks of 32 weights with a scale each, in embedding and head too. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import math
from pathlib import Path

import numpy as np

from bench.conversions import main
from bench.conversions.safetensors import read_tensors, to_float32

#: Architectures of llama.cpp by `model_type`: only those that were tried beside Hugging Face.
_ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3"}


def interleave_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection as llama.cpp's `llama` architecture wants them.

    Hugging Face rotates dimension i of a head with i + head_dim / 2, llama.cpp 2 i with 2 i + 1.

    Args:
        weight: [num_heads * head_dim, hidden_size], any dtype.
        num_heads: of queries or of keys.
    """
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def rope_parameters(config: dict) -> dict:
    """RoPE's parameters from a `config.json` of transformers 5, or of an earlier release."""
    if "rope_parameters" in config:
        return config["rope_parameters"]
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    return {"rope_theta": config.get("rope_theta", 10000.0), **scaling}


def rope_divisors(rope: dict, head_dim: int) -> np.ndarray | None:
    """What each frequency of RoPE is divided by, float32 [head_dim / 2]; None: by nothing.

    Raises:
        ValueError: a kind of scaling other than Llama 3's.
    """
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] != "llama3":
        raise ValueError(f"rope_type={rope['rope_type']!r} is not converted")
    frequencies = rope["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    # How often each turns within the length that the model was trained for first.
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (share + (1 - share) / rope["factor"])).astype(np.float32)


def convert(folder: Path, output: Path, dtype: str, quantization: str | None) -> None:
    """Writes `output`/model.gguf.

    Raises:
        ValueError: the model, or what is asked for, is not known here.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] not in _ARCHITECTURES:
        raise ValueError(f"model_type={config['model_type']!r} is not converted")
    kinds = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    name = {None: kinds[dtype], "int8": "Q8_0"}[quantization]
    kind = gguf.GGMLQuantizationType[name]
    architecture = _ARCHITECTURES[config["model_type"]]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    rope = rope_parameters(config)
    divisors = rope_divisors(rope, head_dim)

    output.mkdir(parents=True)
    writer = gguf.GGUFWriter(output / "model.gguf", architecture)
    writer.add_file_type(gguf.LlamaFileType[("MOSTLY_" if name != "F32" else "ALL_") + name])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")

    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[architecture.upper()], config["num_hidden_layers"]
    )
    for source, tensor in read_tensors(folder):
        part = source.split(".")[-2]
        if architecture == "llama" and part in heads:
            tensor = interleave_halves(tensor, heads[part])
        target = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(f"{source} has no place in llama.cpp's {architecture}")
        # llama.cpp keeps vectors (norms and biases) in float32.
        tensor_kind = kind if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        if tensor_kind == gguf.GGMLQuantizationType.BF16 and tensor.dtype == np.uint16:
            writer.add_tensor(target, tensor.view(np.uint8), raw_dtype=tensor_kind)
        else:
            data = gguf.quants.quantize(to_float32(tensor), tensor_kind)
            writer.add_tensor(target, data, raw_dtype=tensor_kind)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(convert)
