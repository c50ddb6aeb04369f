"""How much quantising a checkpoint's weights changes what the model says."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglite.cache.kv_pool import KVPool
from sglite.layers.forward_batch import ForwardBatch
from sglite.models.checkpoint import Checkpoint
from sglite.models.loader import LoadedModel, load_model

_PAGE_SIZE = 16
# Logits that are worked on at a time: 256 MB of float32.
_MOST_LOGITS = 1 << 26


@dataclass(frozen=True)
class QuantizationLoss:
    """Two models compared on the same texts, token by token.

    Attributes:
        quantization: the method.
        num_tokens: predictions that were compared.
        plain_perplexity: `exp(mean(-log p(token)))` of the checkpoint as it is.
        perplexity: the same of the quantised model.
        kl: the mean of `sum p log(p / q)` in nats, p the plain model's distribution.
        largest_kl: of any token.
        same_best: the share of tokens of which both hold the same one most probable.
    """

    quantization: str
    num_tokens: int
    plain_perplexity: float
    perplexity: float
    kl: float
    largest_kl: float
    same_best: float

    def __str__(self) -> str:
        return (
            f"{self.quantization}: perplexity {self.perplexity:.4f} instead of "
            f"{self.plain_perplexity:.4f} ({self.perplexity / self.plain_perplexity - 1:+.2%}), KL "
            f"{self.kl:.2e} nats on average and {self.largest_kl:.2e} at most, the same most "
            f"probable token {self.same_best:.1%} of the time, over {self.num_tokens} tokens"
        )


def quantization_loss(
    checkpoint: Checkpoint,
    quantization: str,
    token_ids: Sequence[Sequence[int]] | None = None,
    **arguments: object,
) -> QuantizationLoss:
    """Compares a checkpoint with its quantised self, both on the CPU and in the same dtype.

    Args:
        checkpoint: weights that are not quantised.
        quantization: "int8" or "int4".
        token_ids: the texts, of two tokens or more each; None: `sampled_texts` of the plain model.
        **arguments: further ones of `load_model`, for both.
    """
    plain = load_model(checkpoint, **arguments)
    texts = sampled_texts(plain) if token_ids is None else token_ids
    quantized = load_model(checkpoint, quantization=quantization, **arguments)
    plain_losses, losses, divergences, same = [], [], [], []
    for text in texts:
        for expected, actual, following in _compared(plain, quantized, torch.tensor(text)):
            plain_losses.append(-expected.gather(1, following)[:, 0])
            losses.append(-actual.gather(1, following)[:, 0])
            divergences.append((expected.exp() * (expected - actual)).sum(-1))
            same.append(expected.argmax(-1) == actual.argmax(-1))
    kl = torch.cat(divergences)
    return QuantizationLoss(
        quantization=quantization,
        num_tokens=len(kl),
        plain_perplexity=math.exp(torch.cat(plain_losses).double().mean()),
        perplexity=math.exp(torch.cat(losses).double().mean()),
        kl=kl.double().mean().item(),
        largest_kl=kl.max().item(),
        same_best=torch.cat(same).double().mean().item(),
    )


def sampled_texts(
    loaded: LoadedModel, *, count: int = 8, length: int = 128, seed: int = 0
) -> list[list[int]]:
    """Texts that the model itself finds likely: drawn from its distribution, token by token.

    Args:
        loaded: the model.
        count: texts.
        length: tokens of each; the first is drawn evenly from the vocabulary.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(length, loaded.max_positions or length)
    texts = torch.randint(loaded.vocab_size, (count, 1), generator=generator)
    cache = _cache(loaded, count, length)
    for position in range(length - 1):
        logits = _step(loaded, cache, texts[:, position:], position)
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        texts = torch.cat([texts, drawn], 1)
    return texts.tolist()


def _compared(plain: LoadedModel, quantized: LoadedModel, tokens: Tensor):
    """Log-probabilities of both models and the tokens that follow, some positions at a time."""
    inputs, following = tokens[:-1], tokens[1:, None]
    caches = [_cache(loaded, 1, len(inputs)) for loaded in (plain, quantized)]
    at_once = max(1, _MOST_LOGITS // plain.vocab_size)
    for start in range(0, len(inputs), at_once):
        stop = start + at_once
        expected, actual = (
            _step(loaded, cache, inputs[None, start:stop], start).log_softmax(-1)
            for loaded, cache in zip((plain, quantized), caches, strict=True)
        )
        yield expected, actual, following[start:stop]


def _cache(loaded: LoadedModel, count: int, length: int) -> KVPool:
    """Pages for `count` texts of at most `length` tokens each."""
    pages = -(-length // _PAGE_SIZE)
    return KVPool(1 + count * pages, _PAGE_SIZE, loaded.kv_layers, loaded.dtype)


def _step(loaded: LoadedModel, cache: KVPool, token_ids: Tensor, start: int) -> Tensor:
    """Logits of tokens [count, new] that follow `start` others, [count * new, vocabulary]."""
    count, new = token_ids.shape
    pages = (cache.num_pages - 1) // count
    table = torch.arange(1, 1 + count * pages, dtype=torch.int32).view(count, pages)
    positions = torch.arange(start, start + new)
    slots = table[:, positions // _PAGE_SIZE].long() * _PAGE_SIZE + positions % _PAGE_SIZE
    batch = ForwardBatch(
        query_start=torch.arange(0, (count + 1) * new, new, dtype=torch.int32),
        kv_lens=torch.full((count,), start + new, dtype=torch.int32),
        kv_end=(positions + 1).int().repeat(count),
        slots=slots.flatten(),
        page_table=table,
        logits_rows=torch.arange(count * new),
        kv_cache=cache.layers,
    )
    with torch.inference_mode():
        output = loaded.model(token_ids.contiguous().flatten(), positions.repeat(count), batch)
    return output.next_token_logits
