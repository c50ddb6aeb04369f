"""Parts of vision towers: attention among patches, MLP, embedding of patches."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sglite import ops
from sglite.interface.errors import UnsupportedModelError
from sglite.layers.linear import Linear, QKVLinear
from sglite.layers.porting import QuantizationConfig, add_prefix

_PAGE_SIZE = 16


def _quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`. (Hendrycks and Gimpel, 2016.)"""
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


# By the names that Hugging Face's `hidden_act` has for them.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": _quick_gelu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": functional.silu,
}


def vision_activation(hidden_act: str) -> Callable[[Tensor], Tensor]:
    """The function of a config's `hidden_act`. Raises UnsupportedModelError for an unknown one."""
    if hidden_act not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"vision hidden_act={hidden_act!r} is not implemented; known: "
            f"{', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[hidden_act]


class Segments:
    """Runs of patches, one behind the other, within which attention sees both ways.

    What `sglite.ops.paged_attention` takes for them, made once for all layers: keys and values lie
    in pages of their own, each segment from a page's start on, and are overwritten by every layer.

    Args:
        lengths: patches of each segment, all above 0.
        device: of the patches.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu"):
        counts = torch.tensor(lengths, dtype=torch.int64)
        pages = -(-counts // _PAGE_SIZE)
        first_page = pages.cumsum(0) - pages
        starts = counts.cumsum(0) - counts
        total = int(counts.sum())
        own = torch.arange(total) - starts.repeat_interleave(counts)
        width = torch.arange(int(pages.max()))
        table = (first_page[:, None] + width).clamp_(max=int(pages.sum()) - 1)
        self.num_patches = total
        self.max_length = max(lengths)
        self._num_pages = int(pages.sum())
        self.slots = (first_page.repeat_interleave(counts) * _PAGE_SIZE + own).to(device)
        self.page_table = table.int().to(device)
        self.query_start = functional.pad(counts.cumsum(0), (1, 0)).int().to(device)
        self.kv_lens = counts.int().to(device)
        self.kv_end = counts.repeat_interleave(counts).int().to(device)
        self.rows = torch.arange(total, device=device)
        self._memory: tuple[Tensor, Tensor] | None = None
        self._plan: ops.AttentionPlan | None = None

    def memory(self, num_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Where keys and values go, [pages, page size, num_heads, head_dim] each."""
        shape = (self._num_pages, _PAGE_SIZE, num_heads, head_dim)
        if self._memory is None or (self._memory[0].shape, self._memory[0].dtype) != (shape, dtype):
            self._memory = tuple(
                torch.empty(shape, dtype=dtype, device=self.slots.device) for _ in range(2)
            )
            self._plan = ops.plan_attention(
                self.page_table,
                self.query_start,
                self.kv_lens,
                self.kv_end,
                page_size=_PAGE_SIZE,
                num_heads=num_heads,
                num_kv_heads=num_heads,
                head_dim=head_dim,
                max_query_tokens=self.max_length,
            )
        return self._memory

    def attend(self, q: Tensor, scaling: float) -> Tensor:
        """Attention over what `memory` holds; [patches, heads, head_dim] in and out."""
        return ops.paged_attention(
            q,
            *self._memory,
            self.page_table,
            self.query_start,
            self.kv_lens,
            self.kv_end,
            scaling,
            plan=self._plan,
        )


