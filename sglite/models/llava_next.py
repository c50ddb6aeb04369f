"""LLaVA-NeXT and OneVision: LLaVA that sees a picture small and whole, and in tiles behind that.

The patches of the tiles are put together to one grid, cut to the picture, and a newline is put
behind each row. OneVision makes the grid smaller where it has too many rows and columns, and takes
videos.
(Liu et al., 2024; Li et al., 2024.)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sglite.layers import QuantizationConfig
from sglite.models.llava import LlavaForConditionalGeneration
from sglite.multimodal.inputs import MultimodalItem
from sglite.multimodal.tiling import crop_of, shrunk


class LlavaNextForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA-NeXT (1.6); `config` is a `transformers.LlavaNextConfig`."""

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__(config, quant_config, prefix)
        self.image_newline = nn.Parameter(torch.zeros(config.get_text_config().hidden_size))

    def get_image_feature(self, items: Sequence[MultimodalItem]) -> Tensor:
        """Embeddings of images, one behind the other: [their tokens, hidden_size]."""
        return torch.cat([self._feature(item) for item in items])

    def _feature(self, item: MultimodalItem) -> Tensor:
        """The small whole; then the tiles put together, a newline behind each row."""
        parts = self.project(item.pixel_values)
        if len(parts) == 1:
            return torch.cat([parts[0], self.image_newline[None]])
        down, across = item.data["tiles"]
        side = math.isqrt(parts.shape[1])
        tiles = parts[1:].view(down, across, side, side, -1)
        grid = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        rows, columns = crop_of(grid.shape[0], grid.shape[1], *item.data["image_size"])
        grid = self.shrink(grid[rows, columns], side)
        newlines = self.image_newline.expand(len(grid), 1, -1)
        return torch.cat([parts[0], torch.cat([grid, newlines], 1).flatten(0, 1)])

    def shrink(self, grid: Tensor, side: int) -> Tensor:
        """[rows, columns, hidden_size], as it is here; `side` is that of a tile."""
        return grid


class LlavaOnevisionForConditionalGeneration(LlavaNextForConditionalGeneration):
    """LLaVA-OneVision; `config` is a `transformers.LlavaOnevisionConfig`."""

    def _feature(self, item: MultimodalItem) -> Tensor:
        """As for a picture; of a video, all frames at half their size, and one newline."""
        if item.modality != "video":
            return super()._feature(item)
        frames = self.project(item.pixel_values)
        side = math.isqrt(frames.shape[1])
        grids = frames.transpose(1, 2).unflatten(2, (side, side))
        half = math.ceil(side / 2)
        small = functional.interpolate(grids, [half, half], mode="bilinear")
        rows = small.flatten(2).transpose(1, 2).flatten(0, 1)
        return torch.cat([rows, self.image_newline[None]])

    def shrink(self, grid: Tensor, side: int) -> Tensor:
        """Fewer rows and columns, where they are more than so many tiles have."""
        rows, columns = shrunk(*grid.shape[:2], side, self.config.vision_aspect_ratio)
        if (rows, columns) == tuple(grid.shape[:2]):
            return grid
        channels_first = grid.permute(2, 0, 1)[None]
        small = functional.interpolate(channels_first, [rows, columns], mode="bilinear")
        return small[0].permute(1, 2, 0)
