"""The calls of an `LLM`: requests made and handed over, waited for, interrupted, resumed."""

import asyncio
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from sglite.engine.driver import Driver
from sglite.engine.failures import detach
from sglite.engine.intake import Intake
from sglite.engine.progress import ProgressBar, someone_is_watching
from sglite.engine.results import RequestGroup
from sglite.engine.waiting import PATIENCE, Call, TaskCall
from sglite.interface.errors import (
    EngineClosedError,
    GenerationError,
    InvalidRequestError,
    SGLiteError,
)
from sglite.interface.outputs import RequestOutput, StreamChunk
from sglite.interface.prompts import Prompt
from sglite.interface.sampling_params import SamplingParams, broadcast_sampling_params

# Characters or ids of text that are made into requests in a few milliseconds.
_QUICKLY_READ = 8192
# Of pixels that a call has ready before it is their turn; those of further prompts are made then.
_MOST_PIXEL_BYTES = 1 << 30


@dataclass(frozen=True)
class Asked:
    """What one call asks for, its parameters checked and its prompts not yet read.

    Attributes:
        prompts: what to generate from.
        params: one for each prompt.
        seeds: likewise; drawn here, so that they do not depend on which call is read first.
        is_single: whether the caller gave a prompt, and not a list of them.
        streams: whether text is to be kept token by token.
        called_at: when the call began, by `time.perf_counter`.
    """

    prompts: Sequence[Prompt]
    params: Sequence[SamplingParams]
    seeds: Sequence[int]
    is_single: bool
    streams: bool
    called_at: float

    @property
    def takes_long(self) -> bool:
        """Whether reading the prompts would keep an event loop waiting."""
        if any(prompt.images or prompt.videos for prompt in self.prompts):
            return True
        sizes = (len(prompt.token_ids or prompt.text or "") for prompt in self.prompts)
        return sum(sizes) > _QUICKLY_READ


@dataclass(frozen=True)
class Work:
    """What one call asks for.

    Attributes:
        groups: one for each prompt.
        is_single: whether the caller gave a prompt, and not a list of them.
    """

    groups: list[RequestGroup]
    is_single: bool

    def call(self, kind: type[Call] = Call, *, every_token: bool = False) -> Call:
        """Its unfinished requests, to be submitted."""
        requests = [request for group in self.groups for request in group.requests]
        unfinished = [request for request in requests if not request.is_finished]
        return kind(unfinished, every_token=every_token)

    def outputs(self) -> RequestOutput | list[RequestOutput]:
        """What there is so far, in the shape in which it was asked for."""
        outputs = [group.output() for group in self.groups]
        return outputs[0] if self.is_single else outputs

    def results(self, call: Call) -> RequestOutput | list[RequestOutput]:
        """The outputs; raises what became of a call whose requests did not all run to their end."""
        outputs = [group.output() for group in self.groups]
        if any(output.error for output in outputs):
            raise GenerationError(outputs)
        completions = (completion for output in outputs for completion in output.outputs)
        if any(completion.finish_reason == "abort" for completion in completions):
            raise EngineClosedError(f"{call.ended_as} while the call was running")
        return outputs[0] if self.is_single else outputs


class _OfThread(threading.local):
    """What belongs to one thread.

    Attributes:
        interrupted: its last call that ended early, with what it was to give.
        mark: an object that no other thread has; unlike a thread's number never given again.
    """

    def __init__(self):
        self.interrupted: tuple[Call, Work] | None = None
        self.mark = object()


