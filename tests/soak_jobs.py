"""The requests of a soak, and the ledger of what became of them."""

import json
import random
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sglite import RequestOutput, SamplingParams
from tests.checkpoints import VOCAB_SIZE
from tests.vision_checkpoints import picture, words

NUM_JOBS = 240
#: Those with pictures come behind the others.
NUM_SIGHTS = 24


@dataclass(frozen=True)
class Job:
    """A request that is sent again and again, and always has to give the same."""

    prompt: list[int] | dict[str, Any]
    params: SamplingParams


@dataclass
class Ledger:
    """What became of everything, in a size that does not grow.

    Attributes:
        found: by job, what it gave when it finished first, as a text.
        counts: of what happened.
        problems: what should not have happened.
    """

    found: dict[int, str] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, how: str, indices: Sequence[int], outputs: Sequence[RequestOutput]) -> None:
        """Books outputs; the same job must always have given the same.

        Args:
            how: they came, for the message where it did not.
            indices: of the jobs.
            outputs: one for each.
        """
        for index, output in zip(indices, outputs, strict=True):
            with self.lock:
                self.counts[output.finish_reason] += 1
                if any(one.finish_reason not in ("stop", "length") for one in output.outputs):
                    continue
                found = as_text(output)
                first = self.found.setdefault(index, found)
                if first != found:
                    self.problem(f"job {index}, {how}: {difference(first, found)}")

    def problem(self, text: str) -> None:
        """Books what should not have happened."""
        if len(self.problems) < 50:
            self.problems.append(text)


def difference(first: str, second: str) -> str:
    """Where two texts of `as_text` part, and what stands there."""
    pairs = enumerate(zip(first, second, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
    around = slice(max(0, place - 60), place + 60)
    return f"at {place} of {len(first)} {first[around]!r} became {second[around]!r}"


def as_text(output: RequestOutput) -> str:
    """All that must be the same bits."""
    logprobs = [
        None
        if completion.logprobs is None
        else [
            sorted((token, entry.logprob) for token, entry in x.items())
            for x in completion.logprobs
        ]
        for completion in output.outputs
    ]
    tokens = [(completion.token_ids, completion.text) for completion in output.outputs]
    return json.dumps([tokens, logprobs], sort_keys=True)


def draw_jobs(source: random.Random) -> list[Job]:
    """Prompts that share starts of all lengths, and parameters of all kinds."""
    starts = [source.choices(range(2, VOCAB_SIZE), k=150) for _ in range(5)]
    jobs = []
    for _ in range(NUM_JOBS):
        start = source.choice(starts)
        own = source.choices(range(2, VOCAB_SIZE), k=source.randint(1, 60))
        params = SamplingParams(
            max_new_tokens=source.choice([1, 2, 10, 40, 80]),
            temperature=source.choice([0.0, 0.7, 1.5]),
            top_k=source.choice([-1, 1, 20]),
            top_p=source.choice([1.0, 0.9]),
            repetition_penalty=source.choice([1.0, 1.0, 1.2]),
            logprobs=source.choice([None, None, 2]),
            n=source.choice([1, 1, 1, 2]),
            stop=source.choice([(), (), ("e",)]),
            seed=source.randrange(1 << 40),
            ignore_eos=source.random() < 0.5,
        )
        jobs.append(Job(start[: source.randint(0, len(start))] + own, params))
    return jobs


def draw_sights(source: random.Random) -> list[Job]:
    """Prompts with one or two pictures of a few, in texts that begin alike."""
    pictures = [picture(source.randint(8, 90), source.randint(8, 90), seed) for seed in range(6)]
    jobs = []
    for _ in range(NUM_SIGHTS):
        seen = source.choices(pictures, k=source.choice([1, 1, 2]))
        text = words(source.randint(0, 4), source.randint(0, 1)) + "<image> and " * len(seen)
        params = SamplingParams(
            max_new_tokens=source.choice([1, 5, 20]),
            temperature=source.choice([0.0, 1.0]),
            seed=source.randrange(1 << 40),
            ignore_eos=True,
        )
        jobs.append(Job({"text": text, "images": seen}, params))
    return jobs
