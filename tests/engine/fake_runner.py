"""A model runner without a model: it knows what every cache slot holds, and checks its input.

The "model" is a function of all tokens so far, so that a request's output is known in advance, and
whatever the scheduler does (chunks, prefix hits, preemption) must not change it.
"""

import numpy as np

from sglite.engine.request import Request
from sglite.engine.scheduler import Outcome, Step

VOCAB_SIZE = 50


def next_token(token_ids) -> int:
    """The token that follows; differs with every token before it."""
    state = 17
    for token in token_ids:
        state = (state * 31 + int(token) + 1) % 1_000_003
    return state % VOCAB_SIZE


def expected_output(prompt, max_new_tokens: int, end_token: int | None = None) -> list[int]:
    """What a request must generate, computed with nothing but `next_token`."""
    tokens, output = list(prompt), []
    while len(output) < max_new_tokens:
        output.append(next_token(tokens + output))
        if output[-1] == end_token:
            break
    return output


class FakeRunner:
    """Stands in for `ModelRunner`; a slot holds its position and token, packed into one int.

    A step is computed when it is launched. With `runs_ahead` the engine commits it later, and the
    runner itself remembers the tokens that the requests do not know yet.
    """

    def __init__(self, num_pages: int, page_size: int, runs_ahead: bool = False):
        self.page_size = page_size
        self.runs_ahead = runs_ahead
        self.slots = np.full((num_pages, page_size), -1, np.int64)
        self.num_computed_tokens = 0
        self.fail_at_step: int | None = None
        self.num_steps = 0
        self._sampled: dict[Request, int] = {}  # by the step before

    def launch(self, step: Step) -> "FakeStep":
        self.num_steps += 1
        if self.num_steps == self.fail_at_step:
            raise RuntimeError("planted failure")
        for copy in step.page_copies:
            n = copy.num_tokens
            self.slots[copy.destination, :n] = self.slots[copy.source, :n]
        written = set()
        for item in step.items:
            self.num_computed_tokens += item.stop - item.start
            tokens = self._tokens(item)
            for position in range(item.start, item.stop):
                slot = self._slot(item.request, position)
                assert slot[0] != 0, "page 0 is reserved"
                assert slot not in written, "two requests write to one slot"
                written.add(slot)
                self.slots[slot] = self._content(tokens, position)
        outcomes = [self._outcome(item) for item in step.items]
        self._sampled = {
            item.request: outcome.token_id
            for item, outcome in zip(step.items, outcomes, strict=True)
            if item.samples
        }
        return FakeStep(outcomes)

    def _tokens(self, item) -> list[int]:
        """All tokens up to `item.stop`, the last of which the request may not know yet."""
        tokens = item.request.known_token_ids[: item.stop].tolist()
        if len(tokens) < item.stop:
            tokens.append(self._sampled[item.request])
        assert len(tokens) == item.stop
        return tokens

    def _outcome(self, item) -> Outcome:
        tokens = self._tokens(item)
        for position in range(item.stop):
            held = self.slots[self._slot(item.request, position)]
            assert held == self._content(tokens, position), f"position {position} holds {held}"
        return Outcome(token_id=next_token(tokens)) if item.samples else Outcome()

    def _slot(self, request: Request, position: int) -> tuple[int, int]:
        return int(request.pages[position // self.page_size]), position % self.page_size

    @staticmethod
    def _content(tokens: list[int], position: int) -> int:
        return position * VOCAB_SIZE + tokens[position]

    def stats(self) -> dict[str, int]:
        return {}

    def rest(self) -> None:
        self._sampled = {}

    def close(self) -> None:
        pass


class FakeStep:
    """Stands in for `LaunchedStep`."""

    def __init__(self, outcomes: list[Outcome]):
        self._outcomes = outcomes

    def outcomes(self) -> list[Outcome]:
        return self._outcomes
