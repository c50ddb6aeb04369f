"""Four families in bfloat16 beside Hugging Face in float32, by every way a step can run."""

import pytest
import torch

from bench.checkpoints import make_checkpoint
from bench.cuda_accuracy import FAMILIES, LENGTHS, NEW_TOKENS, Oracle, compare, variants

# On the CPU, where only the test itself is tried out, a few short prompts.
_SHORT = (1, 2, 17, 60)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory, engine_device):
    """A checkpoint and its oracle."""
    folder = tmp_path_factory.mktemp("accuracy") / request.param
    make_checkpoint(FAMILIES[request.param], folder)
    yield folder, Oracle(folder, engine_device)
    if engine_device == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize("name", [variant.name for variant in variants(1)])
def test_logprobs_are_as_near_as_hugging_faces_own(name, family, engine_device):
    folder, oracle = family
    lengths, new_tokens = (LENGTHS, NEW_TOKENS) if engine_device == "cuda" else (_SHORT, 24)
    made = {variant.name: variant for variant in variants(max(lengths) + new_tokens)}
    found = compare(
        folder,
        made[name],
        oracle,
        device=engine_device,
        lengths=lengths,
        new_tokens=new_tokens,
    )
    for phase in ("prefill", "decode"):
        differences = found[phase]
        assert differences.count > 100
        assert differences.is_close, f"{phase}: {differences}"
