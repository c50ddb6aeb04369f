"""Where the time of a step goes: timers around the engine's parts and every op.

Each part is charged the time that none of the parts called from within it took, so that the parts
add up to the step. Ops are told apart by the weight that they are given, where they have one.
"""

import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sglite import _C, LLM
from sglite.layers import DecoderLayer
from sglite.layers.weight import WeightModule

# Functions of the extension that do none of the work of a step, but are asked for sizes.
_ASKED = ("linear_workspace", "sampling_workspace_bytes", "attention_is_planned", "linear_takes")
_ASKED += ("linear_quantized_workspace", "is_unchanged")
_OPS = (
    *("embedding_packed", "embedding_plain", "rms_norm", "linear_packed", "linear_plain"),
    *("embedding_quantized", "linear_quantized"),
    *(
        "linear_fused",
        "decoder_layers",
        "apply_rope",
        "rope_and_write_kv",
        "write_kv",
        "copy_kv_slots",
    ),
    *("paged_attention", "silu_and_mul", "gelu_and_mul", "sample", "log_probs", "gather_tokens"),
    "advance",
)

# A table of angles has more rows than any activation of a decode step.
_LONG = 4096


@dataclass
class Part:
    """What one part of a step took.

    Attributes:
        seconds: without the parts called from it.
        busy_seconds: of them, those in which the calling thread had a processor.
        calls: how often it was called.
        bytes: read and written, as far as its tensors say.
        operations: floating-point operations of products.
    """

    seconds: float = 0.0
    busy_seconds: float = 0.0
    calls: int = 0
    bytes: float = 0.0
    operations: float = 0.0


@dataclass
class StepRecord:
    """One step of the engine.

    Attributes:
        rows: requests, all of which decode.
        seconds: from beginning to end.
        ops: by stage.
        host: by part of the engine.
        questions: calls of the extension that only ask for a size.
        own: what the recorder itself took, no part of the rest.
    """

    rows: int = 0
    seconds: float = 0.0
    ops: dict[str, Part] = field(default_factory=lambda: defaultdict(Part))
    host: dict[str, Part] = field(default_factory=lambda: defaultdict(Part))
    questions: int = 0
    own: Part = field(default_factory=Part)


