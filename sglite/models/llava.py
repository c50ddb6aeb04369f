"""LLaVA 1.5: a CLIP tower whose patches, through a small MLP, are tokens of the language model.

(Liu et al., 2023.) LLaVA-NeXT adds tiles of the picture to its small whole, and LLaVA-OneVision
shrinks them where there are many.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sglite.layers import Linear, QuantizationConfig, add_prefix
from sglite.layers.vision import vision_activation
from sglite.models.vision_language import VisionLanguageModel
from sglite.multimodal.inputs import MultimodalItem
from sglite.multimodal.tiling import crop_of, shrunk


class LlavaProjector(nn.Module):
    """`linear_2(act(linear_1(x)))`; `config` is the whole one."""

    def __init__(self, config: Any, quant_config: QuantizationConfig | None, prefix: str):
        super().__init__()
        width = config.vision_config.hidden_size * len(feature_layers(config))
        hidden_size = config.get_text_config().hidden_size
        bias = config.multimodal_projector_bias
        self.linear_1 = Linear(
            width, hidden_size, bias, quant_config, add_prefix("linear_1", prefix)
        )
        self.act = vision_activation(config.projector_hidden_act)
        self.linear_2 = Linear(
            hidden_size, hidden_size, bias, quant_config, add_prefix("linear_2", prefix)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., width of the tower] -> [..., hidden_size]."""
        return self.linear_2(self.act(self.linear_1(x)))


class LlavaForConditionalGeneration(VisionLanguageModel):
    """LLaVA 1.5; `config` is a `transformers.LlavaConfig`."""

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__(config, quant_config, prefix)
        self.feature_layers = feature_layers(config)
        self.drops_first = config.vision_feature_select_strategy == "default"
        self.multi_modal_projector = LlavaProjector(
            config, quant_config, add_prefix("multi_modal_projector", prefix)
        )

    def get_image_feature(self, items: Sequence[MultimodalItem]) -> Tensor:
        """Embeddings of images, one behind the other: [their tokens, hidden_size]."""
        return self.project(torch.cat([item.pixel_values for item in items])).flatten(0, 1)

    def project(self, pixels: Tensor) -> Tensor:
        """[images, 3, side, side] -> [images, patches, hidden_size]."""
        states = torch.cat(self.vision_tower(pixels, self.feature_layers), -1)
        if self.drops_first:
            states = states[:, 1:].contiguous()
        return self.multi_modal_projector(states)


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

    def shrink(self, grid: Tensor, side: int) -> Tensor:
        """Fewer rows and columns, where they are more than so many tiles have."""
        rows, columns = shrunk(*grid.shape[:2], side, self.config.vision_aspect_ratio)
        if (rows, columns) == tuple(grid.shape[:2]):
            return grid
        channels_first = grid.permute(2, 0, 1)[None]
        small = functional.interpolate(channels_first, [rows, columns], mode="bilinear")
        return small[0].permute(1, 2, 0)


def feature_layers(config: Any) -> list[int]:
    """The layers of the tower whose hidden states are looked at."""
    layers = config.vision_feature_layer
    return [layers] if isinstance(layers, int) else list(layers)
