"""Puts the library's parts in the places of a Hugging Face model's own, where that is safe.

Safe means: of exactly the type that is known, with nobody listening to it; for norms, that the
results are seen to be the same; for layers computed together, that they were seen to get the very
same tensor, unchanged.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import activations
from transformers.pytorch_utils import Conv1D

from sglite.layers.composite import is_plain
from sglite.layers.embedding import Embedding, LMHead
from sglite.layers.linear import Linear
from sglite.layers.weight import WeightModule
from sglite.models.quantization import layout_at_load
from sglite.models.transformers_attention import RunningBatch
from sglite.models.transformers_calls import CallRecord
from sglite.models.transformers_parts import (
    Activation,
    RootMeanSquareNorm,
    SharedLinear,
    SharedStack,
    StackFollower,
    StackLeader,
    TokenTable,
    WantedRows,
    packed_linear,
    rms_norm_like,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROUTERS = frozenset(("router", "gate"))
_TORCH_ACTIVATIONS = (nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Mish)


@dataclass
class Fusions:
    """What was put in place, for people to read.

    Attributes:
        whole_layers: decoder layers that run as one op each.
        stacked: per kind of group ("q_proj + k_proj + v_proj"), how many.
        counts: per kind of stand-in, how many.
        kept: parts with weights that still run as Hugging Face wrote them, by class.
    """

    whole_layers: int = 0
    stacked: Counter = field(default_factory=Counter)
    counts: Counter = field(default_factory=Counter)
    kept: Counter = field(default_factory=Counter)


class Fuser:
    """Replaces parts of one model, in place.

    Args:
        model: the Hugging Face model, probed.
        calls: how its parts were called in the probe.
        running: for the output head.
        shared: whether parameters stay where they lie, as a live module's; else linear layers are
            packed, one by one, and their plain weights dropped.
        device: where packed weights go.
        quantization: "int8" or "int4": how packed weights are stored; None: plainly.
        left: paths of parts that stay as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Mapping[str, CallRecord],
        running: RunningBatch,
        *,
        shared: bool,
        device: torch.device,
        quantization: str | None = None,
        left: Collection[str] = (),
    ):
        self.fusions = Fusions()
        self._model = model
        self._calls = calls
        self._running = running
        self._shared = shared
        self._device = device
        self._quantization = quantization
        self._left = left
        self._modules = dict(model.named_modules())
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for name, child in parent._modules.items():
                self._places.setdefault(id(child), []).append((parent, name))

    def run(self) -> Fusions:
        """Replaces all that can be; says what."""
        head = self._head_path()
        tied = self._tie(head) if head and not self._shared else None
        for group in self._groups(head):
            self._stack(group)
        for path, module in list(self._modules.items()):
            if path == head or (tied and path == tied) or path in self._left:
                continue
            if _is_linear(module):
                self._put(path, self._linear(path, module), "linear layers")
            elif type(module) is Conv1D and not self._shared and _is_quiet(module):
                self._put(path, self._conv1d(path, module), "linear layers")
            elif norm := self._norm(path, module):
                self._put(path, norm, "RMSNorm")
            elif _is_activation(module):
                self._put(path, Activation(module), "activations")
        if head:
            self._put_head(head)
        self._count_what_is_kept()
        return self.fusions

    # -- linear layers ----------------------------------------------------------------------

    def _groups(self, head: str | None) -> list[list[str]]:
        """Linear layers of one parent that got the very same tensor, in the order of the calls."""
        groups: dict[tuple, list[str]] = {}
        for path, record in sorted(self._calls.items(), key=lambda item: item[1].order):
            module = self._modules.get(path)  # it may be gone, with its whole layer
            if (
                module is None
                or not _is_linear(module)
                or record.count != 1
                or not record.is_simple
                or path == head
            ):
                continue
            parent = path.rpartition(".")[0]
            kind = (module.weight.dtype, module.bias is not None, module.in_features)
            groups.setdefault((parent, record.input_key, kind), []).append(path)
        found = []
        for paths in groups.values():
            first = self._calls[paths[0]].inputs
            same = [path for path in paths if torch.equal(self._calls[path].inputs, first)]
            weights = [id(self._modules[path].weight) for path in same]
            if 1 < len(same) <= 16 and len(set(weights)) == len(weights):
                found.append(same)
        return found

    def _stack(self, paths: Sequence[str]) -> None:
        parts = [self._modules[path] for path in paths]
        weights, biases = [part.weight for part in parts], [part.bias for part in parts]
        widths = [part.out_features for part in parts]
        if self._shared:
            stack = SharedStack(weights, biases)
        else:
            stack = self._new(parts[0].in_features, sum(widths), weights, biases, *paths)
            del weights
            _drop(parts)
        leader = StackLeader(stack, widths)
        self._replace(paths[0], leader)
        for index, path in enumerate(paths[1:], 1):
            self._replace(path, StackFollower(leader, index))
        names = " + ".join(path.rpartition(".")[2] for path in paths)
        self.fusions.stacked[names] += 1

    def _linear(self, path: str, module: nn.Linear) -> nn.Module:
        if self._shared:
            return SharedLinear(module.weight, module.bias)
        layer = self._new(
            module.in_features, module.out_features, [module.weight], [module.bias], path
        )
        _drop([module])
        return layer

    def _conv1d(self, path: str, module: Conv1D) -> Linear:
        """GPT-2's linear layer, whose weight is the other way round."""
        inputs, outputs = module.weight.shape
        layer = self._new(inputs, outputs, [module.weight.T], [module.bias], path)
        layer.nf = module.nf
        _drop([module])
        return layer

    def _new(self, inputs: int, outputs: int, weights, biases, *paths: str) -> Linear:
        layer = Linear(inputs, outputs, biases[0] is not None, prefix=paths[0])
        stays_plain = any(self._is_router(path) for path in paths)
        self._prepare(layer, weights[0].dtype, stays_plain=stays_plain)
        packed_linear(layer, weights, biases)
        return layer

    def _is_router(self, path: str) -> bool:
        """Whether a layer says which experts a token goes to, or how much of one it takes.

        It stands beside them, or within what is called so. Rounding it does harm: see
        `sglite.layers.Router`.
        """
        above = path.split(".")[:-1]
        beside = self._modules[".".join(above)]._modules
        return "experts" in beside or not _ROUTERS.isdisjoint(above)

    def _prepare(
        self, layer: WeightModule, dtype: torch.dtype, *, stays_plain: bool = False
    ) -> None:
        """Sets what a weight will be stored as."""
        layer.matrix.convert(lambda tensor: tensor.to(self._device, dtype))
        if self._quantization is not None and not stays_plain:
            method = "int8" if isinstance(layer, Embedding | LMHead) else self._quantization
            layer.matrix.quantize(layout_at_load(layer.matrix, method))

    # -- output head ------------------------------------------------------------------------

    def _head_path(self) -> str | None:
        """Where the output head is; None where the model has none of its own."""
        head = self._model.get_output_embeddings()
        return next((path for path, module in self._modules.items() if module is head), None)

    def _tie(self, head: str) -> str | None:
        """Packs a table that embedding and output head share once for both; the embedding's path.

        None where they share none, or the embedding is more than a lookup.
        """
        module = self._modules[head]
        if not _is_linear(module):
            return None
        users = [
            path
            for path, other in self._modules.items()
            if other is not module and getattr(other, "_parameters", {}).get("weight") is not None
            if other._parameters["weight"] is module.weight
        ]
        if len(users) != 1 or type(self._modules[users[0]]) is not nn.Embedding:
            return None
        if not _is_quiet(self._modules[users[0]]):
            return None
        table = TokenTable(module.out_features, module.in_features, prefix=users[0])
        self._prepare(table, module.weight.dtype)
        table.matrix.write_rows(0, module.weight.detach())
        self._put(users[0], table, "embeddings")
        layer = LMHead(module.out_features, module.in_features, module.bias is not None)
        layer.tie_weights(table)
        if module.bias is not None:
            layer.bias.data = module.bias.detach()
        self._replace(head, layer)
        _drop([module])
        return users[0]

    def _put_head(self, path: str) -> None:
        module = self._modules[path]
        if _is_linear(module):
            is_tied = any(
                other is not module and other._parameters.get("weight") is module.weight
                for other in self._modules.values()
            )
            if self._shared or is_tied:
                module = SharedLinear(module.weight, module.bias, torch.float32)
            else:
                layer = LMHead(
                    module.out_features, module.in_features, module.bias is not None, prefix=path
                )
                self._prepare(layer, module.weight.dtype)
                packed_linear(layer, [module.weight], [module.bias])
                _drop([module])
                module = layer
        self._replace(path, WantedRows(module, self._running))

    # -- norms ------------------------------------------------------------------------------

    def _norm(self, path: str, module: nn.Module) -> RootMeanSquareNorm | None:
        """The stand-in of an RMSNorm; None for what is none, or not seen to be the same."""
        record = self._calls.get(path)
        if record is None or not record.is_simple:
            return None
        found = rms_norm_like(module)
        return None if found is None else RootMeanSquareNorm(module.weight, *found)

    # -- the tree ---------------------------------------------------------------------------

    def _put(self, path: str, module: nn.Module, kind: str) -> None:
        self._replace(path, module)
        self.fusions.counts[kind] += 1

    def _replace(self, path: str, module: nn.Module) -> None:
        """Puts a module in the place of another one, and wherever else that one stands."""
        old = self._modules[path]
        places = self._places[id(module)] = self._places[id(old)]
        for parent, name in places:
            parent._modules[name] = module
        self._modules[path] = module
        module.training = False

    def _count_what_is_kept(self) -> None:
        for module in self._model.modules():
            own = [p for p in module._parameters.values() if p is not None and p.ndim > 1]
            if isinstance(module, nn.Embedding):  # a lookup is exact
                continue
            if own and not type(module).__module__.startswith("sglite."):
                self.fusions.kept[type(module).__name__] += 1


def _drop(parts: Sequence[nn.Module]) -> None:
    """Lets go of plain weights, at once: those of all layers together would be a second model."""
    for part in parts:
        part._parameters["weight"] = None


def _is_quiet(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else."""
    return is_plain(module, type(module))


def _is_linear(module: nn.Module) -> bool:
    return (
        is_plain(module, nn.Linear)
        and module.weight.dtype in _DTYPES
        and module.weight.stride(1) == 1
        and module.weight.numel() > 0
    )


def _is_activation(module: nn.Module) -> bool:
    is_one = isinstance(module, _TORCH_ACTIVATIONS) or type(module).__module__ == (
        activations.__name__
    )
    return is_one and _is_quiet(module) and not list(module.parameters())