class Calls:
    """Makes requests, has the driver run them, and waits, in threads and in event loops.

    Args:
        intake: makes the requests.
        driver: runs them.
    """

    def __init__(self, intake: Intake, driver: Driver):
        self._intake = intake
        self._driver = driver
        self._of_this_thread = _OfThread()

    def ask(
        self,
        prompts: Sequence[Prompt],
        is_single: bool,
        sampling_params: SamplingParams | Mapping | Sequence | None,
        keywords: Mapping[str, Any],
        *,
        streams: bool = False,
        called_at: float | None = None,
    ) -> Asked:
        """Checks the parameters of a call.

        Args:
            prompts: what to generate from.
            is_single: whether the caller gave one prompt that is no list.
            sampling_params, keywords: as `LLM.generate` takes them.
            streams: whether text is to be kept token by token.
            called_at: when the call began, by `time.perf_counter`; None: now.

        Raises:
            InvalidRequestError: a parameter is wrong.
        """
        if called_at is None:
            called_at = time.perf_counter()
        params = broadcast_sampling_params(sampling_params, len(prompts), **keywords)
        seeds = [self._intake.seed_for(one) for one in params]
        return Asked(prompts, params, seeds, is_single, streams, called_at)

    def read(self, asked: Asked) -> Work:
        """Makes the requests of a call: tokens of texts, and pixels of pictures.

        Raises:
            InvalidRequestError: a prompt is wrong, or does not fit its parameters.
        """
        names = ["the prompt"]
        if len(asked.prompts) != 1:
            names = [f"prompts[{index}]" for index in range(len(asked.prompts))]
        groups = []
        room = _MOST_PIXEL_BYTES
        given = zip(names, asked.prompts, asked.params, asked.seeds, strict=True)
        for index, (name, prompt, params, seed) in enumerate(given):
            group = self._intake.make_group(
                index, name, prompt, params, seed, streams=asked.streams, called_at=asked.called_at
            )
            room -= group.num_pixel_bytes
            if room < 0:
                group.release_pixels()
            groups.append(group)
        return Work(groups, asked.is_single)

    async def read_in_loop(self, asked: Asked) -> Work:
        """`read` for a task of an event loop, on a thread where it takes long.

        A task that is cancelled meanwhile leaves nothing: what the thread then makes is in no
        engine.
        """
        if not asked.takes_long:
            return self.read(asked)
        context = contextvars.copy_context()  # in which the caller's own code may look
        loop = asyncio.get_running_loop()
        work, error = await loop.run_in_executor(None, context.run, _tried, self.read, asked)
        if error is not None:
            raise error
        return work

    def prepare(self, *arguments: Any, **keywords: Any) -> Work:
        """`ask` and `read` in one."""
        return self.read(self.ask(*arguments, **keywords))

    def run(self, work: Work, progress: bool | None) -> RequestOutput | list[RequestOutput]:
        """Runs a call to its end, in a thread that waits.

        Args:
            work: what `prepare` made.
            progress: whether a bar is shown; None: for a batch, when someone is watching.

        Raises:
            GenerationError: a request failed.
            EngineClosedError: the driver is closed, or was while the call was running.
        """
        if not work.groups:
            return []
        call = work.call()
        try:
            self._driver.submit(call)
            self._wait(call, work.groups, progress)
            return work.results(call)
        except BaseException as error:
            self._end_early(call, work, error)
            raise

    def stream(self, work: Work) -> Iterator[StreamChunk]:
        """Runs a call, handing out the text in pieces; raises as `run`."""
        if not work.groups:
            return
        call = work.call(every_token=True)
        seen, is_last, all_is_read = 0, False, False
        reader = self._of_this_thread.mark
        try:
            self._driver.submit(call)
            while not is_last:
                seen = self._driver.wait(call, seen)
                reader = self._of_this_thread.mark
                is_last = call.is_finished  # read before the chunks, which then hold everything
                chunks = [chunk for group in work.groups for chunk in group.chunks()]
                for number, chunk in enumerate(chunks, 1):
                    all_is_read = is_last and number == len(chunks)
                    yield chunk
            work.results(call)
        except GeneratorExit:  # the reader has left, maybe after the last piece
            call.request_abort()
            # Another thread than the reader's is the collector's, and concerned in no way.
            if reader is self._of_this_thread.mark:
                if call.is_submitted and not all_is_read:
                    self._of_this_thread.interrupted = call, work
                self._driver.abort(call, PATIENCE)
            raise
        except BaseException as error:
            self._end_early(call, work, error)
            raise

    async def run_in_loop(self, work: Work) -> RequestOutput | list[RequestOutput]:
        """`run`, awaited by a task of an event loop; cancelling the task ends the requests."""
        if not work.groups:
            return []
        call = work.call(TaskCall)
        seen = 0
        try:
            self._driver.submit(call)
            while not call.is_finished:
                seen = await call.wait_in_loop(seen)
        finally:
            call.request_abort()  # without waiting for it, as nothing else would run meanwhile
        return work.results(call)

    async def stream_in_loop(self, work: Work) -> AsyncIterator[StreamChunk]:
        """`stream`, for a task of an event loop."""
        if not work.groups:
            return
        call = work.call(TaskCall, every_token=True)
        seen, is_last = 0, False
        try:
            self._driver.submit(call)
            while not is_last:
                seen = await call.wait_in_loop(seen)
                is_last = call.is_finished
                for group in work.groups:
                    for chunk in group.chunks():
                        yield chunk
        finally:
            call.request_abort()
        work.results(call)

    @property
    def interrupted(self) -> RequestOutput | list[RequestOutput] | None:
        """What this thread's call that ended early last had generated; None if there is none."""
        interrupted = self._of_this_thread.interrupted
        if interrupted is None:
            return None
        call, work = interrupted
        self._driver.abort(call)  # what was left early may still be under way
        return work.outputs()

    def resume(self, progress: bool | None) -> RequestOutput | list[RequestOutput]:
        """Carries on with that call; raises as `run`.

        Raises:
            InvalidRequestError: no call was interrupted.
        """
        interrupted = self._of_this_thread.interrupted
        if interrupted is None:
            raise InvalidRequestError("there is nothing to resume: no call was interrupted")
        call, work = interrupted
        self._driver.abort(call)  # a second interrupt may have come before this was through
        continue_group = self._intake.continue_group  # see `prepare`
        again = Work([continue_group(group) for group in work.groups], work.is_single)
        try:
            outputs = self.run(again, progress)
        except SGLiteError:
            self._forget(interrupted)
            raise
        # After an interrupt its own stands here, or this one still where there was nothing new.
        self._forget(interrupted)
        return outputs

    def _forget(self, interrupted: tuple[Call, Work]) -> None:
        if self._of_this_thread.interrupted is interrupted:
            self._of_this_thread.interrupted = None

    def _end_early(self, call: Call, work: Work, error: BaseException) -> None:
        """Ends a call that an exception has left; keeps what it has if there is more to come."""
        if call.is_submitted and not isinstance(error, SGLiteError):
            self._of_this_thread.interrupted = call, work
        self._driver.abort(call)

    def _wait(self, call: Call, groups: Sequence[RequestGroup], progress: bool | None) -> None:
        if progress is None:
            progress = len(groups) > 1 and someone_is_watching()
        seen = 0
        with ProgressBar(total=len(groups), unit="prompt") if progress else nullcontext() as bar:
            while not call.is_finished:
                seen = self._driver.wait(call, seen)
                if bar is not None:
                    bar.update(sum(group.is_finished for group in groups) - bar.n)


def _tried(
    function: Callable[[Asked], Work], asked: Asked
) -> tuple[Work | None, BaseException | None]:
    """What the function gives, or what it raises, which is then a text without frames.

    The frames of a pool's thread are asyncio's, and hold what the thread was given: the engine.
    """
    try:
        return function(asked), None
    except BaseException as error:
        return None, detach(error)
