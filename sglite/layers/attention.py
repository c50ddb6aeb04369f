"""Attention over the paged KV cache, and the self-attention block around it."""

from torch import Tensor, nn

from sglite import ops
from sglite.interface.errors import UnsupportedModelError
from sglite.layers.composite import add_part, is_plain, norm_linear
from sglite.layers.forward_batch import ForwardBatch
from sglite.layers.linear import Linear, QKVLinear
from sglite.layers.norm import RMSNorm
from sglite.layers.porting import QuantizationConfig, add_prefix, refuse_quantization
from sglite.layers.rotary import RotaryEmbedding


class RadixAttention(nn.Module):
    """Writes keys and values into the cache and attends over all that a token may see.

    `softmax(q k^T * scaling) v`, where query head h reads key/value head
    `h // (num_heads / num_kv_heads)`.

    Args:
        num_heads: query heads.
        head_dim: channels of a head.
        scaling: factor on the scores, mostly `head_dim ** -0.5`.
        num_kv_heads: key/value heads.
        layer_id: which of the cache's layers this is; 0, 1, ... over the model.
        logit_cap: scores become `cap * tanh(score / cap)` (Gemma 2); 0 or None: they stay.
        v_head_dim: must be -1 or `head_dim`.
        sliding_window_size: positions before its own that a token sees, as in SGLang (which
            passes `config.sliding_window - 1`); -1 or None: all.
        sliding_window: positions that a token sees, its own among them, as in Hugging Face's
            configs; None: all. One of the two only.
        quant_config: must be None.
        prefix: module path, for messages.

    Attributes:
        batch_invariant: as for `Linear`.
        has_sinks: whether calls come with sinks; for people to read.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scaling: float,
        num_kv_heads: int,
        layer_id: int,
        logit_cap: float | None = None,
        v_head_dim: int = -1,
        sliding_window_size: int | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        *,
        sliding_window: int | None = None,
    ):
        super().__init__()
        refuse_quantization(quant_config, prefix)
        if v_head_dim not in (-1, head_dim):
            raise UnsupportedModelError(
                f"{prefix or 'RadixAttention'}: v_head_dim={v_head_dim} is not implemented where "
                f"it differs from head_dim={head_dim}"
            )
        if sliding_window_size not in (None, -1):
            if sliding_window is not None:
                raise ValueError("give sliding_window or sliding_window_size, not both")
            sliding_window = sliding_window_size + 1
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(
                f"{prefix or 'RadixAttention'}: sliding_window={sliding_window} is not allowed: it "
                f"must be 1 or more"
            )
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scaling = scaling
        self.num_kv_heads = num_kv_heads
        self.layer_id = layer_id
        self.logit_cap = logit_cap or None
        self.sliding_window = sliding_window
        self.batch_invariant = False
        self.has_sinks = False
        self.width = num_heads * head_dim

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        forward_batch: ForwardBatch,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Gives [T, num_heads * head_dim].

        Args:
            q: [T, num_heads, head_dim] or [T, num_heads * head_dim]; rows may be apart.
            k: [T, num_kv_heads, head_dim] or [T, num_kv_heads * head_dim], likewise.
            v: shaped like `k`.
            forward_batch: whose tokens these are, and the cache.
            sinks: [num_heads] float32: of each head a score without a key (GPT-OSS); None: none.
        """
        if q.ndim == 2:
            q = q.view(-1, self.num_heads, self.head_dim)
            k = k.view(-1, self.num_kv_heads, self.head_dim)
            v = v.view(-1, self.num_kv_heads, self.head_dim)
        k_cache, v_cache = forward_batch.kv_cache[self.layer_id]
        ops.write_kv(k, v, k_cache, v_cache, forward_batch.slots)
        return self.attend(q, forward_batch, sinks)

    def attend(self, q: Tensor, forward_batch: ForwardBatch, sinks: Tensor | None = None) -> Tensor:
        """Attention alone, [T, num_heads * head_dim]: keys and values are in the cache already.

        Args:
            q: [T, num_heads, head_dim]; rows may be apart.
            forward_batch: whose tokens these are, and the cache.
            sinks: as for `forward`.
        """
        k_cache, v_cache = forward_batch.kv_cache[self.layer_id]
        out = ops.paged_attention(
            q,
            k_cache,
            v_cache,
            forward_batch.page_table,
            forward_batch.query_start,
            forward_batch.kv_lens,
            forward_batch.kv_end,
            self.scaling,
            window=self.sliding_window,
            soft_cap=self.logit_cap,
            sinks=sinks,
            plan=forward_batch.attention_plan(
                self.num_heads,
                self.num_kv_heads,
                self.head_dim,
                self.sliding_window,
                self.batch_invariant,
            ),
        )
        return out.view(-1, self.width)

    def extra_repr(self) -> str:
        """The part of the module's repr in brackets."""
        text = f"{self.num_heads} heads, {self.num_kv_heads} kv heads, head_dim={self.head_dim}"
        return text + (f", sliding_window={self.sliding_window}" if self.sliding_window else "")


