"""Qwen2.5-VL: Qwen2-VL whose tower has RMSNorm and gated MLPs, and sees windows in most layers.

A window is a square of patches of one picture; the layers in `fullatt_block_indexes` see all
patches of a picture. (Bai et al., 2025.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sglite.layers import GatedMLP, QuantizationConfig, RMSNorm, add_prefix
from sglite.layers.vision import Segments, VisionAttention, grid_rotation
from sglite.models.qwen2_vl import (
    Qwen2VisionTransformer,
    Qwen2VLForConditionalGeneration,
    frame_lengths,
    grid_places,
)


class Qwen2_5VisionBlock(nn.Module):  # noqa: N801
    """`x += attn(norm1(x))`, then `x += mlp(norm2(x))`."""

    def __init__(self, config: Any, quant_config: QuantizationConfig | None, prefix: str):
        super().__init__()
        width = config.hidden_size
        self.norm1 = RMSNorm(width, 1e-6)
        self.norm2 = RMSNorm(width, 1e-6)
        self.attn = VisionAttention(
            width,
            config.num_heads,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )
        self.mlp = GatedMLP(
            width,
            config.intermediate_size,
            config.hidden_act,
            bias=True,
            quant_config=quant_config,
            prefix=add_prefix("mlp", prefix),
        )

    def forward(self, x: Tensor, segments: Segments, cos_sin: Tensor) -> Tensor:
        """[patches, hidden_size] -> [patches, hidden_size]."""
        x = x + self.attn(self.norm1(x), segments, cos_sin)
        return x + self.mlp(self.norm2(x))


class Qwen2_5VisionTransformer(Qwen2VisionTransformer):  # noqa: N801
    """The vision tower; `config` is a `transformers.Qwen2_5_VLVisionConfig`."""

    block_class = Qwen2_5VisionBlock

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__(config, quant_config, prefix)
        self.window = config.window_size // config.spatial_merge_size // config.patch_size
        self.full_layers = frozenset(config.fullatt_block_indexes)

    @staticmethod
    def widths_of(config: Any) -> tuple[int, int]:
        """Of a patch, and of the language model."""
        return config.hidden_size, config.out_hidden_size

    @staticmethod
    def make_norm(width: int) -> nn.Module:
        """The norm in front of the merger."""
        return RMSNorm(width, 1e-6)

    def forward(self, pixels: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        """Embeddings of pictures, one behind the other: [their tokens, out_hidden_size].

        Args:
            pixels: [patches, channels * time * height * width], those of a square side by side.
            grids: per picture (time, height, width) in patches.
        """
        projection = self.patch_embed["proj"]
        device = projection.matrix.device
        merged = self.merge_size**2
        order, counts = window_order(grids, self.merge_size, self.window)
        places = grid_places(grids, self.merge_size)
        # The patches of a window lie side by side, those of a square always do.
        rows, columns = (place.view(-1, merged)[order].flatten() for place in places)
        cos_sin = grid_rotation(rows, columns, self.head_dim, self.rope_base).to(device)
        order = order.to(device)
        x = pixels.to(device, projection.matrix.dtype)
        x = projection(x.unflatten(0, (-1, merged))[order].flatten(0, 1))
        windows = Segments([count * merged for count in counts], device)
        whole = Segments(frame_lengths(grids), device)
        for index, block in enumerate(self.blocks):
            x = block(x, whole if index in self.full_layers else windows, cos_sin)
        return self.merger(x)[order.argsort()]


class Qwen2_5_VLForConditionalGeneration(Qwen2VLForConditionalGeneration):  # noqa: N801
    """Qwen2.5-VL with its output head; `config` is a `transformers.Qwen2_5_VLConfig`."""

    vision_class = Qwen2_5VisionTransformer


def window_order(
    grids: Sequence[Sequence[int]], merge_size: int, window: int
) -> tuple[Tensor, list[int]]:
    """In which order windows see the squares of pictures, and how many each has.

    Args:
        grids: per picture (time, height, width) in patches.
        merge_size: patches along a side of a square.
        window: squares along a side of a window; those at the right and the bottom may have less.

    Returns:
        [squares] int64, and the squares of each window.
    """
    orders, counts = [], []
    begin = 0
    for time, height, width in grids:
        height, width = height // merge_size, width // merge_size
        squares = torch.arange(begin, begin + time * height * width).view(time, height, width)
        begin += squares.numel()
        for frame in squares:
            for band in frame.split(window, 0):
                for part in band.split(window, 1):
                    orders.append(part.flatten())
                    counts.append(part.numel())
    return torch.cat(orders), counts
