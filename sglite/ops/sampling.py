"""Choosing tokens from logits, and log-probabilities."""

from typing import NamedTuple

import torch
from torch import Tensor

from sglite import _C

#: Columns of the `reals` and `integers` that `sample` takes.
REALS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
INTEGERS = ("top_k", "seed", "sample_index", "position")

#: What `sample` says of each row: a token was chosen; the logits hold NaN; no token is left to
#: choose from, since all are banned or -infinity.
SAMPLED, NOT_A_NUMBER, NOTHING_LEFT = 0, 1, 2


class TokenEdits(NamedTuple):
    """What changes the logits of single tokens, for R rows of a batch, compactly.

    Row r owns the entries `offsets[list, r]:offsets[list, r + 1]` of each of the three lists; a row
    without entries costs nothing.
    """

    offsets: Tensor  # [3, R + 1] int64, into `seen`, into `bias_ids`, into `allowed_ids`
    seen: Tensor  # [N, 3] int32: token id, how often it is in the output, 1 if in the prompt (or 0)
    bias_ids: Tensor  # [M] int32
    bias_values: Tensor  # [M] float32, added to the logit; -infinity bans the token
    allowed_ids: Tensor  # [A] int32: all other tokens are banned; no entries: all are allowed


class LogProbs(NamedTuple):
    """What `log_probs` gives for R rows."""

    logprobs: Tensor  # [R] float32, of the tokens asked about
    ranks: Tensor  # [R] int64, 1 + how many tokens have a larger logit
    top_ids: Tensor  # [R, top_n] int64, the most probable tokens, of equal ones the lower id first
    top_logprobs: Tensor  # [R, top_n] float32


def sampling_workspace(
    vocab_size: int, rows: int = 1, device: torch.device | str = "cpu"
) -> Tensor:
    """Scratch memory for `sample` and `log_probs` on rows of `vocab_size` logits.

    On the CPU it is made for as many threads as the caller's kernels use; about 20 bytes for each
    of them and each token. With less, down to one thread's share, the ops use fewer threads. On a
    GPU it is empty, unless a row is too large for the chip's shared memory.

    Args:
        vocab_size: logits of a row.
        rows: how many rows one call is given at most.
        device: where the logits are.
    """
    probe = torch.empty(0, dtype=torch.uint8, device=device)
    return probe.new_empty(_C.sampling_workspace_bytes(probe, vocab_size, rows))


def sample(
    logits: Tensor,
    reals: Tensor,
    integers: Tensor,
    *,
    edits: TokenEdits | None = None,
    rows: Tensor | None = None,
    workspace: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose one token for each row of logits, each row by its own parameters.

    The order of work on a row `x`:

    1. Tokens that are not among the allowed ones: `x = -inf`. Penalties, for tokens that were seen:
       `x = x / repetition if x > 0 else x * repetition` (CTRL, Keskar et al., 2019), then
       `x -= frequency * count + presence` if `count > 0`. Then `x += bias`, where -inf sets it.
    2. Temperature 0: the token with the largest `x`, of equal ones the lowest id. Else the weights
       `w = exp((x - max(x)) / temperature)`, which the filters that follow reduce.
    3. Top-k: the `top_k` first tokens in the order "larger `x`, then lower id"; all if below 1.
    4. Top-p (Holtzman et al., 2020): of these the fewest first ones whose weights add up to at
       least `top_p * sum(w)`.
    5. Min-p (Nguyen et al., 2024): of these the ones with `w >= min_p`, the largest weight being 1.
    6. The first token, in the order of ids, where the running sum of `w` exceeds `u * sum(w)`.
       `u` in [0, 1) is made of the first 53 bits that Philox4x32-10 (Salmon et al., 2011) gives for
       the key (seed) and the counter (position, sample index, 0).

    Weights are float32, their sums double; each row is computed in an order of its own, so that a
    token depends neither on the other rows nor on the number of threads. The vocabulary is not
    sorted. Logits of +inf share all the probability equally. Weights below e^-87.3 are 0.

    Args:
        logits: [L, vocab] float32, elements of a row side by side; not changed.
        reals: [R, 6] float32, columns as in `REALS`. temperature 0 or at least 1e-30, top_p in
            (0, 1], min_p in [0, 1], repetition_penalty above 0.
        integers: [R, 4] int64, columns as in `INTEGERS`; `seed` holds 64 bits, `sample_index` 32.
        edits: penalties, biases and bans; None if no row has any.
        rows: [R] int64, which rows of `logits` are meant; None: all of them, and R is L.
        workspace: from `sampling_workspace`; allocated when absent.
        out: the two tensors to write and return; allocated when absent.

    Returns:
        token_ids: [R] int64, -1 where no token was chosen.
        status: [R] int32, `SAMPLED`, `NOT_A_NUMBER` (the row of logits holds NaN, whether banned or
            not) or `NOTHING_LEFT`.

    Raises:
        ValueError: a shape, dtype, parameter, offset or token id is not as described.
    """
    count = reals.shape[0]
    if workspace is None:
        workspace = sampling_workspace(logits.shape[-1], count, logits.device)
    if out is None:
        out = (
            torch.empty(count, dtype=torch.int64, device=logits.device),
            torch.empty(count, dtype=torch.int32, device=logits.device),
        )
    token_ids, status = out
    _C.sample(token_ids, status, logits, rows, reals, integers, edits, workspace)
    return token_ids, status


def log_probs(
    logits: Tensor,
    token_ids: Tensor,
    top_n: int = 0,
    *,
    rows: Tensor | None = None,
    workspace: Tensor | None = None,
) -> LogProbs:
    """`log_softmax(logits)` of one token in each row, its rank, and the most probable tokens.

    Logits of +inf share all the probability equally. A row that holds NaN, or -inf only, gives NaN
    and meaningless ranks and ids.

    Args:
        logits: [L, vocab] float32, elements of a row side by side; not changed.
        token_ids: [R] int64.
        top_n: how many of the most probable tokens are wanted, 0 to vocab.
        rows: [R] int64, which rows of `logits` are meant; None: all of them, and R is L.
        workspace: from `sampling_workspace`; allocated when absent.

    Raises:
        ValueError: a shape or dtype is not as described, or a token id or `top_n` is too large.
    """
    count, device = token_ids.shape[0], logits.device
    if workspace is None:
        workspace = sampling_workspace(logits.shape[-1], count, device)
    sorted_apart = _C.most_top_tokens(logits) < top_n <= logits.shape[-1]
    if sorted_apart:
        top = _sorted(logits if rows is None else logits[rows], top_n)
        top_n = 0
    result = LogProbs(
        torch.empty(count, device=device),
        torch.empty(count, dtype=torch.int64, device=device),
        torch.empty(count, top_n, dtype=torch.int64, device=device),
        torch.empty(count, top_n, device=device),
    )
    _C.log_probs(*result, logits, rows, token_ids, workspace)
    return result._replace(top_ids=top[0], top_logprobs=top[1]) if sorted_apart else result


def _sorted(logits: Tensor, top_n: int) -> tuple[Tensor, Tensor]:
    """The `top_ids` and `top_logprobs` of more tokens than a GPU finds without sorting them all."""
    certain = (logits == torch.inf).any(-1, keepdim=True)
    shared = torch.where(logits == torch.inf, 0.0, -torch.inf)
    every = torch.log_softmax(torch.where(certain, shared, logits).double(), -1)
    top_ids = torch.sort(logits, descending=True, stable=True).indices[:, :top_n].contiguous()
    return top_ids, every.gather(1, top_ids).float()