class SelfAttention(nn.Module):
    """Projection to q, k, v; norm of q and k where there is one; rotation; attention; projection.

    What lies between the first projection and attention is one op while every part is plain.

    Args:
        hidden_size: width of input and output.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: channels of a head.
        rotary_emb: rotates q and k; mostly one module for all layers. None: they stay as they are.
        layer_id: which of the cache's layers this is.
        qkv_bias: whether the first projection has a bias.
        output_bias: whether the last one has.
        qk_norm_eps: RMSNorm over each head of q and k, with this epsilon; None: no norm.
        qk_norm_offset: `weight_offset` of these norms.
        scaling: factor on the scores; `head_dim ** -0.5` when None.
        sliding_window: positions that a token sees, its own among them; None: all.
        logit_cap: as for `RadixAttention`.
        quant_config, prefix: as for `Linear`.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary_emb: RotaryEmbedding | None,
        layer_id: int,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
        qk_norm_offset: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        logit_cap: float | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        self.head_dim = head_dim
        self.head_counts = [num_heads, num_kv_heads, num_kv_heads]
        self.num_heads = sum(self.head_counts)
        self.qkv_proj = QKVLinear(
            hidden_size,
            head_dim,
            num_heads,
            num_kv_heads,
            bias=qkv_bias,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, qk_norm_eps, qk_norm_offset)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps, qk_norm_offset)
        self.rotary_emb = rotary_emb
        self.attn = RadixAttention(
            num_heads,
            head_dim,
            head_dim**-0.5 if scaling is None else scaling,
            num_kv_heads,
            layer_id,
            logit_cap,
            sliding_window=sliding_window,
            prefix=add_prefix("attn", prefix),
        )
        self.o_proj = Linear(
            num_heads * head_dim,
            hidden_size,
            bias=output_bias,
            quant_config=quant_config,
            prefix=add_prefix("o_proj", prefix),
        )

    def forward(
        self,
        positions: Tensor,
        hidden_states: Tensor,
        forward_batch: ForwardBatch,
        residual: Tensor | None = None,
        norm: nn.Module | None = None,
    ) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size].

        Where they are given, `norm` is applied to the input and `residual` added to the result.
        """
        qkv = norm_linear(norm, self.qkv_proj, QKVLinear, hidden_states)
        if self._parts_are_plain():
            out = self.attn.attend(
                self._rotate_and_write(qkv, positions, forward_batch), forward_batch
            )
        else:
            heads = qkv.view(-1, self.num_heads, self.head_dim)
            q, k, v = heads.split_with_sizes(self.head_counts, 1)
            if self.q_norm is not None:
                q, k = self.q_norm(q.contiguous()), self.k_norm(k.contiguous())
            if self.rotary_emb is not None:
                q, k = self.rotary_emb(positions, q, k)
            out = self.attn(q, k, v, forward_batch)
        if residual is None:
            return self.o_proj(out)
        return add_part(self.o_proj, Linear, residual, out)

    def _parts_are_plain(self) -> bool:
        """Whether one op may do the norms, the rotation and the writing of keys and values."""
        if not (is_plain(self.rotary_emb, RotaryEmbedding) and is_plain(self.attn, RadixAttention)):
            return False
        if self.q_norm is None:
            return True
        q_norm, k_norm = self.q_norm, self.k_norm
        return (
            is_plain(q_norm, RMSNorm)
            and is_plain(k_norm, RMSNorm)
            and (q_norm.eps, q_norm.weight_offset) == (k_norm.eps, k_norm.weight_offset)
        )

    def _rotate_and_write(
        self, qkv: Tensor, positions: Tensor, forward_batch: ForwardBatch
    ) -> Tensor:
        """Rotated queries [T, num_heads, head_dim]; keys and values go to the cache."""
        norms = {}
        if self.q_norm is not None:
            norms = {
                "q_norm": self.q_norm.weight,
                "k_norm": self.k_norm.weight,
                "epsilon": self.q_norm.eps,
                "weight_offset": self.q_norm.weight_offset,
            }
        k_cache, v_cache = forward_batch.kv_cache[self.attn.layer_id]
        return self.rotary_emb.with_table(
            positions,
            lambda rows, cos_sin: ops.rope_and_write_kv(
                qkv,
                rows,
                cos_sin,
                k_cache,
                v_cache,
                forward_batch.slots,
                interleaved=self.rotary_emb.is_interleaved,
                **norms,
            ),
        )
