"""One Python function for each kernel: shapes and dtypes documented, outputs allocated, C++ called.

Every op has the same function in plain torch in `sglite.ops.reference`, which the tests hold it to;
a fused op is held to the bits of the ops that it is made of.
"""

import os

import torch  # noqa: F401  (the extension resolves OpenMP and DLPack through the loaded torch)

from sglite import _C
from sglite.ops.activation import gelu_and_mul, silu_and_mul, soft_cap
from sglite.ops.advance import advance, gather_tokens
from sglite.ops.attention import (
    AttentionPlan,
    attention_workspace,
    paged_attention,
    plan_attention,
)
from sglite.ops.decoder_layers import (
    AttentionPart,
    LayerBatch,
    LayerCall,
    LayerCalls,
    LayerParts,
    LinearPart,
    NormPart,
    decoder_layers,
)
from sglite.ops.embedding import embedding
from sglite.ops.experts import mix_experts, route, rows_of_experts, used_experts
from sglite.ops.fused_linear import gated, gated_linear, norm_gated_linear, norm_linear
from sglite.ops.kv_cache import copy_kv_slots, write_kv
from sglite.ops.linear import PackedWeight, linear, pack_weight
from sglite.ops.norm import layer_norm, rms_norm
from sglite.ops.quantized_weight import (
    QuantizedLayout,
    QuantizedRows,
    QuantizedWeight,
    quantize_weight,
)
from sglite.ops.rope import apply_rope, rope_and_write_kv
from sglite.ops.sampling import LogProbs, TokenEdits, log_probs, sample, sampling_workspace
from sglite.ops.spare_memory import SpareMemory
from sglite.ops.weight_memory import WeightMemory, map_pages
from sglite.ops.weight_writer import WeightWriter

# So that a forked process finds no team of threads that it does not have.
os.register_at_fork(before=_C.pause_teams)

__all__ = [
    "AttentionPart",
    "AttentionPlan",
    "LayerBatch",
    "LayerCall",
    "LayerCalls",
    "LayerParts",
    "LinearPart",
    "LogProbs",
    "NormPart",
    "PackedWeight",
    "QuantizedLayout",
    "QuantizedRows",
    "QuantizedWeight",
    "SpareMemory",
    "TokenEdits",
    "WeightMemory",
    "WeightWriter",
    "advance",
    "apply_rope",
    "attention_workspace",
    "copy_kv_slots",
    "decoder_layers",
    "embedding",
    "gated",
    "gated_linear",
    "gather_tokens",
    "gelu_and_mul",
    "layer_norm",
    "linear",
    "log_probs",
    "map_pages",
    "mix_experts",
    "norm_gated_linear",
    "norm_linear",
    "pack_weight",
    "paged_attention",
    "plan_attention",
    "quantize_weight",
    "rms_norm",
    "rope_and_write_kv",
    "route",
    "rows_of_experts",
    "sample",
    "sampling_workspace",
    "silu_and_mul",
    "soft_cap",
    "used_experts",
    "write_kv",
]
