"""One Python function for each kernel: shapes and dtypes documented, outputs allocated, C++ called.

Every op has the same function in plain torch in `sglite.ops.reference`, which the tests hold it to.
"""

import torch  # noqa: F401  (the extension resolves OpenMP and DLPack through the loaded torch)

from sglite.ops.activation import gelu_and_mul, silu_and_mul
from sglite.ops.attention import (
    AttentionPlan,
    attention_workspace,
    paged_attention,
    plan_attention,
)
from sglite.ops.embedding import embedding
from sglite.ops.kv_cache import write_kv
from sglite.ops.linear import PackedWeight, linear, pack_weight
from sglite.ops.norm import rms_norm
from sglite.ops.rope import apply_rope
from sglite.ops.sampling import LogProbs, TokenEdits, log_probs, sample, sampling_workspace

__all__ = [
    "AttentionPlan",
    "LogProbs",
    "PackedWeight",
    "TokenEdits",
    "apply_rope",
    "attention_workspace",
    "embedding",
    "gelu_and_mul",
    "linear",
    "log_probs",
    "pack_weight",
    "paged_attention",
    "plan_attention",
    "rms_norm",
    "sample",
    "sampling_workspace",
    "silu_and_mul",
    "write_kv",
]
