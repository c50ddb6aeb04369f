"""What goes into the modules of a model and what comes out, by hooks."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sglite.layers.weight import WeightModule


@dataclass(slots=True)
class Record:
    """One module's tensors over all calls, in the order of the tokens.

    Attributes:
        path: of the module.
        module: itself.
        inputs: those that have a row for each token, [T, width] float32 on the CPU.
        outputs: likewise.
        is_repeated: whether it was called more than once for the same tokens, so that there is no
            saying which row is whose.
    """

    path: str
    module: nn.Module
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    is_repeated: bool = False

    @property
    def has_weights(self) -> bool:
        """Whether the module has weights of its own, beside those of its parts."""
        if isinstance(self.module, WeightModule):
            return True
        return any(weight is not None for weight in self.module._parameters.values())

    def add(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Takes one call more; tensors are matched by their place."""
        self.inputs = _appended(self.inputs, inputs)
        self.outputs = _appended(self.outputs, outputs)


class ModuleRecorder:
    """Records modules while it is attached.

    A module that is known by several paths (rotary positions, mostly shared by all layers) is told
    apart by the module that calls it.

    Attributes:
        records: by path, in the order in which the modules came to an end for the first time.
        attentions: of a Hugging Face model, by the path of the module that calls the attention
            function: queries, keys and values as inputs, and what the function gives.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]):
        self.records: dict[str, Record] = {}
        self.attentions: dict[str, Record] = {}
        self._model = model
        self._paths: dict[nn.Module, list[str]] = {}
        self._wanted = set(paths)
        everywhere: dict[nn.Module, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            everywhere.setdefault(module, []).append(path)
            if path in self._wanted:
                self._paths[module] = everywhere[module]
        self._active: list[tuple[str | None, list[Tensor]]] = []
        self._called: set[str] = set()
        self._num_tokens = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listens to the modules, and to the attention functions of Hugging Face classes."""
        with ExitStack() as stack:
            handle = self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(handle.remove)
            for module in self._paths:
                handle = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(module.register_forward_hook(self._leave, with_kwargs=True).remove)
            for namespace in _namespaces(self._paths):
                original = namespace["eager_attention_forward"]
                namespace["eager_attention_forward"] = self._listening(original)
                stack.callback(namespace.__setitem__, "eager_attention_forward", original)
            yield

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._num_tokens = ids.numel()
        self._active.clear()
        self._called.clear()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # Copies, since residuals and rotations change what they were given.
        inputs = self._rows([*args, *kwargs.values()])
        self._active.append((self._path_of(module), inputs))

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        path, inputs = self._active.pop()
        if path is not None:
            record = self.records.setdefault(path, Record(path, module))
            record.is_repeated |= path in self._called
            self._called.add(path)
            record.add(inputs, self._rows(_output_tensors(output)))

    def _path_of(self, module: nn.Module) -> str | None:
        paths = self._paths[module]
        if len(paths) == 1:
            return paths[0]
        caller = next((path for path, _ in reversed(self._active) if path), None)
        found = next((path for path in paths if path.rpartition(".")[0] == caller), None)
        return found if found in self._wanted else None

    def _rows(self, values: Iterable[Any]) -> list[Tensor]:
        tensors = (as_rows(value, self._num_tokens) for value in values)
        return [rows for rows in tensors if rows is not None]

    def _listening(self, function):
        def attention(module, query, key, value, *args, **kwargs):
            output = function(module, query, key, value, *args, **kwargs)
            path = self._path_of(module) if module in self._paths else None
            if path is not None:
                # [1, heads, T, head_dim], against [1, T, heads, head_dim] of the output.
                heads = [x.transpose(1, 2) for x in (query, key, value)]
                record = self.attentions.setdefault(path, Record(path, module))
                record.add(self._rows(heads), self._rows([output[0]]))
            return output

        return attention


def as_rows(value: Any, num_tokens: int) -> Tensor | None:
    """A copy with one row for each token; None for what is no tensor of floats, or has none.

    Args:
        value: a tensor [T, ...], [1, T, ...], [1, heads, T, head_dim] or [streams, 1, T, width]
            (Gemma 3n); or anything else. Of a single token any tensor is a row.
        num_tokens: T.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return None
    if num_tokens > 1:
        if value.ndim > 3 and value.shape[0] > 1 and value.shape[-2] == num_tokens:
            value = value.movedim(-2, 0)
        elif value.ndim > 2 and value.shape[0] == 1:
            value = value[0]
        if value.ndim == 3 and value.shape[0] != num_tokens and value.shape[1] == num_tokens:
            value = value.transpose(0, 1)
        if value.ndim < 2 or value.shape[0] != num_tokens:
            return None
    return value.detach().to("cpu", torch.float32, copy=True).reshape(num_tokens, -1)


def _output_tensors(output: Any) -> list[Any]:
    if isinstance(output, Tensor):
        return [output]
    for name in ("next_token_logits", "logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return [getattr(output, name)]
    return list(output) if isinstance(output, tuple | list) else []


def _appended(before: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    if not before:
        return more
    pairs = zip(before, more, strict=False)
    return [torch.cat(pair) for pair in pairs if pair[0].shape[1] == pair[1].shape[1]]


def _namespaces(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """The globals of the classes that look up eager attention by its name."""
    found = {}
    for module in modules:
        function = inspect.unwrap(type(module).forward)
        namespace = getattr(function, "__globals__", {})
        if "eager_attention_forward" in namespace:
            found[id(namespace)] = namespace
    return list(found.values())
