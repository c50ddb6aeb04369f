"""A decoder layer as one op: on the CPU, while all of its parts are plain."""

from torch import Tensor, nn

from sglite import ops
from sglite.layers.attention import RadixAttention, SelfAttention
from sglite.layers.composite import are_plain
from sglite.layers.forward_batch import ForwardBatch
from sglite.layers.linear import GateUpLinear, Linear, QKVLinear
from sglite.layers.mlp import GatedMLP, op_name
from sglite.layers.norm import RMSNorm
from sglite.layers.rotary import RotaryEmbedding


def run_whole_layer(
    layer: nn.Module, positions: Tensor, hidden_states: Tensor, forward_batch: ForwardBatch
) -> Tensor | None:
    """What a `DecoderLayer` gives, in one call; None where its parts have to run one by one.

    Args:
        layer: has `self_attn`, `mlp`, `input_layernorm` and `post_attention_layernorm`.
        positions: [T] int64.
        hidden_states: [T, hidden_size].
        forward_batch: whose tokens these are, and the cache.
    """
    if hidden_states.is_cuda:
        return None
    # Children are looked up in their table: on the way through `__getattr__` all of them together
    # would take longer than the call.
    children = layer._modules
    attention, mlp = children["self_attn"], children["mlp"]
    if type(attention) is not SelfAttention or type(mlp) is not GatedMLP:
        return None
    input_norm, post_norm = children["input_layernorm"], children["post_attention_layernorm"]
    parts, mlp_parts = attention._modules, mlp._modules
    qkv, rotary, attn, output = (
        parts[name] for name in ("qkv_proj", "rotary_emb", "attn", "o_proj")
    )
    gate_up, act_fn, down = (mlp_parts[name] for name in ("gate_up_proj", "act_fn", "down_proj"))
    kinds = [
        (attention, SelfAttention),
        (mlp, GatedMLP),
        (input_norm, RMSNorm),
        (post_norm, RMSNorm),
        (qkv, QKVLinear),
        (rotary, RotaryEmbedding),
        (attn, RadixAttention),
        (output, Linear),
        (gate_up, GateUpLinear),
        (down, Linear),
    ]
    q_norm, k_norm = attention.q_norm, attention.k_norm
    norms = (None, None, 0.0, 0.0)
    if q_norm is not None:
        kinds += [(q_norm, RMSNorm), (k_norm, RMSNorm)]
    activation = op_name(act_fn)
    if activation is None or not are_plain(kinds):
        return None
    if q_norm is not None:
        norms = (q_norm.weight, k_norm.weight, q_norm.eps, q_norm.weight_offset)
        if (k_norm.eps, k_norm.weight_offset) != norms[2:]:
            return None
    linears = [_linear_part(part) for part in (qkv, output, gate_up, down)]
    if None in linears or not hidden_states.is_contiguous():
        return None
    layer_parts = ops.LayerParts(
        _norm_part(input_norm),
        linears[0],
        ops.AttentionPart(
            *norms, rotary.is_interleaved, attn.scaling, attn.sliding_window, attn.logit_cap
        ),
        linears[1],
        _norm_part(post_norm),
        linears[2],
        activation,
        linears[3],
    )
    batch, scratch = forward_batch.layer_batch(positions), forward_batch.scratch
    caches = forward_batch.kv_cache[attn.layer_id]
    return rotary.with_table(
        positions,
        lambda cos_sin: ops.decoder_layer(
            hidden_states, batch, layer_parts, cos_sin, *caches, scratch
        ),
    )


def _norm_part(norm: RMSNorm) -> ops.NormPart:
    return ops.NormPart(norm.weight, norm.eps, norm.weight_offset)


def _linear_part(part: Linear) -> ops.LinearPart | None:
    stored = part.matrix.stored
    if type(stored) is not ops.PackedWeight:
        return None
    return ops.LinearPart(stored.storage, stored.n, stored.k, part.bias)
