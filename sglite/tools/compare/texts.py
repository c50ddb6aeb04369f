"""Greedy texts of both models."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sglite.llm import LLM
from sglite.tools.compare.layers import Expectation
from sglite.tools.compare.metrics import rouge_l
from sglite.tools.compare.ours import Text, forced_logits
from sglite.tools.compare.reference import Reference


@dataclass(frozen=True, slots=True)
class TextResult:
    """What follows one prompt greedily.

    Attributes:
        prompt_tokens: of the prompt.
        ours, theirs: the token ids that follow it in sglite and in Hugging Face.
        our_text, their_text: the same as text; None without a tokenizer.
        rouge_l: of the texts' characters, or of the ids without a tokenizer.
        same_tokens: before the first one that differs.
        gap: how far apart the reference's logits of the two tokens are there; None where none
            differs.
        passed: whether the tokens are the same, or that is a near tie, of tokens or of experts.
    """

    prompt_tokens: int
    ours: list[int]
    theirs: list[int]
    our_text: str | None
    their_text: str | None
    rouge_l: float
    same_tokens: int
    gap: float | None
    passed: bool


def compare_texts(
    texts: Sequence[Text],
    expected: Sequence[Expectation],
    reference: Reference,
    tie: float,
    tokenizer,
) -> list[TextResult]:
    """The texts that sglite generated against Hugging Face's.

    As long as the tokens agree, the reference's logits along them say what it would generate; it
    is run again only from where they differ.

    Args:
        texts: prompts and what sglite generated.
        expected: the reference's along each text.
        reference: the model.
        tie: two logits that are no further apart are as good as the same.
        tokenizer: a Hugging Face tokenizer; None: there is none.
    """
    return [
        _compare(
            text,
            found.logits[len(text.prompt) - 1 - text.first_row :],
            reference,
            tie,
            tokenizer,
        )
        for text, found in zip(texts, expected, strict=True)
    ]


def excuse_experts(
    llm: LLM, texts: Sequence[Text], results: Sequence[TextResult], tie: float
) -> list[TextResult]:
    """Passes texts that part where our model, left to its own experts, has other logits as well.

    What is generated cannot follow the reference's experts, as what logits are judged by does. A
    token is right that is the best of ours along the same text.

    Args:
        llm: the model.
        texts, results: as `compare_texts` takes and gives them.
        tie: as for it.
    """
    excused = []
    for text, result in zip(texts, results, strict=True):
        if not result.passed:
            (logits,) = forced_logits(llm, [text])
            row = logits[len(text.prompt) - 1 - text.first_row + result.same_tokens]
            behind = (row.max() - row[text.following[result.same_tokens]]).item()
            result = replace(result, passed=behind <= tie)
        excused.append(result)
    return excused


def _compare(text: Text, rows: Tensor, reference: Reference, tie: float, tokenizer) -> TextResult:
    best = rows.argmax(-1).tolist()
    pairs = enumerate(zip(text.following, best, strict=True))
    same = next((i for i, (ours, theirs) in pairs if ours != theirs), len(best))
    theirs, gap = list(text.following), None
    if same < len(best):
        row = rows[same]
        gap = (row[best[same]] - row[text.following[same]]).item()
        known = [*text.following[:same], best[same]]
        rest = len(best) - len(known)
        theirs = known + reference.continue_greedily(text.prompt + known, rest)
    decoded: list[str | None] = [None, None]
    score = rouge_l(text.following, theirs)
    if tokenizer is not None:
        decoded = [tokenizer.decode(ids) for ids in (text.following, theirs)]
        score = rouge_l(*decoded)
    return TextResult(
        prompt_tokens=len(text.prompt),
        ours=text.following,
        theirs=theirs,
        our_text=decoded[0],
        their_text=decoded[1],
        rouge_l=score,
        same_tokens=same,
        gap=gap,
        passed=gap is None or gap <= tie,
    )
