"""What a call gives once its requests have ended."""

import pytest

from sglite.engine.calls import Call, Work
from sglite.engine.request import Request
from sglite.engine.results import RequestGroup
from sglite.interface.errors import EngineClosedError
from sglite.interface.sampling_params import SamplingParams


class NoText:
    """A tokenizer whose tokens are no text."""

    def decode(self, token_ids, *, skip_special_tokens=True):
        return ""


@pytest.mark.parametrize("reasons", [("abort", "length"), ("length", "abort")])
def test_a_call_that_lost_any_of_its_completions_gives_no_results(reasons):
    params = SamplingParams(max_new_tokens=1, n=2)
    requests = [Request([1, 2], params, sample_index=index) for index in range(2)]
    call = Call(requests)
    call.ended_as = "this LLM was closed"
    for request, reason in zip(requests, reasons, strict=True):
        request.finish(reason)
    work = Work([RequestGroup(0, None, requests, NoText())], is_single=True)
    with pytest.raises(EngineClosedError, match="this LLM was closed"):
        work.results(call)
