"""RadixAttention over the paged cache, and what it refuses."""

import pytest
import torch

from sglite.cache.kv_pool import LayerSpec
from sglite.interface.errors import UnsupportedModelError
from sglite.layers import QuantizationConfig, RadixAttention
from tests.forward import Runner

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 24


class OneLayer(torch.nn.Module):
    """Hands given q, k, v of sequence 0 to an attention layer, by the tokens' positions."""

    def __init__(self, attn, q, k, v, flat):
        super().__init__()
        self.attn, self.qkv, self.flat = attn, (q, k, v), flat

    def forward(self, input_ids, positions, forward_batch):
        q, k, v = (x[positions] for x in self.qkv)
        if self.flat:
            q, k, v = (x.flatten(1) for x in (q, k, v))
        self.next_token_logits = self.attn(q, k, v, forward_batch)
        return self


def run(attn, q, k, v, *, flat=False, chunks=(40,)):
    """The layer's output for one sequence, in chunks."""
    model = OneLayer(attn, q, k, v, flat)
    runner = Runner(model, [LayerSpec(KV_HEADS, HEAD_DIM)], torch.float32, num_sequences=1)
    return torch.cat([runner.run([[0] * count])[0] for count in chunks])


def draw(length=40):
    torch.manual_seed(0)
    return (
        torch.randn(length, HEADS, HEAD_DIM),
        torch.randn(length, KV_HEADS, HEAD_DIM),
        torch.randn(length, KV_HEADS, HEAD_DIM),
    )


def naive(q, k, v, scaling, window=None, cap=None):
    """Attention by the definition, [T, HEADS * HEAD_DIM]."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scaling
    if cap:
        scores = cap * torch.tanh(scores / cap)
    distance = torch.arange(len(q))[:, None] - torch.arange(len(k))
    hidden = (distance < 0) | (distance >= (window or len(k)))
    probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, v).flatten(1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"sliding_window": 7}, {"window": 7}),
        ({"sliding_window_size": 7}, {"window": 8}),  # SGLang's does not count the token itself
        ({"sliding_window_size": -1}, {}),
        ({"logit_cap": 3.0}, {"cap": 3.0}),
        ({"logit_cap": 0.0}, {}),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
def test_is_attention(options, expected, flat):
    attn = RadixAttention(HEADS, HEAD_DIM, 0.3, KV_HEADS, 0, **options)
    q, k, v = draw()
    out = run(attn, q, k, v, flat=flat)
    torch.testing.assert_close(out, naive(q, k, v, 0.3, **expected), rtol=1e-5, atol=1e-5)


def test_chunks_give_the_same_bits():
    attn = RadixAttention(HEADS, HEAD_DIM, 0.3, KV_HEADS, 0, sliding_window=11)
    whole = run(attn, *draw())
    assert torch.equal(run(attn, *draw(), chunks=(1, 16, 3, 20)), whole)


def test_sglangs_other_arguments():
    RadixAttention(HEADS, HEAD_DIM, 0.3, KV_HEADS, 0, v_head_dim=HEAD_DIM, prefix="attn")
    with pytest.raises(UnsupportedModelError, match="v_head_dim=16 is not implemented"):
        RadixAttention(HEADS, HEAD_DIM, 0.3, KV_HEADS, 0, v_head_dim=16)
    with pytest.raises(UnsupportedModelError, match="quant_config"):
        RadixAttention(HEADS, HEAD_DIM, 0.3, KV_HEADS, 0, quant_config=QuantizationConfig())
    with pytest.raises(ValueError, match="not both"):
        RadixAttention(HEADS, HEAD_DIM, 0.3, KV_HEADS, 0, sliding_window=4, sliding_window_size=3)
    with pytest.raises(ValueError, match="sliding_window=0 is not allowed"):
        RadixAttention(HEADS, HEAD_DIM, 0.3, KV_HEADS, 0, sliding_window=0)
