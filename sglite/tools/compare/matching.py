"""Which tensors of the Hugging Face model a module's input and output should equal.

Paths are found generically: the list of decoder layers in both models, parts of the same name in
them, and where names differ what the part is. Ours stack projections (q, k and v; gate and up) and
rotate in a module; there the projections are modules of their own, and rotated queries and keys are
seen as what the attention function is given.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sglite.interface.errors import UnsupportedModelError
from sglite.layers.attention import RadixAttention
from sglite.layers.linear import StackedLinear
from sglite.layers.logits import LogitsProcessor
from sglite.layers.rotary import RotaryEmbedding
from sglite.tools.compare.recording import ModuleRecorder, Record
from sglite.tools.compare.routing import find_mixtures


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the decoder layers lie in a model of ours and in Hugging Face's.

    Attributes:
        ours: the path of the list of layers, such as "model.layers".
        theirs: the same in the other model.
        count: layers.
        renamed: paths in our model and in the other of mixtures of experts, which are found by what
            they are, whatever they are called (Mixtral's is `block_sparse_moe` in checkpoints).
    """

    ours: str
    theirs: str
    count: int
    renamed: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, ours: nn.Module, theirs: nn.Module) -> "Layout":
        """Finds both lists.

        Raises:
            UnsupportedModelError: there are no two lists of the same length.
        """
        pairs = [
            (_alike(a, b), len(layers), a, b)
            for a, layers in _layer_lists(ours)
            for b, others in _layer_lists(theirs)
            if len(layers) == len(others)
        ]
        if not pairs:
            raise UnsupportedModelError(
                f"{type(ours).__name__} and {type(theirs).__name__} have no list of decoder layers "
                f"of the same length: the layers must stand in an nn.ModuleList"
            )
        _, count, a, b = max(pairs)
        mixtures = [
            [mixture.block_path for mixture in find_mixtures(model)] for model in (ours, theirs)
        ]
        same = len(mixtures[0]) == len(mixtures[1])
        return cls(a, b, count, tuple(zip(*mixtures, strict=True)) if same else ())

    def translate(self, path: str) -> str:
        """The path that a module of ours has in the other model, if it has the same name."""
        for ours, theirs in self.renamed:
            if f"{path}.".startswith(f"{ours}."):
                return theirs + path[len(ours) :]
        return self._moved(path, self.ours, self.theirs)

    def translate_back(self, path: str) -> str:
        """The path that a module of the other model has in ours."""
        for ours, theirs in self.renamed:
            if f"{path}.".startswith(f"{theirs}."):
                return ours + path[len(theirs) :]
        return self._moved(path, self.theirs, self.ours)

    @staticmethod
    def _moved(path: str, old: str, new: str) -> str:
        """A path within the layers, what they lie in, or what all of the model lies in, moved."""
        if not path:
            return path
        common = _alike(old, new)
        for names in (0, 1, common):
            before, after = (
                ".".join(p.split(".")[: len(p.split(".")) - names]) for p in (old, new)
            )
            if not before:
                return f"{after}.{path}" if after else path
            if f"{path}.".startswith(f"{before}."):
                return (after + path[len(before) :]).strip(".")
        return path


