"""Computes prompts in many ways, and compares the logits bit for bit."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from sglite.engine.device import EngineThread
from sglite.engine.driver import Driver
from sglite.engine.engine import Engine
from sglite.engine.invariance.plans import TAIL, Plan, Planner, Settings, Span, alone
from sglite.engine.invariance.recording import Comparison, Recorder, RecordingRunner, Reference
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
            return comparison.result(f"not met: {plan.impossible}", False)
        engine, batches = self._compute(plan, comparison)
        return comparison.result(*_evidence(plan, engine, batches))

    def _compute(self, plan: Plan, comparison: Comparison) -> tuple[Engine, list[list[Request]]]:
        batches = [[self._request(span, comparison) for span in spans] for spans in plan.batches]
        return compute(self._make_engine, self._engine_config(plan), batches), batches

    def _engine_config(self, plan: Plan) -> EngineConfig:
        page_size = self._config.page_size
        pages = plan.num_pages or sum(
            span.num_pages(page_size) for spans in plan.batches for span in spans
        )
        return dataclasses.replace(
            self._config,
            kv_cache_tokens=pages * page_size,
            max_running_requests=max(len(spans) for spans in plan.batches),
            chunked_prefill_size=plan.chunk or self._config.chunked_prefill_size,
            prefix_cache=plan.prefix_cache,
            num_threads=plan.num_threads or self._config.num_threads,
        )

    def _request(self, span: Span, comparison: Comparison) -> Request:
        text = self.texts[span.prompt]
        forced = text[span.num_prompt : span.num_prompt + span.num_new]
        recorder = Recorder(
            comparison,
            span.prompt,
            span.num_prompt,
            forced if len(forced) == span.num_new else None,
        )
        params = SamplingParams(
            temperature=0,
            max_new_tokens=span.num_new,
            ignore_eos=True,
            prompt_logprobs=0,
            prompt_logprobs_start=max(
                span.cached + 1, span.num_prompt - self._settings.prompt_logits
            ),
            logits_processors=[recorder],
        )
        return Request(text[: span.num_prompt], params.resolve())


def compute(
    make_engine: Callable[..., Engine], config: EngineConfig, batches: Sequence[Sequence[Request]]
) -> Engine:
    """Computes batches one after the other on an engine of their own; gives it, closed.

    Args:
        make_engine: as in `check_invariance`.
        config: of the engine.
        batches: of requests whose one logits processor is a `Recorder`.

    Raises:
        RequestError: a request failed.
    """
    engine = make_engine(config, runner=RecordingRunner)
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
    """What shows that the condition was met, and whether it was."""
    if plan.preempts:
        count = engine.scheduler.statistics.preemptions
        return f"{count} preemptions", count > 0
    pairs = [
        (span.cached, request.num_cached_tokens)
        for spans, requests in zip(plan.batches, batches, strict=True)
        for span, request in zip(spans, requests, strict=True)
        if span.cached
    ]
    if not pairs:
        return "", True
    wanted, found = (sum(column) for column in zip(*pairs, strict=True))
    # Prompts with a common start may find more than was put there for them.
    if all(cached >= expected for expected, cached in pairs):
        return f"{found:,} tokens cached", True
    return f"not met: {found:,} of {wanted:,} tokens cached", False
