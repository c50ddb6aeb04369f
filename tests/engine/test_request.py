"""A request, as the thread that waits for it sees it while the driver works on it."""

from sglite.engine.request import Request
from sglite.engine.stopping import StopChecker
from sglite.interface.sampling_params import SamplingParams


def test_a_finished_request_has_all_its_text_and_times():
    """The waiting thread may look at any moment, also in the middle of `finish`."""
    seen = []

    class Watching(StopChecker):
        def finish(self):
            seen.append(request.is_finished)

    params = SamplingParams(max_new_tokens=1).resolve()
    request = Request([1], params, stop_checker=Watching(params))
    request.finish("length")
    assert seen == [False]
    assert request.is_finished
    assert request.finished_at is not None
