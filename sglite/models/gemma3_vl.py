"""Gemma 3 with vision: a SigLIP tower whose patches are averaged to a few tokens per picture.

The tokens of a picture see each other both ways, within the windows of layers that have one.
(Gemma Team, 2025.)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sglite.layers import QuantizationConfig, RMSNorm
from sglite.models.vision_language import VisionLanguageModel
from sglite.multimodal.inputs import MultimodalItem


class Gemma3Projector(nn.Module):
    """`norm(average of squares of patches) W`; `config` is the whole one."""

    def __init__(self, config: Any):
        super().__init__()
        vision = config.vision_config
        self.side = vision.image_size // vision.patch_size
        self.pooled = self.side // math.isqrt(config.mm_tokens_per_image)
        self.mm_input_projection_weight = nn.Parameter(
            torch.zeros(vision.hidden_size, config.get_text_config().hidden_size)
        )
        self.mm_soft_emb_norm = RMSNorm(
            vision.hidden_size, vision.layer_norm_eps, weight_offset=1.0
        )

    def forward(self, x: Tensor) -> Tensor:
        """[images, patches, width of the tower] -> [images, tokens, hidden_size]."""
        grid = x.transpose(1, 2).unflatten(2, (self.side, self.side))
        pooled = functional.avg_pool2d(grid, self.pooled).flatten(2).transpose(1, 2)
        return self.mm_soft_emb_norm(pooled.contiguous()) @ self.mm_input_projection_weight


class Gemma3ForConditionalGeneration(VisionLanguageModel):
    """Gemma 3 with vision; `config` is a `transformers.Gemma3Config`."""

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__(config, quant_config, prefix)
        self.multi_modal_projector = Gemma3Projector(config)

    def get_image_feature(self, items: Sequence[MultimodalItem]) -> Tensor:
        """Embeddings of images, one behind the other: [their tokens, hidden_size]."""
        pixels = torch.cat([item.pixel_values for item in items])
        return self.multi_modal_projector(self.vision_tower.last(pixels)).flatten(0, 1)
