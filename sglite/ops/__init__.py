"""One Python function for each kernel: shapes and dtypes documented, outputs allocated, C++ called.

Every op has the same function in plain torch in `sglite.ops.reference`, which the tests hold it to.
"""

import torch  # noqa: F401  (the extension resolves OpenMP and DLPack through the loaded torch)

from sglite.ops.activation import gelu_and_mul, silu_and_mul
from sglite.ops.advance import advance, gather_tokens
from sglite.ops.attention import paged_attention
from sglite.ops.embedding import embedding
from sglite.ops.kv_cache import write_kv
from sglite.ops.linear import PackedWeight, linear, pack_weight
from sglite.ops.norm import rms_norm
from sglite.ops.rope import apply_rope
from sglite.ops.sampling import LogProbs, TokenEdits, log_probs, sample, sampling_workspace

__all__ = [
    "LogProbs",
    "PackedWeight",
    "TokenEdits",
    "advance",
    "apply_rope",
    "embedding",
    "gather_tokens",
    "gelu_and_mul",
    "linear",
    "log_probs",
    "pack_weight",
    "paged_attention",
    "rms_norm",
    "sample",
    "sampling_workspace",
    "silu_and_mul",
    "write_kv",
]
