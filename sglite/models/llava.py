"""LLaVA 1.5: a CLIP tower whose patches, through a small MLP, are tokens of the language model.

(Liu et al., 2023.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sglite.layers import Linear, QuantizationConfig, add_prefix
from sglite.layers.vision import vision_activation
from sglite.models.vision_language import VisionLanguageModel
from sglite.multimodal.inputs import MultimodalItem


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


def feature_layers(config: Any) -> list[int]:
    """The layers of the tower whose hidden states are looked at."""
    layers = config.vision_feature_layer
    return [layers] if isinstance(layers, int) else list(layers)
