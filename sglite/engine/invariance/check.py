"""Computes prompts in many ways, and compares the logits bit for bit."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from types import MappingProxyType

import torch

from sglite.engine.device import EngineThread
from sglite.engine.driver import Driver
from sglite.engine.engine import Engine
from sglite.engine.invariance.plans import TAIL, Plan, Planner, Settings, Span, alone
from sglite.engine.invariance.recording import (
    Comparison,
    LogitsRecorder,
    Recorders,
    RecordingRunner,
    Reference,
)
from sglite.engine.invariance.report import Condition, InvarianceReport
from sglite.engine.progress import ProgressBar
from sglite.engine.request import Request
from sglite.engine.waiting import Call
from sglite.interface.config import EngineConfig
from sglite.interface.sampling_params import SamplingParams


def check_invariance(
    make_engine: Callable[..., Engine],
    config: EngineConfig,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    *,
    progress: bool,
) -> InvarianceReport:
    """Computes the prompts alone and in other ways, on engines of their own over the same model.

    The engines have the configuration's settings but for what a condition changes, and a KV cache
    of their own that is just large enough; nothing of another engine is touched.

    Args:
        make_engine: `make_engine(config, runner=...)` gives an engine over the model.
        config: of the LLM.
        prompts: token ids. Each has room for `settings.new_tokens + TAIL` more in the context.
        settings: what to vary.
        progress: whether a bar is shown.

    Raises:
        RequestError: a request failed; logits that are NaN when a prompt is computed alone, say.
    """
    check = _Check(make_engine, config, prompts, settings)
    conditions = [check.start()]
    planner = Planner(check.texts, settings, config)
    plans = list(planner.plans())
    for plan in ProgressBar(plans, unit="condition") if progress else plans:
        conditions.append(check.run(plan))
    return InvarianceReport(
        f"{config.model} ({config.architecture}, {config.dtype}, {config.device})",
        config.batch_invariant,
        conditions,
    )


class _Check:
    """Runs plans one after the other against one reference.

    Attributes:
        texts: the prompts, and after `start` what each generated and a tail.
    """

    def __init__(
        self,
        make_engine: Callable[..., Engine],
        config: EngineConfig,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
    ):
        self.texts = [list(token_ids) for token_ids in prompts]
        self._make_engine = make_engine
        self._config = config
        self._settings = settings
        self._reference = Reference()

    def start(self) -> Condition:
        """Computes each prompt alone, which makes the reference."""
        plan = alone(self.texts, self._settings)
        comparison = Comparison(plan.name, self._reference, keeps=True)
        _, batches = self._compute(plan, comparison)
        for text, (request,) in zip(self.texts, batches, strict=True):
            tail = [text[-1 - i % len(text)] for i in range(TAIL)]
            text += [*request.output_token_ids, *tail]
        return comparison.result("the reference", True)

    def run(self, plan: Plan) -> Condition:
        """What the plan's logits have in common with the reference."""
        comparison = Comparison(plan.name, self._reference, keeps=plan.is_reference)
        if plan.impossible:
            return comparison.result(plan.impossible, False)
        engine, batches = self._compute(plan, comparison)
        return comparison.result(*_evidence(plan, engine, batches))

    def _compute(self, plan: Plan, comparison: Comparison) -> tuple[Engine, list[list[Request]]]:
        recorders: dict[Request, LogitsRecorder] = {}
        batches = [
            [self._request(span, comparison, recorders) for span in spans] for spans in plan.batches
        ]
        config = self._engine_config(plan)
        return compute(self._make_engine, config, batches, recorders), batches

    def _engine_config(self, plan: Plan) -> EngineConfig:
        page_size = self._config.page_size
        of_batches = [sum(span.num_pages(page_size) for span in spans) for spans in plan.batches]
        # Without a prefix cache nothing is left of a batch when the next one begins.
        pages = plan.num_pages or (sum if plan.prefix_cache else max)(of_batches)
        return dataclasses.replace(
            self._config,
            kv_cache_tokens=pages * page_size,
            max_running_requests=plan.running or max(len(spans) for spans in plan.batches),
            chunked_prefill_size=plan.chunk or self._config.chunked_prefill_size,
            prefix_cache=plan.prefix_cache,
            num_threads=plan.num_threads or self._config.num_threads,
        )

    def _request(
        self, span: Span, comparison: Comparison, recorders: dict[Request, LogitsRecorder]
    ) -> Request:
        """A request that is recorded: by its logits processor, or, if it is plain, `recorders`."""
        text = self.texts[span.prompt]
        forced = text[span.num_prompt : span.num_prompt + span.num_new]
        recorder = LogitsRecorder(
            comparison,
            span.prompt,
            span.num_prompt,
            forced if len(forced) == span.num_new else None,
        )
        first = max(span.cached + 1, span.num_prompt - self._settings.prompt_logits)
        asked = {
            "prompt_logprobs": 0,
            "prompt_logprobs_start": first,
            "logits_processors": [recorder],
        }
        params = SamplingParams(
            temperature=0,
            max_new_tokens=span.num_new,
            ignore_eos=True,
            **({} if span.is_plain else asked),
        )
        request = Request(text[: span.num_prompt], params.resolve())
        if span.is_plain:
            recorders[request] = recorder
        return request


def compute(
    make_engine: Callable[..., Engine],
    config: EngineConfig,
    batches: Sequence[Sequence[Request]],
    recorders: Recorders = MappingProxyType({}),
) -> Engine:
    """Computes batches one after the other on an engine of their own; gives it, closed.

    Args:
        make_engine: as in `check_invariance`.
        config: of the engine.
        batches: of requests; the one logits processor of each is a `LogitsRecorder`.
        recorders: of those requests that have no logits processor instead.

    Raises:
        RequestError: a request failed.
    """
    engine = make_engine(config, runner=partial(RecordingRunner, recorders=recorders))
    thread = EngineThread(torch.device(config.device), config.num_threads)
    driver = Driver(engine, thread)
    try:
        for requests in batches:
            _wait_for(driver, Call(requests))
    finally:
        driver.close()
        engine.close()
        thread.close()
    return engine


def _wait_for(driver: Driver, call: Call) -> None:
    try:
        driver.submit(call)
        seen = 0
        while not call.is_finished:
            seen = driver.wait(call, seen)
    except BaseException:
        driver.abort(call)
        raise
    for request in call.requests:
        if request.error is not None:
            raise request.error


def _evidence(plan: Plan, engine: Engine, batches: Sequence[Sequence[Request]]) -> tuple[str, bool]:
    """What shows that the condition was met, or else why it was not; and whether it was."""
    notes, is_met = [], True
    if plan.preempts:
        count = engine.scheduler.statistics.preemptions
        notes.append(f"{count} preemptions")
        is_met &= count > 0
    if any(span.is_plain for spans in plan.batches for span in spans):
        count = engine.runner.num_kept_steps
        notes.append(f"{count} steps of a kept batch")
        # A GPU runs the same steps for all requests; but these ones it launches ahead.
        is_met &= count > 0 or engine.runner.runs_ahead
    pairs = [
        (span.cached, request.num_cached_tokens)
        for spans, requests in zip(plan.batches, batches, strict=True)
        for span, request in zip(spans, requests, strict=True)
        if span.cached
    ]
    if pairs:
        wanted, found = (sum(column) for column in zip(*pairs, strict=True))
        # Prompts with a common start may find more than was put there for them.
        has_all = all(cached >= expected for expected, cached in pairs)
        notes.append(f"{found:,} tokens cached" if has_all else f"{found:,} of {wanted:,} cached")
        is_met &= has_all
    return ", ".join(notes), is_met
