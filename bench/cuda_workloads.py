"""What is measured of a model on a GPU, and the least time that it can take there."""

import json
from dataclasses import dataclass
from pathlib import Path

from bench.roofline import Weights, read_weights
from bench.workloads import Workload


def least_seconds(terms: dict[str, int], limits: dict[str, float]) -> float:
    """Reading the bytes or doing the operations, whatever takes longer at the machine's limits.

    Args:
        terms: from `least_terms`.
        limits: from `bench.cuda_limits.cuda_limits`.
    """
    read = terms["bytes"] / 1e9 / limits["read_gigabytes_per_second"]
    return max(read, terms["operations"] / 1e12 / limits["matmul_teraflops_per_second"])


@dataclass(frozen=True)
class Decode:
    """Steps that give each of `batch` requests a token, at a context of `context` tokens.

    The context is the mean over the tokens that are measured: the prompt is shorter by half of
    them.
    """

    name: str
    batch: int
    context: int
    new_tokens: int

    @property
    def workload(self) -> Workload:
        """The prompts that lead there."""
        prompt_tokens = self.context - self.new_tokens // 2
        return Workload(self.name, self.batch, 0, prompt_tokens, self.new_tokens)

    def least_terms(self, shape: "ModelShape") -> dict[str, int]:
        """Of one step: bytes of all weights and of the KV cache, operations in matrix products."""
        kv_bytes = self.batch * self.context * shape.kv_bytes_per_token
        operations = 2 * self.batch * (shape.weights.body + shape.weights.head)
        return {"bytes": shape.weight_bytes + kv_bytes, "operations": operations}


@dataclass(frozen=True)
class Prefill:
    """One prompt of `tokens` tokens, and its first new token."""

    name: str
    tokens: int

    @property
    def workload(self) -> Workload:
        """The prompt."""
        return Workload(self.name, 1, 0, self.tokens, 1, counts_prompt=True)

    def least_terms(self, shape: "ModelShape") -> dict[str, int]:
        """Bytes of the weights; operations in matrix products and in causal attention."""
        attention = 2 * shape.num_layers * shape.num_heads * shape.head_dim * self.tokens**2
        operations = 2 * (self.tokens * shape.weights.body + shape.weights.head) + attention
        return {"bytes": shape.weight_bytes, "operations": operations}


DECODES = (
    Decode("decode, batch 1, context 128", 1, 128, 128),
    Decode("decode, batch 1, context 1k", 1, 1024, 128),
    Decode("decode, batch 64, context 1k", 64, 1024, 64),
)
PREFILL = Prefill("prefill 8k", 8192)


@dataclass(frozen=True)
class ModelShape:
    """What the least times need to know of a checkpoint in bfloat16."""

    weights: Weights
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, folder: Path) -> "ModelShape":
        """Reads `config.json` and the headers of the weights."""
        config = json.loads((folder / "config.json").read_text())
        heads = config["num_attention_heads"]
        return cls(
            read_weights(folder),
            config["num_hidden_layers"],
            heads,
            config["num_key_value_heads"],
            config.get("head_dim") or config["hidden_size"] // heads,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that each step reads."""
        return 2 * (self.weights.body + self.weights.head)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim
