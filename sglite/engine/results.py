"""From requests to what the caller gets."""

from collections.abc import Sequence

from sglite.engine.failures import failed
from sglite.engine.request import Request
from sglite.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from sglite.interface.outputs import CompletionOutput, RequestOutput, StreamChunk, Usage


class RequestGroup:
    """The `n` requests of one prompt, and what the caller has been shown of them.

    Args:
        index: the prompt's position in the caller's list.
        prompt: its text, if it was given as text.
        requests: one for each completion.
        tokenizer: turns ids into text.
    """

    def __init__(
        self, index: int, prompt: str | None, requests: Sequence[Request], tokenizer: Tokenizer
    ):
        self.index = index
        self.prompt = prompt
        self.requests = list(requests)
        self._tokenizer = tokenizer
        self._shown_tokens = [0] * len(requests)
        self._shown_text = [0] * len(requests)
        self._ended = [False] * len(requests)

    @property
    def is_finished(self) -> bool:
        """Whether every completion has ended."""
        return all(request.is_finished for request in self.requests)

    @property
    def num_pixel_bytes(self) -> int:
        """What the pixels of the prompt take, which the completions share."""
        inputs = self.requests[0].multimodal
        return inputs.num_pixel_bytes if inputs else 0

    def release_pixels(self) -> None:
        """Gives up the pixels until they are wanted, where they can be made again."""
        for request in self.requests:
            if request.multimodal is not None:
                request.multimodal = request.multimodal.released()

    def output(self) -> RequestOutput:
        """Everything there is so far; complete once all requests are finished."""
        first = self.requests[0]
        ends = [request.finished_at for request in self.requests]
        usage = Usage(
            prompt_tokens=first.num_prompt_tokens,
            cached_tokens=first.num_cached_tokens or 0,
            completion_tokens=sum(len(request.output_token_ids) for request in self.requests),
            time_to_first_token=(
                first.first_token_at - first.called_at if first.first_token_at else None
            ),
            latency=max(ends) - first.called_at if None not in ends else None,
            finish_reason=first.finish_reason,
        )
        return RequestOutput(
            request_id=f"{first.arrival}",
            prompt=self.prompt,
            prompt_token_ids=first.prompt_token_ids.tolist(),
            outputs=[self._completion(index) for index in range(len(self.requests))],
            usage=usage,
            prompt_logprobs=self._prompt_logprobs(first),
        )

    @staticmethod
    def _prompt_logprobs(request: Request):
        if request.params.prompt_logprobs is None:
            return None
        first = max(1, request.params.prompt_logprobs_start)
        found = list(request.prompt_logprobs)  # of a request that runs there may be more at once
        rest = request.num_prompt_tokens - first - len(found)
        return [None] * first + found + [None] * rest

    def _completion(self, index: int) -> CompletionOutput:
        request = self.requests[index]
        logprobs = None
        if request.params.logprobs is not None:
            # A failure may have come between a token and its log-probability.
            logprobs = request.logprobs[: len(request.output_token_ids)]
        text, error, finish_reason = "", request.error, request.finish_reason
        try:
            text = self._text(request)
        except BaseException as failure:  # the tokenizer, on the text of this one alone
            if isinstance(failure, KeyboardInterrupt | SystemExit):
                raise
            if error is None:
                error, finish_reason = failed("the text", failure), "error"
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=list(request.output_token_ids),
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=request.stop_reason,
            cumulative_logprob=(
                None
                if logprobs is None
                else sum(
                    entry[token].logprob
                    for token, entry in zip(request.output_token_ids, logprobs, strict=False)
                )
            ),
            seed=request.seed,
            error=error,
        )

    def _text(self, request: Request) -> str:
        """What the stop checker has kept, or else the whole output decoded at once."""
        if request.stop_checker.keeps_text:
            return request.stop_checker.text
        token_ids = request.output_token_ids
        if request.finish_reason == "stop" and not request.params.include_stop_str_in_output:
            token_ids = token_ids[:-1]
        detokenizer = IncrementalDetokenizer(
            self._tokenizer, request.prompt_token_ids, request.params.skip_special_tokens
        )
        return detokenizer.add_all(token_ids) + detokenizer.flush()

    def chunks(self) -> list[StreamChunk]:
        """What is new since the last time, for a stream; needs stop checkers that keep text."""
        found = []
        for index, request in enumerate(self.requests):
            # Read before the tokens: a request that ends meanwhile is told of the next time.
            ended = request.is_finished
            num_tokens, text = len(request.output_token_ids), request.stop_checker.text
            if ended and self._ended[index]:
                continue
            if not ended and num_tokens == self._shown_tokens[index]:
                continue
            self._ended[index] = ended
            new_tokens = slice(self._shown_tokens[index], num_tokens)
            wants_logprobs = request.params.logprobs is not None
            found.append(
                StreamChunk(
                    index=self.index,
                    completion_index=index,
                    text=text[self._shown_text[index] :],
                    token_ids=request.output_token_ids[new_tokens],
                    logprobs=request.logprobs[new_tokens] if wants_logprobs else None,
                    finish_reason=request.finish_reason if ended else None,
                    stop_reason=request.stop_reason if ended else None,
                    error=request.error if ended else None,
                    output=self.output() if ended and all(self._ended) else None,
                )
            )
            self._shown_tokens[index], self._shown_text[index] = num_tokens, len(text)
        return found
