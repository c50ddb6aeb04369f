"""LogitsProcessor: rows, heads of every kind, scale and cap."""

from types import SimpleNamespace

import torch
from torch import nn

from sglite import ops
from sglite.layers import Embedding, LMHead, LogitsProcessor


def batch(*rows):
    wanted = torch.tensor(rows, dtype=torch.int64)
    return SimpleNamespace(logits_rows=wanted, spare_memory=ops.SpareMemory())


def make(dtype=torch.float32):
    torch.manual_seed(0)
    embedding, head = Embedding(40, 16), LMHead(40, 16)
    head.tie_weights(embedding)
    nn.ModuleList([embedding, head]).to(dtype)
    weight = torch.randn(40, 16).to(dtype)
    embedding.matrix.write_rows(0, weight)
    return embedding, head, weight, torch.randn(6, 16).to(dtype)


def test_only_the_wanted_rows():
    _, head, weight, hidden = make()
    output = LogitsProcessor()(None, hidden, head, batch(1, 2, 5))
    torch.testing.assert_close(output.next_token_logits, hidden[[1, 2, 5]] @ weight.T)
    whole = LogitsProcessor()(None, hidden, head, batch(*range(6))).next_token_logits
    assert torch.equal(whole[[1, 2, 5]], output.next_token_logits)
    assert LogitsProcessor()(None, hidden, head, batch()).next_token_logits.shape == (0, 40)


def test_logits_are_float32_and_not_rounded():
    _, head, weight, hidden = make(torch.bfloat16)
    logits = LogitsProcessor()(None, hidden, head, batch(0)).next_token_logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden[:1].float() @ weight.float().T)
    assert not torch.equal(logits, logits.bfloat16().float())


def test_a_tied_embedding_or_any_module_may_be_the_head():
    embedding, head, weight, hidden = make(torch.bfloat16)
    expected = LogitsProcessor()(None, hidden, head, batch(3)).next_token_logits
    tied = LogitsProcessor()(None, hidden, embedding, batch(3)).next_token_logits
    assert torch.equal(tied, expected)
    plain = nn.Linear(16, 40, bias=False, dtype=torch.bfloat16)
    plain.weight.data = weight
    own = LogitsProcessor()(None, hidden, plain, batch(3)).next_token_logits
    assert own.dtype == torch.float32
    torch.testing.assert_close(own, expected, rtol=0.02, atol=0.05)


def test_scale_and_cap():
    _, head, weight, hidden = make()
    config = SimpleNamespace(final_logit_softcapping=3.0)
    processor = LogitsProcessor(config, logit_scale=0.5)
    expected = 3.0 * torch.tanh(hidden @ weight.T * 0.5 / 3.0)
    actual = processor(None, hidden, head, batch(*range(6))).next_token_logits
    torch.testing.assert_close(actual, expected)


def test_the_output_can_be_changed():
    _, head, _, hidden = make()
    output = LogitsProcessor()(None, hidden, head, batch(0))
    output.next_token_logits = torch.zeros(1, 40)
    assert not output.next_token_logits.any()
