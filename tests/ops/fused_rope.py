"""Drawn arguments of `rope_and_write_kv`, and what its parts give for them."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from sglite import ops
from tests.ops.test_rope import make_table

TABLE_ROWS = 50


@dataclass
class Case:
    """Arguments, and the numbers that they follow from."""

    qkv: Tensor  # rows apart where padding was drawn
    positions: Tensor
    cos_sin: Tensor
    caches: tuple[Tensor, Tensor]
    slots: Tensor
    norms: dict[str, Tensor | float]
    heads: int
    interleaved: bool

    def run(self, function) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and both caches after `function(...)`, of copies of the arguments."""
        qkv = self.qkv._base.clone()[:, : self.qkv.shape[1]]
        caches = [cache.clone() for cache in self.caches]
        q = function(
            qkv,
            self.positions,
            self.cos_sin,
            *caches,
            self.slots,
            **self.norms,
            interleaved=self.interleaved,
        )
        return q, *caches

    def in_float32(self) -> "Case":
        """The same case with every tensor in float32."""
        norms = {
            name: value.float() if isinstance(value, Tensor) else value
            for name, value in self.norms.items()
        }
        base = self.qkv._base.float()
        return Case(
            base[:, : self.qkv.shape[1]],
            self.positions,
            self.cos_sin,
            tuple(cache.float() for cache in self.caches),
            self.slots,
            norms,
            self.heads,
            self.interleaved,
        )


@st.composite
def cases(draw, dtype: torch.dtype, device: torch.device | str = "cpu"):
    """A strategy for cases: any head size and share of it that rotates, norm or none."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens, heads, kv_heads = (
        draw(st.integers(0, 9)),
        draw(st.integers(1, 9) | st.sampled_from([16, 17, 33])),
        draw(st.integers(1, 3)),
    )
    head_dim = draw(st.sampled_from([16, 32, 64, 80, 96, 128, 256]) | st.integers(1, 140))
    rotary_dim = int(head_dim * draw(st.just(1.0) | st.sampled_from([0.25, 0.5]) | st.floats(0, 1)))
    page_size = draw(st.integers(1, 9))
    pages = -(-tokens // page_size) + 2

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    width = (heads + 2 * kv_heads) * head_dim
    qkv = random(tokens, width + draw(st.sampled_from([0, 0, 1, 8])))[:, :width]
    norms = {}
    if draw(st.booleans()):
        norms = {
            "q_norm": random(head_dim),
            "k_norm": random(head_dim),
            "epsilon": draw(st.sampled_from([1e-6, 1e-3])),
            "weight_offset": draw(st.sampled_from([0.0, 1.0])),
        }
    return Case(
        qkv,
        torch.randint(0, TABLE_ROWS, (tokens,), generator=generator).to(device),
        make_table(TABLE_ROWS, rotary_dim // 2 * 2).to(device),
        tuple(random(pages, page_size, kv_heads, head_dim) for _ in range(2)),
        torch.randperm(pages * page_size, generator=generator)[:tokens].to(device),
        norms,
        heads,
        draw(st.booleans()),
    )


def by_parts(
    qkv,
    positions,
    cos_sin,
    k_cache,
    v_cache,
    slots,
    *,
    q_norm=None,
    k_norm=None,
    epsilon=1e-6,
    weight_offset=0.0,
    interleaved=False,
):
    """The ops that `rope_and_write_kv` stands for, one after the other."""
    kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.unflatten(1, (-1, head_dim))
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    if q_norm is not None:
        q = ops.rms_norm(q.contiguous(), q_norm, epsilon, weight_offset=weight_offset)
        k = ops.rms_norm(k.contiguous(), k_norm, epsilon, weight_offset=weight_offset)
    ops.apply_rope(q, k, positions, cos_sin, interleaved=interleaved)
    ops.write_kv(k, v, k_cache, v_cache, slots)
    return q
