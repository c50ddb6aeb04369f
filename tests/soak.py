"""Everything at once, for as long as one likes: `python -m tests.soak --minutes 30`.

Threads and tasks send random requests through a small cache, leave streams early, cancel, interrupt
and resume, while steps, logits processors and allocations fail at random. At the end every page is
free or in the tree, memory has not grown, and whatever finished is bit for bit what it is alone.
"""

import argparse
import asyncio
import gc
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sglite import LLM, GenerationError, InvalidRequestError, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.soak_jobs import NUM_JOBS, Ledger, as_text, difference, draw_jobs, draw_sights
from tests.vision_checkpoints import make_vision_checkpoint

KV_TOKENS = 1024
THREADS = 3
TASKS = 4
#: What has to happen at least once; until then it goes on, for up to ten times as long as asked.
ALL_KINDS = (
    *("interrupts", "calls resumed", "tasks cancelled", "streams left early"),
    *("calls with pictures", "broken pictures"),
)
#: How much of the resident memory after the warm-up it may be more at the end.
MOST_GROWTH = 0.02


class PlantedError(RuntimeError):
    """An error that this test raises inside the engine."""


class Soak:
    """One run.

    Args:
        checkpoint: the folder of a language model.
        seeing: that of one that takes pictures; it runs beside the other.
        seconds: how long.
        seed: of all choices.
    """

    def __init__(self, checkpoint: Path, seeing: Path, seconds: float, seed: int):
        self.ledger = Ledger()
        self.memory: list[tuple[float, int]] = []
        self._checkpoint, self._seeing = checkpoint, seeing
        self._seconds = seconds
        self._seed = seed
        self._jobs = draw_jobs(random.Random(seed)) + draw_sights(random.Random(seed))
        self._end = 0.0
        self._interruptible = False

    def run(self) -> None:
        """Runs it, in the main thread, which gets the interrupts."""
        with (
            LLM(
                self._checkpoint,
                kv_cache_tokens=KV_TOKENS,
                max_running_requests=12,
                chunked_prefill_size=64,
            ) as llm,
            LLM(
                self._seeing,
                kv_cache_tokens=KV_TOKENS // 2,
                max_running_requests=3,
                chunked_prefill_size=32,
                image_cache_bytes=8192,
            ) as seeing,
        ):
            self._plant(llm, self._seed + 1)
            self._plant(seeing, self._seed + 2)
            self._end = time.monotonic() + self._seconds
            works = [(work, llm) for work in [self._call] * THREADS + [self._run_loop, self._watch]]
            works.append((self._look, seeing))
            workers = [
                threading.Thread(target=self._guarded, args=(*work, index))
                for index, work in enumerate(works)
            ]
            for worker in workers:
                worker.start()
            self._guarded(self._be_interrupted, llm, len(workers))
            for worker in workers:
                worker.join()
            self._check_books(llm)
            self._check_books(seeing)

    def _check_books(self, llm: LLM) -> None:
        """Now that all requests have ended: each page is free or in the tree, and can be freed."""
        stats, cache = llm.stats(), llm._open.engine.scheduler.cache
        if stats["running"] or stats["waiting"]:
            self.ledger.problem(f"requests are left: {stats}")
        cache.check_invariant()
        cache.clear()
        left = llm.stats()["kv_tokens_used"]
        if left:
            self.ledger.problem(f"pages of {left} tokens are used by nobody")
        self.ledger.counts["preemptions"] += stats["preemptions"]
        self.ledger.counts["tokens from the cache"] += stats["cached_tokens"]
        self.ledger.counts["tokens"] += stats["completion_tokens"]

    def compare_alone(self) -> None:
        """Runs every job that finished once more, alone, with no cache."""
        options = {"kv_cache_tokens": KV_TOKENS, "prefix_cache": False}
        with (
            LLM(self._checkpoint, **options) as llm,
            LLM(self._seeing, image_cache_bytes=0, **options) as seeing,
        ):
            for index, found in sorted(self.ledger.found.items()):
                job, own = self._jobs[index], llm if index < NUM_JOBS else seeing
                alone = as_text(own.generate(job.prompt, job.params))
                if alone != found:
                    self.ledger.problem(f"job {index}, alone: {difference(found, alone)}")
        self.ledger.counts["jobs compared"] = len(self.ledger.found)

    def growth(self) -> float:
        """How much more memory is resident at the end than after the warm-up, as a share."""
        warm = [rss for at, rss in self.memory if 0.35 < at < 0.55]
        last = [rss for at, rss in self.memory if at > 0.85]
        return sum(last) / len(last) / (sum(warm) / len(warm)) - 1

    def _plant(self, llm: LLM, seed: int) -> None:
        """Has steps and allocations fail now and then."""
        source = random.Random(seed)
        forward, cache = llm.model.forward, llm._open.engine.scheduler.cache
        allocate = cache.allocate

        def failing_forward(*arguments):
            if source.random() < 1 / 400:
                raise source.choice([PlantedError("a step"), torch.OutOfMemoryError("planted")])
            return forward(*arguments)

        def failing_allocate(count):
            if source.random() < 1 / 4000:
                raise MemoryError("planted")
            return allocate(count)

        llm.model.forward = failing_forward
        cache.allocate = failing_allocate

    def _guarded(self, work, llm: LLM, index: int) -> None:
        try:
            work(llm, random.Random(f"{self._seed} {index}"))
        except BaseException as error:
            self.ledger.problem(f"{work.__name__} ended with {type(error).__name__}: {error}")

    @property
    def _goes_on(self) -> bool:
        now = time.monotonic()
        if now < self._end:
            return True
        is_complete = all(self.ledger.counts[kind] for kind in ALL_KINDS)
        return not is_complete and now < self._end + 9 * self._seconds

    def _draw(self, source: random.Random, size: int) -> tuple[list[int], list, list]:
        return self._of(source.choices(range(NUM_JOBS), k=size))

    def _of(self, indices: list[int]) -> tuple[list[int], list, list]:
        jobs = [self._jobs[index] for index in indices]
        return indices, [job.prompt for job in jobs], [job.params for job in jobs]

    def _call(self, llm: LLM, source: random.Random) -> None:
        """A thread: batches, streams that are left early, processors that raise."""
        while self._goes_on:
            indices, prompts, params = self._draw(source, source.choice([1, 3, 10]))
            kind = source.random()
            try:
                if kind < 0.25:
                    self._read_some(llm, source, indices, prompts, params)
                elif kind < 0.35:
                    self._break_one(llm, source, indices, prompts, params)
                else:
                    self.ledger.take(
                        "generated", indices, llm.generate(prompts, params, progress=False)
                    )
            except GenerationError as error:
                self._take_failed(indices, error)

    def _look(self, llm: LLM, source: random.Random) -> None:
        """A thread: requests with pictures, one of them broken now and then."""
        sights = range(NUM_JOBS, len(self._jobs))
        while self._goes_on:
            indices, prompts, params = self._of(source.choices(sights, k=source.choice([1, 1, 3])))
            kind = source.random()
            try:
                if kind < 0.1:
                    broken = {"text": "<image>", "images": [b"no picture"]}
                    llm.generate([*prompts, broken], progress=False)
                    self.ledger.problem("a broken picture went unnoticed")
                elif kind < 0.3:
                    self._read_some(llm, source, indices, prompts, params)
                else:
                    self.ledger.take(
                        "generated", indices, llm.generate(prompts, params, progress=False)
                    )
                    self.ledger.counts["calls with pictures"] += 1
            except InvalidRequestError:
                self.ledger.counts["broken pictures"] += 1
            except GenerationError as error:
                self._take_failed(indices, error)
            time.sleep(0.05)  # most of the time is the others'

    def _read_some(self, llm, source, indices, prompts, params) -> None:
        wanted, finished = source.choice([1, 5, 20, 10**9]), {}
        stream = llm.stream(prompts, params)
        for number, chunk in enumerate(stream):
            if chunk.output is not None:
                finished[chunk.index] = chunk.output
            if number == wanted:
                self.ledger.counts["streams left early"] += 1
                break
        stream.close()
        self.ledger.take(
            "streamed", [indices[index] for index in finished], list(finished.values())
        )

    def _break_one(self, llm, source, indices, prompts, params) -> None:
        last = source.randint(0, 5)

        def broken(token_ids, logits):
            if len(token_ids) >= last:
                raise PlantedError("a processor")
            return logits

        params[0] = SamplingParams(max_new_tokens=10, ignore_eos=True, logits_processors=[broken])
        llm.generate(prompts, params, progress=False)
        self.ledger.problem("a processor that raises went unnoticed")

    def _take_failed(self, indices: Sequence[int], error: GenerationError) -> None:
        """Only planted errors may have happened; what finished beside them counts."""
        self.ledger.counts["calls that failed"] += 1
        good = []
        for index, output in zip(indices, error.outputs, strict=True):
            if output.error is None:
                good.append((index, output))
                continue
            cause = output.error
            while cause is not None and not isinstance(
                cause, PlantedError | MemoryError | RuntimeError
            ):
                cause = cause.__cause__
            if cause is None or "planted" not in f"{cause!r}".lower():
                self.ledger.problem(f"an error that nobody planted: {output.error!r}")
        self.ledger.take(
            "beside a failure", [index for index, _ in good], [output for _, output in good]
        )

    def _run_loop(self, llm: LLM, source: random.Random) -> None:
        """A thread with an event loop: tasks that await, stream, and are cancelled."""

        async def work():
            while self._goes_on:
                indices, prompts, params = self._draw(source, source.choice([1, 4]))
                try:
                    if source.random() < 0.3:
                        limit = source.random() * 0.1
                        async with asyncio.timeout(limit):
                            outputs = await llm.agenerate(prompts, params)
                    elif source.random() < 0.5:
                        outputs = [None] * len(prompts)
                        async for chunk in llm.astream(prompts, params):
                            if chunk.output is not None:
                                outputs[chunk.index] = chunk.output
                    else:
                        outputs = await llm.agenerate(prompts, params)
                    self.ledger.take("awaited", indices, outputs)
                except TimeoutError:
                    self.ledger.counts["tasks cancelled"] += 1
                except GenerationError as error:
                    self._take_failed(indices, error)

        async def main():
            await asyncio.gather(*[work() for _ in range(TASKS)])

        asyncio.run(main())

    def _be_interrupted(self, llm: LLM, source: random.Random) -> None:
        """The main thread: SIGINT in the middle of calls, most of which are resumed."""
        while self._goes_on:
            indices, prompts, params = self._draw(source, 4)
            timer = threading.Timer(source.random() * 0.1, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            outputs = None
            try:
                self._interruptible = True
                outputs = llm.generate(prompts, params, progress=False)
                self._interruptible = False
            except KeyboardInterrupt:
                self.ledger.counts["interrupts"] += 1
            except GenerationError as error:
                self._interruptible = False
                self._take_failed(indices, error)
                continue
            finally:
                timer.cancel()
                timer.join()
            try:
                if outputs is None and self._was_interrupted(llm, prompts):
                    outputs = llm.resume(progress=False)
                    self.ledger.counts["calls resumed"] += 1
                self.ledger.take("maybe resumed", indices if outputs else [], outputs or [])
            except GenerationError as error:
                self._take_failed(indices, error)

    def on_signal(self, number: int, frame: object) -> None:
        """Raises KeyboardInterrupt, but not in this test's own lines."""
        if self._interruptible:
            self._interruptible = False
            raise KeyboardInterrupt

    @staticmethod
    def _was_interrupted(llm: LLM, prompts: list) -> bool:
        """Whether it is this call that may be resumed: the signal may have come before it began."""
        so_far = llm.interrupted
        return isinstance(so_far, list) and [out.prompt_token_ids for out in so_far] == prompts

    def _watch(self, llm: LLM, source: random.Random) -> None:
        """A thread: looks at the memory."""
        process, start = psutil.Process(), time.monotonic()
        while self._goes_on:
            time.sleep(min(1.0, self._seconds / 50))
            gc.collect()
            share = (time.monotonic() - start) / self._seconds
            self.memory.append((share, process.memory_info().rss))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most-growth", type=float, default=MOST_GROWTH)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        checkpoint = make_checkpoint(Path(name) / "model", "llama", dtype=torch.bfloat16)
        seeing = make_vision_checkpoint(Path(name) / "seeing")
        soak = Soak(checkpoint, seeing, arguments.minutes * 60, arguments.seed)
        signal.signal(signal.SIGINT, soak.on_signal)
        soak.run()
        soak.compare_alone()
    growth, problems = soak.growth(), soak.ledger.problems
    for what, count in sorted(soak.ledger.counts.items(), key=str):
        print(f"{what}: {count}")
    print(
        f"resident memory at the end: {soak.memory[-1][1] >> 20} MiB, {growth:+.2%} since warm-up"
    )
    if growth > arguments.most_growth:
        problems.append(f"memory has grown by {growth:.2%}")
    for what in ALL_KINDS:
        if not soak.ledger.counts[what]:
            problems.append(f"{what}: there were none")
    print("\n".join(problems) or "all is as it was")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
