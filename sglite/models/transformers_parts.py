"""What stands in for the parts of a Hugging Face model: the same results from the library's ops.

Every stand-in takes what the part took, of any number of dimensions, and its rows' bits depend on
nothing but the row.
"""

import copy
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sglite import ops
from sglite.layers.composite import is_plain
from sglite.layers.embedding import Embedding
from sglite.layers.forward_batch import take_rows
from sglite.layers.linear import Linear
from sglite.models.transformers_attention import RunningBatch

# Elements that torch hands to one thread without sharing them out; a multiple of any vector.
_BLOCK = 1 << 14
_VECTOR = 64
_EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SharedLinear(nn.Module):
    """A linear layer over a live module's own parameters, where they lie.

    Args:
        weight: [out_features, in_features].
        bias: [out_features], or None.
        out_dtype: of the result; None: that of the input.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, out_dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.out_features, self.in_features = weight.shape
        self._out_dtype = out_dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        bias = None if self.bias is None else self.bias.detach()
        return ops.linear(rows_of(x), self.weight.detach(), bias, out_dtype=self._out_dtype)


class SharedStack(nn.Module):
    """Several linear layers of one input, over a live module's own parameters, as one product.

    Args:
        weights: each [its width, in_features].
        biases: each [its width]; or all None.
    """

    def __init__(self, weights: Sequence[nn.Parameter], biases: Sequence[nn.Parameter | None]):
        super().__init__()
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList([] if biases[0] is None else biases)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., all widths]."""
        bias = torch.cat([part.detach() for part in self.biases]) if len(self.biases) else None
        return ops.linear(rows_of(x), [part.detach() for part in self.weights], bias)


class StackLeader(nn.Module):
    """Stands for the first of several linear layers of one input; computes them all.

    The others, `StackFollower`s, are called with the same tensor right after, and find their part
    here.

    Args:
        stack: the layers as one.
        widths: of the layers' outputs, in order.
    """

    def __init__(self, stack: nn.Module, widths: Sequence[int]):
        super().__init__()
        self.stack = stack
        self.widths = list(widths)
        self.out_features = self.widths[0]
        self._waiting = threading.local()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., widths[0]]."""
        parts = self.stack(x).split_with_sizes(self.widths, -1)
        self._waiting.parts = x, parts
        return parts[0]

    def part(self, x: Tensor, index: int) -> Tensor:
        """The output of the layer with this index for the input that the leader was called with."""
        waiting = getattr(self._waiting, "parts", None)
        if waiting is None or waiting[0] is not x:
            return self.stack(x).split_with_sizes(self.widths, -1)[index]
        if index == len(self.widths) - 1:
            self._waiting.parts = None
        return waiting[1][index]


class StackFollower(nn.Module):
    """Stands for a further one of several linear layers of one input.

    Args:
        leader: which computes it; not among this module's own parts.
        index: among the leader's layers.
    """

    def __init__(self, leader: StackLeader, index: int):
        super().__init__()
        self._leader = (leader,)
        self._index = index
        self.out_features = leader.widths[index]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self._leader[0].part(x, self._index)


class TokenTable(Embedding):
    """`sglite.layers.Embedding` for ids of any shape."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """[...] int64 -> [..., embedding_dim]."""
        return super().forward(input_ids.reshape(-1)).view(*input_ids.shape, self.embedding_dim)


class RootMeanSquareNorm(nn.Module):
    """`sglite.layers.RMSNorm` over rows that may be apart.

    Args:
        weight: [width]; the part's own parameter.
        eps, weight_offset: as for `sglite.layers.RMSNorm`.
    """

    def __init__(self, weight: nn.Parameter, eps: float, weight_offset: float):
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.weight_offset = weight_offset

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape, contiguous."""
        weight = self.weight.detach()
        rows = x.reshape(-1, x.shape[-1])
        return ops.rms_norm(rows, weight, self.eps, weight_offset=self.weight_offset).view(x.shape)