class StepRecorder:
    """Records the steps of an LLM on the CPU that hold nothing but decoding requests.

    Args:
        llm: what to watch; it must be idle.
        by_stage: whether the ops of a layer are called one by one, to be seen apart.
    """

    def __init__(self, llm: LLM, *, by_stage: bool = False):
        self._engine = llm._open.engine
        self._by_stage = by_stage
        # By the address of what is stored: a weight's name and number of elements.
        self._weights: dict[int, tuple[str, int]] = {}
        for path, module in self._engine.runner.model.named_modules():
            if isinstance(module, WeightModule):
                stored = module.matrix.stored.arguments[0]
                name = path.rpartition(".")[2]
                self._weights[stored.data_ptr()] = (name, math.prod(module.matrix.shape))
        layers = self._engine.runner.pool.layers
        self._caches = {cache.data_ptr() for layer in layers for cache in layer}
        self._record = StepRecord()
        self._children: list[list[float]] = []

    @contextmanager
    def recording(self) -> Iterator[list[StepRecord]]:
        """Steps that run within the block are added to the list, each as it ends."""
        records: list[StepRecord] = []
        engine, runner = self._engine, self._engine.runner
        undo = [
            _replace(engine.scheduler, "schedule", self._host("schedule")),
            _replace(engine.scheduler, "commit", self._host("commit")),
            _replace(runner, "launch", self._host("assemble")),
            _replace(runner.model, "forward", self._host("calling the ops")),
            _replace(runner.sampler, "draw", self._host("sample")),
            _replace(engine, "step", lambda call: self._step(call, records)),
        ]
        undo += [_replace(_C, name, self._op) for name in _OPS if hasattr(_C, name)]
        undo += [_replace(_C, name, self._question) for name in _ASKED if hasattr(_C, name)]
        if self._by_stage:
            # What somebody listens to runs by itself.
            for module in runner.model.modules():
                if isinstance(module, DecoderLayer):
                    undo.append(module.mlp.act_fn.register_forward_hook(lambda *call: None).remove)
        try:
            yield records
        finally:
            for restore in undo:
                restore()

    def _step(self, call: Callable, records: list[StepRecord]) -> Callable:
        def step() -> None:
            self._record = record = StepRecord()
            running = self._engine.scheduler.running
            decodes = bool(running) and all(request.num_pending == 1 for request in running)
            rows = len(running)
            start = time.perf_counter()
            self._timed(record.host["rest"], call)
            seconds = time.perf_counter() - start
            if decodes and not self._engine.scheduler.waiting:
                record.rows, record.seconds = rows, seconds - record.own.seconds
                records.append(record)

        return step

    def _host(self, name: str) -> Callable[[Callable], Callable]:
        def wrap(call: Callable) -> Callable:
            return lambda *args, **options: self._timed(
                self._record.host[name], call, *args, **options
            )

        return wrap

    def _op(self, call: Callable) -> Callable:
        name = call.__name__

        def op(*args: Any) -> None:
            # What describing takes is no part of the step.
            described = self._timed(self._record.own, self._describe, name, args)
            stage, num_bytes, operations = described
            part = self._record.ops[stage]
            self._timed(part, call, *args)
            part.bytes += num_bytes
            part.operations += operations

        return op

    def _question(self, call: Callable) -> Callable:
        def question(*args: Any) -> Any:
            self._record.questions += 1
            return call(*args)

        return question

    def _timed(self, part: Part, call: Callable, *args: Any, **options: Any) -> Any:
        self._children.append([0.0, 0.0])
        start, busy_start = time.perf_counter(), time.thread_time()
        try:
            return call(*args, **options)
        finally:
            busy = time.thread_time() - busy_start
            seconds = time.perf_counter() - start
            seconds_within, busy_within = self._children.pop()
            part.seconds += seconds - seconds_within
            part.busy_seconds += busy - busy_within
            part.calls += 1
            if self._children:
                self._children[-1][0] += seconds
                self._children[-1][1] += busy

    def _describe(self, name: str, args: tuple) -> tuple[str, float, float]:
        """The stage of an op, its bytes and its operations, from its arguments."""
        tensors = [arg for arg in _flat(args) if isinstance(arg, Tensor)]
        if name.startswith("embedding"):
            return "embedding", 2.0 * tensors[0].nbytes, 0.0
        if name == "paged_attention":
            out, _, k_cache = tensors[:3]
            seen = int(tensors[6].sum())
            per_token = k_cache[0, 0].nbytes
            operations = 4.0 * out.shape[1] * out.shape[2] * seen
            return "attention", 2.0 * out.nbytes + 2.0 * per_token * seen, operations
        if name == "sample":
            return name, float(tensors[2].nbytes), 0.0
        stage, operations, num_bytes = name, 0.0, 0.0
        if name == "decoder_layers":
            # Their attention.
            x, batch, layers = args[1:4]
            seen = int(batch.kv_lens.sum())
            for parts, _, k_cache, _ in layers:
                num_bytes += 2.0 * k_cache[0, 0].nbytes * seen
                _, elements = self._weights[parts.output.weight[0].data_ptr()]
                operations += 4.0 * elements / x.shape[1] * seen
        for tensor in tensors:
            address = tensor.data_ptr()
            # Of the caches and of the table of angles a step touches next to nothing.
            is_weight = address in self._weights
            if address in self._caches or (len(tensor) >= _LONG and not is_weight):
                continue
            num_bytes += tensor.nbytes
            if is_weight:
                weight_name, elements = self._weights[address]
                stage = weight_name if name != "decoder_layers" else name
                operations += 2.0 * tensors[0].shape[0] * elements
        return stage, num_bytes, operations


def _replace(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> Callable[[], None]:
    """Puts a wrapper in an attribute's place; gives what undoes it."""
    own = name in vars(owner)
    call = getattr(owner, name)
    setattr(owner, name, functools.wraps(call)(wrap(call)))
    return (lambda: setattr(owner, name, call)) if own else (lambda: delattr(owner, name))


def _flat(args: tuple) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, tuple | list):
            yield from _flat(tuple(arg))
        else:
            yield arg
