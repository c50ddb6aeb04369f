"""Whether sglite agrees with itself, however a prompt is computed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglite.engine.invariance.plans import TAIL
from sglite.llm import LLM
from sglite.tools.compare.ours import Text, forced_logits

_NEW_TOKENS = 8
#: Tokens that must fit behind each prompt.
ROOM = _NEW_TOKENS + TAIL


@dataclass(frozen=True, slots=True)
class SelfResult:
    """One way of computing the prompts, against each of them alone, whole and cold.

    Attributes:
        condition: such as "batch of 3" or "prefix hit of 16".
        rows: rows of logits compared.
        differing_rows: those with another bit.
        largest_difference: between two logits.
        is_promised: whether the configuration promises the same bits here.
        note: what shows that the condition was met, or why it was not.
        is_met: whether it was.
    """

    condition: str
    rows: int
    differing_rows: int
    largest_difference: float
    is_promised: bool
    note: str
    is_met: bool = True

    @property
    def passed(self) -> bool:
        """Whether no bit differs where that is promised; says little where `is_met` is false."""
        return not (self.is_promised and self.differing_rows)


def compare_with_itself(llm: LLM, texts: Sequence[Text]) -> list[SelfResult]:
    """Cold against cached, whole against chunked, alone against batched, eager against graphs.

    Args:
        llm: the model.
        texts: prompts, and on a GPU what is decoded after them.
    """
    page = llm.config.page_size
    report = llm.check_invariance(
        [text.prompt for text in texts],
        new_tokens=_NEW_TOKENS,
        batch_sizes=(3, 8),
        chunk_sizes=(page + 1,),
        prefix_lengths=(page - 1, page) if page > 1 else (1,),
        num_threads=(1, 2),
        progress=False,
    )
    results = [
        SelfResult(
            condition.name,
            condition.rows,
            condition.differing_rows,
            condition.largest_difference,
            report.is_promised,
            condition.note,
            condition.is_met,
        )
        for condition in report.conditions
        if condition.rows or condition.note != "the reference"
    ]
    if llm.config.cuda_graphs:
        eager = forced_logits(llm, texts, cuda_graphs=False)
        results.append(_graphs(llm, eager, forced_logits(llm, texts)))
    return results


def _graphs(llm: LLM, eager: Sequence[Tensor], graphs: Sequence[Tensor]) -> SelfResult:
    rows, others = torch.cat(list(eager)), torch.cat(list(graphs))
    return SelfResult(
        "decode as CUDA graphs",
        rows=len(rows),
        differing_rows=int((rows != others).any(-1).sum()),
        largest_difference=(rows - others).abs().max().item(),
        is_promised=llm.config.batch_invariant,
        note="",
    )