class Activation(nn.Module):
    """An elementwise function on the CPU, computed in blocks that have no remainder.

    Torch computes what is left of a tensor behind its last whole vector by another formula, which
    may differ in the last bit; and where the threads' shares end depends on the size of the batch.

    Args:
        function: the part itself.
    """

    def __init__(self, function: nn.Module):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape, contiguous."""
        if x.is_cuda:
            return self.function(x)
        count = x.numel()
        flat = x.reshape(-1)
        if count % _VECTOR:
            padded = flat.new_zeros(-(-count // _VECTOR) * _VECTOR)
            padded[:count] = flat
            flat = padded
        if len(flat) <= _BLOCK:
            out = self.function(flat)
        else:
            out = torch.cat([self.function(block) for block in flat.split(_BLOCK)])
        return out[:count].view(x.shape)


class WantedRows(nn.Module):
    """The output head: takes the rows whose logits are wanted, and leaves out the others.

    What the model does with logits behind its head (scales, soft caps) then sees those alone.

    Args:
        head: from hidden states to logits, in float32 if it can.
        running: where the batch is found.
    """

    def __init__(self, head: nn.Module, running: RunningBatch):
        super().__init__()
        self.head = head
        self._running = running

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[1, T, hidden_size] -> [1, R, vocab_size] float32."""
        wanted = take_rows(hidden_states, self._running.batch.logits_rows)
        return self.head(rows_of(wanted)).float()


class InvariantLinears(TorchFunctionMode):
    """Within it, `torch.nn.functional.linear` is the library's own product.

    For weights that are no `nn.Linear`'s: routers, experts, and what a class multiplies by itself.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            return _linear(*args, **kwargs)
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    fits = (
        input.dtype == weight.dtype
        and input.dtype in _DTYPES
        and weight.ndim == 2
        and weight.stride(1) == 1
        and input.numel() > 0
        and not input.is_cuda
    )
    if not fits:
        with torch._C.DisableTorchFunction():
            return nn.functional.linear(input, weight, bias)
    return ops.linear(rows_of(input), weight.detach(), None if bias is None else bias.detach())


def rows_of(x: Tensor) -> Tensor:
    """`x` as the ops take it: rows evenly apart, a row's elements side by side."""
    if x.is_contiguous() or (x.ndim <= 3 and x.shape[:-2].numel() == 1 and x.stride(-1) == 1):
        return x
    return x.contiguous()


def packed_linear(
    layer: Linear, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Linear:
    """Fills a linear layer from those that it stands for.

    Args:
        layer: as many outputs as they have together.
        weights: each [its width, in_features]; transposed ones may be views.
        biases: each [its width]; or all None.
    """
    start = 0
    for weight in weights:
        rows = weight.detach()
        layer.matrix.write_rows(start, rows if rows.stride(1) == 1 else rows.contiguous())
        start += len(rows)
    if layer.bias is not None:
        layer.bias.data = torch.cat([bias.detach() for bias in biases]).to(layer.matrix.device)
    return layer


def rms_norm_like(module: nn.Module) -> tuple[float, float] | None:
    """Epsilon and weight offset of the RMSNorm that a module computes; None: it computes none.

    Its results are compared, in float32 on rows large and small; nothing is read from its source.
    """
    weight = module._parameters.get("weight")
    if (
        weight is None
        or weight.ndim != 1
        or weight.dtype not in _DTYPES
        or list(module._parameters) != ["weight"]
        or list(module._modules)
        or isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm)
        or not is_plain(module, type(module))
    ):
        return None
    for eps in (getattr(module, name, None) for name in _EPSILONS):
        for offset in (0.0, 1.0) if isinstance(eps, float) else ():
            if _norms_alike(module, eps, offset):
                return eps, offset
    return None


def _norms_alike(module: nn.Module, eps: float, offset: float) -> bool:
    twin = copy.deepcopy(module).float().cpu()
    generator = torch.Generator().manual_seed(0)
    width = twin.weight.shape[0]
    weight = torch.randn(width, generator=generator)
    with torch.inference_mode():
        twin.weight.data = weight
        rows = torch.randn(4, width, generator=generator)
        rows *= torch.tensor([1e-3, 0.1, 1.0, 30.0])[:, None]
        expected = twin(rows[None])
        actual = ops.rms_norm(rows, weight, eps, weight_offset=offset)
    return expected.shape == rows[None].shape and torch.allclose(
        expected[0], actual, rtol=1e-5, atol=1e-6
    )