def _layer_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of decoder layers; those with attention of ours, where there are any."""
    lists = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    # A list of one may stand for all layers, which then lie within it (`LayerRun`).
    lists = [
        (path, found)
        for path, found in lists
        if not any(path.startswith(f"{other}.") and len(outer) > 1 for other, outer in lists)
    ]
    with_attention = [
        (path, found)
        for path, found in lists
        if all(any(isinstance(m, RadixAttention) for m in layer.modules()) for layer in found)
    ]
    yield from with_attention or lists


def _shortened(path: str, names: int) -> str:
    """A path without its last names."""
    parts = path.split(".")
    return ".".join(parts[: len(parts) - names])


def _alike(a: str, b: str) -> int:
    """How many names two paths have in common, from the end."""
    count = 0
    for one, other in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if one != other:
            break
        count += 1
    return count


@dataclass(frozen=True, slots=True)
class Expected:
    """What a module's tensors should be; None where it is not known.

    Attributes:
        inputs: [T, width], what `value_in` of the record should be.
        outputs: [T, width], what `value_out` of it should be.
        last: path of the module of the other model that gives the output.
    """

    inputs: Tensor | None
    outputs: Tensor | None
    last: str


class Matcher:
    """Finds for a module of ours what Hugging Face has in its place.

    Args:
        layout: of the two models.
        ours, theirs: what was recorded on the same tokens.

    Attributes:
        used: paths of the other model's modules that have a counterpart.
    """

    def __init__(self, layout: Layout, ours: ModuleRecorder, theirs: ModuleRecorder):
        self.used: set[str] = set()
        self._layout = layout
        self._order = list(ours.records)
        self._ours: Mapping[str, Record] = ours.records
        self._theirs: Mapping[str, Record] = theirs.records
        self._attentions: Mapping[str, Record] = theirs.attentions
        self.expected = {path: self._expected(record) for path, record in self._ours.items()}

    def _expected(self, record: Record) -> Expected | None:
        path = self._layout.translate(record.path)
        if record.is_repeated:
            return None
        if isinstance(record.module, LogitsProcessor):
            return Expected(None, value_out(self._theirs[""]), "") if "" in self._theirs else None
        if isinstance(record.module, RadixAttention):
            found = self._attention(path)
            if found is not None:
                return Expected(_joined(found.inputs[:3]), found.outputs[0], found.path)
            return self._before_next(record)
        if is_rotary(record):
            found = self._attention(path)
            if found is None:
                return None
            before = [self._last_of(found.path, part) for part in ("q", "k")]
            inputs = None if None in before else _joined([r.outputs[0] for r in before])
            return Expected(inputs, _joined(found.inputs[:2]), found.path)
        same = self._theirs.get(path)
        if same is not None and _fits(record, same):
            self.used.add(path)
            return Expected(value_in(same), value_out(same), path)
        return self._segments(record, path) or self._before_next(record)

    def _attention(self, path: str) -> Record | None:
        """The call of the attention function in the module above, or the one around that."""
        while path:
            if path in self._attentions:
                return self._attentions[path]
            path = path.rpartition(".")[0]
        # A layer has one attention, whatever it is called.
        return next(iter(self._attentions.values())) if len(self._attentions) == 1 else None

    def _last_of(self, attention: str, part: str) -> Record | None:
        """What gives queries or keys before they are rotated: a norm, or the projection."""
        for name in (f"{part}_norm", f"{part}_layernorm", f"{part}_proj"):
            found = self._theirs.get(f"{attention}.{name}")
            if found is not None and found.outputs:
                return found
        return None

    def _segments(self, record: Record, path: str) -> Expected | None:
        """Several linear layers behind one another, where ours is their stack."""
        if not isinstance(record.module, StackedLinear):
            return None
        parent = path.rpartition(".")[0]
        parts = [self._theirs.get(f"{parent}.{name}_proj") for name in record.module.segments]
        if None in parts or not all(part.outputs for part in parts):
            return None
        self.used |= {part.path for part in parts}
        return Expected(
            value_in(parts[0]), _joined([part.outputs[0] for part in parts]), parts[-1].path
        )

    def _before_next(self, record: Record) -> Expected | None:
        """The input of what comes next: of an activation that multiplies as well, say."""
        later = self._order[self._order.index(record.path) + 1 :]
        parent = record.path.rpartition(".")[0]
        following = next((path for path in later if path.rpartition(".")[0] == parent), None)
        if following is None or not record.outputs:
            return None
        found = self._theirs.get(self._layout.translate(following))
        if found is None or not found.inputs:
            return None
        if found.inputs[0].shape != record.outputs[0].shape:
            return None
        return Expected(None, found.inputs[0], found.path)

    def counterpart(self, path: str) -> Record:
        """The record of the module with the same name."""
        return self._theirs[self._layout.translate(path)]

    def without_counterpart(self, path: str) -> list[Record]:
        """Hugging Face's parts with weights that end before one of its modules, and are not ours.

        Args:
            path: of that module; not among the records: all of them.
        """
        found = []
        for other, record in self._theirs.items():
            if other == path:
                break
            if record.has_weights and other not in self.used:
                found.append(record)
        return found


def is_rotary(record: Record) -> bool:
    """Whether a module rotates queries and keys, by its type or by its name."""
    if len(record.outputs) != 2:
        return False
    name = record.path.rpartition(".")[2]
    return isinstance(record.module, RotaryEmbedding) or "rotary" in name or "rope" in name


def value_in(record: Record) -> Tensor | None:
    """What a module works on: its first tensor, or the sum with the residual that goes with it."""
    if not record.inputs:
        return None
    return sum(record.inputs[:2]) if _adds_residual(record) else record.inputs[0]


def value_out(record: Record) -> Tensor | None:
    """What a module gives: its first tensor."""
    return record.outputs[0] if record.outputs else None


def layer_value(record: Record) -> Tensor | None:
    """What a decoder layer gives; where it hands on the residual apart, the sum."""
    if _same_shape(record.outputs):
        return sum(record.outputs)
    return value_out(record)


def layer_input(record: Record) -> Tensor | None:
    """What a decoder layer is given; where the residual comes apart, the sum."""
    if len(record.inputs) == 2 and _same_shape(record.inputs) and _same_shape(record.outputs):
        return sum(record.inputs)
    return record.inputs[0] if record.inputs else None


def joined_values(record: Record) -> tuple[Tensor | None, Tensor | None]:
    """Input and output of a module of ours, side by side where attention takes several."""
    if isinstance(record.module, RadixAttention):
        return _joined(record.inputs[:3]), value_out(record)
    if is_rotary(record):
        return _joined(record.inputs[:2]), _joined(record.outputs)
    return value_in(record), value_out(record)


def _adds_residual(record: Record) -> bool:
    """Whether this is a norm that adds its input to a residual first, as in SGLang."""
    return _same_shape(record.inputs) and _same_shape(record.outputs) and not is_rotary(record)


def _same_shape(tensors: list[Tensor]) -> bool:
    return len(tensors) == 2 and tensors[0].shape == tensors[1].shape


def _fits(ours: Record, theirs: Record) -> bool:
    """Whether two modules of one name can be the same function, by the widths."""
    if theirs.is_repeated or not ours.outputs or not theirs.outputs:
        return False
    if ours.outputs[0].shape != theirs.outputs[0].shape:
        return False
    if not ours.inputs or not theirs.inputs:
        return True
    return ours.inputs[0].shape == theirs.inputs[0].shape


def _joined(tensors: list[Tensor]) -> Tensor | None:
    return torch.cat(tensors, 1) if tensors else None