class VisionAttention(nn.Module):
    """`proj(softmax(q k^T * scaling) v)` among the patches of a segment, with or without rotation.

    A whole image as one segment is full attention; windows are many segments.

    Args:
        embed_dim: width of input and output.
        num_heads: heads.
        head_dim: channels of a head; `embed_dim / num_heads` when None.
        qkv_bias, proj_bias: whether the projections have biases.
        quant_config, prefix: as for `Linear`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        if head_dim is None and embed_dim % num_heads:
            raise UnsupportedModelError(
                f"{prefix or 'VisionAttention'}: {num_heads} heads cannot share {embed_dim} "
                f"channels evenly"
            )
        self.num_heads = num_heads
        self.head_dim = head_dim or embed_dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.qkv = QKVLinear(
            embed_dim,
            self.head_dim,
            num_heads,
            bias=qkv_bias,
            quant_config=quant_config,
            prefix=add_prefix("qkv", prefix),
        )
        self.proj = Linear(
            num_heads * self.head_dim,
            embed_dim,
            bias=proj_bias,
            quant_config=quant_config,
            prefix=add_prefix("proj", prefix),
        )

    def forward(self, x: Tensor, segments: Segments, cos_sin: Tensor | None = None) -> Tensor:
        """[patches, embed_dim] -> [patches, embed_dim].

        Args:
            x: of all segments, one behind the other.
            segments: which patches see each other.
            cos_sin: [patches, head_dim] float32, cosines, then sines of the angles by which each
                patch's queries and keys are rotated; None: they are not.
        """
        qkv = self.qkv(x)
        memory = segments.memory(self.num_heads, self.head_dim, qkv.dtype)
        if cos_sin is None:
            q, k, v = qkv.view(-1, 3, self.num_heads, self.head_dim).unbind(1)
            ops.write_kv(k, v, *memory, segments.slots)
        else:
            q = ops.rope_and_write_kv(qkv, segments.rows, cos_sin, *memory, segments.slots)
        return self.proj(segments.attend(q, self.scaling).flatten(1))


class VisionMLP(nn.Module):
    """`fc2(act(fc1(x)))`.

    Args:
        embed_dim: width of input and output.
        hidden_dim: width between the two layers.
        hidden_act: name of the activation, as in Hugging Face's configs.
        quant_config, prefix: as for `Linear`.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        hidden_act: str,
        *,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        options = {"quant_config": quant_config}
        self.fc1 = Linear(embed_dim, hidden_dim, prefix=add_prefix("fc1", prefix), **options)
        self.act = vision_activation(hidden_act)
        self.fc2 = Linear(hidden_dim, embed_dim, prefix=add_prefix("fc2", prefix), **options)

    def forward(self, x: Tensor) -> Tensor:
        """[patches, embed_dim] -> [patches, embed_dim]."""
        return self.fc2(self.act(self.fc1(x)))


class PatchEmbedding(Linear):
    """A convolution whose windows do not overlap, as a linear layer over flat patches.

    Args:
        patch_shape: (channels, [time,] height, width) of a patch, in the order in which its
            elements lie; a checkpoint's weight has this shape behind `embed_dim`.
        embed_dim: width of the output.
        bias, quant_config, prefix: as for `Linear`.

    Attributes:
        checkpoint_shape: of the weight in a checkpoint.
    """

    def __init__(
        self,
        patch_shape: Sequence[int],
        embed_dim: int,
        bias: bool = False,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__(math.prod(patch_shape), embed_dim, bias, quant_config, prefix)
        self.checkpoint_shape = (embed_dim, *patch_shape)


def grid_rotation(rows: Tensor, columns: Tensor, head_dim: int, base: float = 10000.0) -> Tensor:
    """Cosines and sines that rotate half of the channel pairs by the row, half by the column.

    The angle of pair i of a half is `position * base ** (-4 i / head_dim)`. (Qwen2-VL.)

    Args:
        rows, columns: [patches] int64, the place of each patch in its grid, on the CPU.
        head_dim: channels of a head, a multiple of 4.
        base: wavelengths run from 2 pi to about 2 pi times this.

    Returns:
        [patches, head_dim] float32, for `VisionAttention`.
    """
    half = head_dim // 2
    frequencies = 1.0 / base ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    angles = torch.cat([torch.outer(place.float(), frequencies) for place in (rows, columns)], 1)
    return torch.cat([angles.cos(), angles.sin()], 1)
