"""From prompts and parameters to requests; refuses here what could never run."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sglite.engine.prompt_reader import PromptReader
from sglite.engine.request import Request
from sglite.engine.results import RequestGroup
from sglite.engine.stopping import StopChecker
from sglite.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from sglite.interface.errors import InvalidRequestError
from sglite.interface.generation_defaults import GenerationDefaults
from sglite.interface.prompts import Prompt
from sglite.interface.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request has to fit into.

    Attributes:
        vocab_size: ids are below it.
        context_length: tokens of prompt and completion together.
        kv_cache_tokens: tokens that the KV cache holds in all.
    """

    vocab_size: int
    context_length: int
    kv_cache_tokens: int


class Intake:
    """Makes requests.

    Args:
        tokenizer: for stop strings and streams.
        reader: for prompts.
        limits: see `Limits`.
        defaults: what the checkpoint's `generation_config.json` says.
        end_token_ids: ids that end a completion unless `ignore_eos`.
        seed: where the seeds of requests without one come from; None: the system's randomness.

    Attributes:
        limits, reader: as given.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        reader: PromptReader,
        limits: Limits,
        defaults: GenerationDefaults,
        end_token_ids: Sequence[int],
        seed: int | None,
    ):
        self._tokenizer = tokenizer
        self.reader = reader
        self.limits = limits
        self._defaults = defaults
        self._end_token_ids = frozenset(end_token_ids)
        self._num_namespaces, self._namespace = 0, ""
        self._random = random.SystemRandom() if seed is None else random.Random(seed)

    def start_namespace(self) -> None:
        """Requests made from now on share no cached prefix with those made before."""
        self._num_namespaces += 1
        self._namespace = f"weights {self._num_namespaces}"

    def seed_for(self, params: SamplingParams) -> int:
        """The seed of a request: the one that the caller gave, or the next one drawn."""
        return self._random.getrandbits(64) if params.seed is None else params.seed

    def make_group(
        self,
        index: int,
        name: str,
        prompt: Prompt,
        params: SamplingParams,
        seed: int,
        *,
        streams: bool,
        called_at: float,
    ) -> RequestGroup:
        """Makes the `n` requests of one prompt.

        Args:
            index: the prompt's position in the caller's list.
            name: how messages call the prompt.
            prompt: what to generate from.
            params: as the caller gave them.
            seed: from `seed_for`.
            streams: whether text is to be kept token by token.
            called_at: when the call began, by `time.perf_counter`.

        Raises:
            InvalidRequestError: naming the prompt, what is wrong, and what is allowed.
        """
        token_ids, multimodal, keys = self.reader.read(name, prompt)
        self._check_tokens(name, token_ids)
        # A video's positions may run further ahead than its tokens.
        num_positions = len(token_ids)
        if multimodal is not None:
            num_positions += max(0, multimodal.position_offset)
        room = self.limits.context_length - num_positions
        params = params.resolve(self._defaults, room=min(room, self._room_in_cache(token_ids)))
        params.check_vocabulary(self.limits.vocab_size)
        self._check_fit(name, len(token_ids), num_positions, params.max_new_tokens)
        if params.prompt_logprobs_start >= len(token_ids):
            raise InvalidRequestError(
                f"prompt_logprobs_start={params.prompt_logprobs_start} is not allowed for {name}: "
                f"it must be below the prompt's {len(token_ids)} tokens"
            )
        requests = [
            Request(
                token_ids,
                params,
                seed=seed,
                sample_index=sample_index,
                namespace=self._namespace,
                banned_sequences=self._banned_sequences(params),
                stop_checker=self._stop_checker(token_ids, params, streams),
                multimodal=multimodal,
                prompt_keys=keys,
                called_at=called_at,
            )
            for sample_index in range(params.n)
        ]
        return RequestGroup(index, prompt.text, requests, self._tokenizer)

    def continue_group(self, group: RequestGroup) -> RequestGroup:
        """The group once more: requests that were aborted go on from where they stand."""
        requests = [
            self._continue(request) if request.finish_reason == "abort" else request
            for request in group.requests
        ]
        return RequestGroup(group.index, group.prompt, requests, self._tokenizer)

    def _continue(self, request: Request) -> Request:
        token_ids = request.prompt_token_ids.tolist()
        again = Request(
            token_ids,
            request.params,
            seed=request.seed,
            sample_index=request.sample_index,
            namespace=self._namespace,
            banned_sequences=request.banned_sequences,
            stop_checker=self._stop_checker(
                token_ids, request.params, streams=request.stop_checker.keeps_text
            ),
            multimodal=request.multimodal,
            prompt_keys=None if request.multimodal is None else request.keys[: len(token_ids)],
        )
        again.continue_from(request)
        return again

    def _room_in_cache(self, token_ids: Sequence[int]) -> int:
        # The last token that is sampled needs no place in the cache.
        return self.limits.kv_cache_tokens - len(token_ids) + 1

    def _check_tokens(self, name: str, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise InvalidRequestError(f"{name} is a prompt with no token at all")
        largest = max(token_ids)
        if largest >= self.limits.vocab_size:
            raise InvalidRequestError(
                f"{name} holds the token id {largest}, but ids must be below "
                f"{self.limits.vocab_size}, the size of the vocabulary"
            )

    def _check_fit(
        self, name: str, num_prompt_tokens: int, num_positions: int, max_new_tokens: int
    ) -> None:
        limits = self.limits
        if num_positions + max_new_tokens > limits.context_length:
            which = f" at {num_positions} positions" if num_positions > num_prompt_tokens else ""
            raise InvalidRequestError(
                f"{name} has {num_prompt_tokens} tokens{which}, and with "
                f"max_new_tokens={max_new_tokens} it needs a context of "
                f"{num_positions + max_new_tokens}; context_length is {limits.context_length}"
            )
        needed = num_prompt_tokens + max_new_tokens
        if needed - 1 > limits.kv_cache_tokens:
            raise InvalidRequestError(
                f"{name} has {num_prompt_tokens} tokens, and with max_new_tokens={max_new_tokens} "
                f"it needs {needed - 1} tokens of KV cache; there are {limits.kv_cache_tokens}: "
                f"raise kv_cache_tokens, or ask for less"
            )

    def _stop_checker(
        self, token_ids: Sequence[int], params: SamplingParams, streams: bool
    ) -> StopChecker:
        detokenizer = None
        if streams or params.stop:
            detokenizer = IncrementalDetokenizer(
                self._tokenizer, token_ids, params.skip_special_tokens
            )
        return StopChecker(params, end_token_ids=self._end_token_ids, detokenizer=detokenizer)

    def _banned_sequences(self, params: SamplingParams) -> list[list[int]]:
        """Token sequences of `bad_words`: a word may start a text or stand behind a space."""
        sequences = []
        for word in params.bad_words:
            for text in (word, f" {word}"):
                token_ids = self._tokenizer.encode(text, add_special_tokens=False)
                if token_ids and token_ids not in sequences:
                    sequences.append(token_ids)
        return sequences
