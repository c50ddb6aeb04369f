"""The least time that a workload can take, from the machine's limits and the size of the weights.

Needs the standard library only.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from bench.workloads import Workload

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}


@dataclass(frozen=True)
class Weights:
    """How many weights take part in matrix products.

    Attributes:
        body: weights of all layers; each row of a step meets them.
        head: weights of the output embedding; only rows whose next token is wanted meet them.
    """

    body: int
    head: int


def read_weights(folder: Path) -> Weights:
    """Counts the weights of a checkpoint from the headers of its safetensors files."""
    sizes = {}
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__" and len(tensor["shape"]) == 2:
                sizes[name] = tensor["shape"][0] * tensor["shape"][1]
    embedding = sum(size for name, size in sizes.items() if "embed_tokens" in name)
    head = sizes.get("lm_head.weight")
    return Weights(sum(sizes.values()) - embedding - (head or 0), head or embedding)


def kv_bytes_per_token(folder: Path, dtype: str) -> int:
    """Bytes that the keys and values of one token take in all layers."""
    config = json.loads((folder / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    width = config["num_key_value_heads"] * head_dim
    return 2 * config["num_hidden_layers"] * width * _BYTES[dtype]


def least_seconds(
    workload: Workload, weights: Weights, dtype: str, gigabytes: float, gigaflops: float
) -> float:
    """Time for reading all weights once a step, or for the matrix products if that is more.

    The prompts are one step, in which a shared prefix counts once, and each further token of all
    prompts another. Attention, the reading of its cache included, is left out.

    Args:
        workload: what is computed.
        weights: of the model.
        dtype: in which the weights are stored; "int8" for those quantized so.
        gigabytes: read per second.
        gigaflops: floating-point operations in matrix products per second, in 10^9.
    """
    read = (weights.body + weights.head) * _BYTES[dtype] / 1e9 / gigabytes
    rows = workload.num_prompts
    prompt_rows = workload.shared_tokens + rows * workload.own_tokens

    def step(body_rows: int) -> float:
        operations = 2 * (weights.body * body_rows + weights.head * rows)
        return max(read, operations / 1e9 / gigaflops)

    return step(prompt_rows) + (workload.new_tokens - 1) * step(rows)
