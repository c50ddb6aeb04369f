"""Tokens on their way from the device that has drawn them."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from sglite import ops
from sglite.engine.failures import failed
from sglite.engine.sampling_state import SamplingState, step_error
from sglite.engine.scheduler import Outcome
from sglite.engine.transfer import Download
from sglite.interface.errors import RequestError
from sglite.interface.outputs import TokenLogprobs
from sglite.ops.sampling import NOT_A_NUMBER, NOTHING_LEFT, SAMPLED


class DrawnTokens:
    """The tokens that a step has drawn, on the device and on their way to the host.

    Args:
        states: of the R requests.
        token_ids: [R] int64 on the device, -1 where none was drawn.
        status: [R] int32, what `sglite.ops.sample` said.
        output_indices: for each request which of its output tokens this is, from 0 on.
        failures: by row, of the requests whose logits processors failed.
        logprob_rows: the rows that want log-probabilities.
        logprobs: those rows' log-probabilities, if there are any rows.
        describe: `Sampler.describe`.
    """

    def __init__(
        self,
        states: Sequence[SamplingState],
        token_ids: Tensor,
        status: Tensor,
        output_indices: Sequence[int],
        failures: Mapping[int, RequestError],
        logprob_rows: Sequence[int],
        logprobs: ops.LogProbs | None,
        describe: Callable[..., list[TokenLogprobs]],
    ):
        self.token_ids = token_ids
        self._states = states
        self._output_indices = output_indices
        self._failures = failures
        self._logprob_rows = logprob_rows
        self._describe = describe
        # On the CPU both are there: lists of them are made faster than copies.
        self._known = None if token_ids.is_cuda else (token_ids.tolist(), status.tolist())
        tensors = [] if self._known else [token_ids, status]
        if logprobs is not None:
            tensors += logprobs
        self._download = Download(tensors) if tensors else None

    def collect(self) -> list[Outcome]:
        """Waits for the device; gives one outcome for each request, in order."""
        logprobs = self._download.wait() if self._download else ()
        if self._known:
            token_ids, codes = self._known
        else:
            token_ids, codes = (tensor.tolist() for tensor in logprobs[:2])
            logprobs = logprobs[2:]
        if not (logprobs or self._failures or any(codes)):
            return Outcome.of_tokens(token_ids)
        described, failures = self._describe_all(token_ids, logprobs)
        failures |= self._failures
        results = []
        for row, (token_id, code) in enumerate(zip(token_ids, codes, strict=True)):
            error = failures.get(row)
            if error is None and code != SAMPLED:
                error = _no_token(code, self._states[row], self._output_indices[row])
            if error is not None:
                results.append(Outcome(error=error))
            else:
                results.append(Outcome(token_id, described.get(row)))
        return results

    def _describe_all(
        self, token_ids: Sequence[int], logprobs: Sequence[Tensor]
    ) -> tuple[dict[int, TokenLogprobs], dict[int, RequestError]]:
        """By row, for the rows that ask for log-probabilities and have a token; what failed."""
        places = [place for place, row in enumerate(self._logprob_rows) if token_ids[row] >= 0]
        rows = [self._logprob_rows[place] for place in places]
        if not rows:
            return {}, {}
        ids = [token_ids[row] for row in rows]
        found = [tensor[places] for tensor in logprobs]
        wanted = [self._states[row].logprobs for row in rows]
        try:
            return dict(zip(rows, self._describe(ids, found, wanted), strict=True)), {}
        except BaseException:  # the tokenizer, on one of the texts: on which is seen below
            pass
        described, failures = {}, {}
        for index, row in enumerate(rows):
            one = slice(index, index + 1)
            try:
                (described[row],) = self._describe(
                    ids[one], [tensor[one] for tensor in found], wanted[one]
                )
            except BaseException as error:
                failures[row] = failed("the text of log-probabilities", error)
        return described, failures


def _no_token(status: int, state: SamplingState, output_index: int) -> RequestError:
    source = (
        "the logits processors' result holds" if state.processors else "the model's logits hold"
    )
    reasons = {
        NOT_A_NUMBER: f"{source} NaN",
        NOTHING_LEFT: "every token is banned (logits of -infinity, bad_words, allowed_token_ids, "
        "logit_bias, or end tokens before min_new_tokens)",
    }
    return step_error(output_index, reasons[status])
