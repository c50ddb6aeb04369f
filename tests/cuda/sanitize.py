"""Small runs of the kernels that work with many blocks on one row, for compute-sanitizer.

    compute-sanitizer --tool racecheck python -m tests.cuda.sanitize attention

A test would do, but for the reference, which takes most of its time; that the results are right is
the tests' affair.
"""

import sys
from random import Random

import torch

from sglite import ops
from tests.ops.paged import Sequences
from tests.ops.test_sampling import (
    draw_edits,
    draw_logits,
    draw_parameters,
    make_edits,
    parameters,
)

GPU = torch.device("cuda")


def attention() -> None:
    """Decodes with a shared prefix, chunks over a cached prefix, whole prompts, one token."""
    generator = torch.Generator().manual_seed(0)
    spans = [(0, 1699, 1700), (0, 1699, 1700), (0, 300, 700), (1, 0, 90), (2, 0, 1)]
    for head_dim in (64, 128):
        sequences = Sequences.draw([1700, 90, 1], 8, 2, head_dim, torch.bfloat16, generator)
        arguments = [tensor.to(GPU) for tensor in sequences.batch(spans, 16, generator)]
        page_table = arguments[3]
        page_table[1, :100] = page_table[0, :100]
        assert torch.isfinite(ops.paged_attention(*arguments, 0.1)).all()
        # Enough tokens for Hopper's prefill kernel.
        sequences = Sequences.draw([1500, 1100], 8, 2, head_dim, torch.bfloat16, generator)
        spans_of_prompts = [(0, 200, 1500), (1, 0, 1100)]
        arguments = [t.to(GPU) for t in sequences.batch(spans_of_prompts, 16, generator)]
        assert torch.isfinite(ops.paged_attention(*arguments, 0.1)).all()


def sampling() -> None:
    """Each way of choosing, by one block for a row and by several."""
    source = Random(3)
    kinds = (
        {"top_k": 50, "top_p": 0.9},
        {"top_p": 0.9},
        {"top_k": 1000, "min_p": 0.01},
        {"temperature": 0.0},
    )
    for vocab, rows in ((3000, 3), (20000, 2)):
        logits = draw_logits(torch.Generator().manual_seed(1), "ties", rows, vocab).to(GPU)
        for values in kinds:
            drawn = [draw_parameters(source, vocab) | values for _ in range(rows)]
            edits = make_edits([draw_edits(source, vocab) for _ in range(rows)])
            ops.sample(
                logits,
                *(tensor.to(GPU) for tensor in parameters(drawn)),
                edits=ops.TokenEdits(*(tensor.to(GPU) for tensor in edits)),
            )
        ops.log_probs(logits, torch.zeros(rows, dtype=torch.int64, device=GPU), 20)


if __name__ == "__main__":
    {"attention": attention, "sampling": sampling}[sys.argv[1]]()
    torch.cuda.synchronize()
