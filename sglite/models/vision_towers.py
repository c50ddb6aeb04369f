"""CLIP's and SigLIP's vision towers: a transformer over the patches of pictures of one size.

SigLIP has no class token in front of the patches, no norm before its layers, and a bias on its
patches' projection. (Radford et al., 2021; Zhai et al., 2023.)
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sglite.interface.errors import UnsupportedModelError
from sglite.layers import LayerNorm, QuantizationConfig, add_prefix
from sglite.layers.vision import PatchEmbedding, Segments, VisionAttention, VisionMLP


class TowerLayer(nn.Module):
    """`x += self_attn(layer_norm1(x))`, then `x += mlp(layer_norm2(x))`."""

    def __init__(self, config: Any, quant_config: QuantizationConfig | None, prefix: str):
        super().__init__()
        width = config.hidden_size
        self.layer_norm1 = LayerNorm(width, config.layer_norm_eps)
        self.layer_norm2 = LayerNorm(width, config.layer_norm_eps)
        self.self_attn = VisionAttention(
            width,
            config.num_attention_heads,
            quant_config=quant_config,
            prefix=add_prefix("self_attn", prefix),
        )
        self.mlp = VisionMLP(
            width,
            config.intermediate_size,
            config.hidden_act,
            quant_config=quant_config,
            prefix=add_prefix("mlp", prefix),
        )

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """[patches, hidden_size] -> [patches, hidden_size]."""
        x = x + self.self_attn(self.layer_norm1(x), segments)
        return x + self.mlp(self.layer_norm2(x))


class ClipVisionTower(nn.Module):
    """CLIP's; `config` is a `transformers.CLIPVisionConfig`."""

    has_class_token: ClassVar[bool] = True

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__()
        self.patch_size = config.patch_size
        self.side = config.image_size // config.patch_size
        self.image_size = config.image_size
        width = config.hidden_size
        num_positions = self.side**2 + self.has_class_token
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": PatchEmbedding(
                    (config.num_channels, config.patch_size, config.patch_size),
                    width,
                    bias=not self.has_class_token,
                    quant_config=quant_config,
                    prefix=add_prefix("embeddings.patch_embedding", prefix),
                ),
                # Empty, as its own first values would be drawn from the process's random numbers.
                "position_embedding": nn.Embedding(
                    num_positions, width, _weight=torch.empty(num_positions, width)
                ),
            }
        )
        if self.has_class_token:
            self.embeddings.class_embedding = nn.Parameter(torch.zeros(width))
            # Spelt like this in all checkpoints.
            self.pre_layrnorm = LayerNorm(width, config.layer_norm_eps)
        self.encoder = nn.ModuleDict(
            {
                "layers": nn.ModuleList(
                    TowerLayer(config, quant_config, add_prefix(f"encoder.layers.{index}", prefix))
                    for index in range(config.num_hidden_layers)
                )
            }
        )
        self.post_layernorm = LayerNorm(width, config.layer_norm_eps)

    @property
    def tokens_per_image(self) -> int:
        """Patches of an image, the class token included."""
        return self.side**2 + self.has_class_token

    def forward(self, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Hidden states behind some layers, [images, tokens_per_image, hidden_size] each.

        Args:
            pixels: [images, channels, image_size, image_size].
            layers: 0 stands for what goes into the first layer, -1 for what comes out of the last.
        """
        if tuple(pixels.shape[2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"the vision tower takes images of {self.image_size} x {self.image_size} pixels, "
                f"got {list(pixels.shape)}"
            )
        count = len(self.encoder["layers"]) + 1
        wanted = [layer % count for layer in layers]
        x = self._embed(pixels)
        segments = Segments([self.tokens_per_image] * len(pixels), x.device)
        found = {0: x}
        for index, layer in enumerate(self.encoder["layers"][: max(wanted)], 1):
            x = found[index] = layer(x, segments)
            found = {key: value for key, value in found.items() if key in (index, *wanted)}
        return [found[layer].view(len(pixels), self.tokens_per_image, -1) for layer in wanted]

    def last(self, pixels: Tensor) -> Tensor:
        """What comes out of the last layer behind the final norm; as `forward` otherwise."""
        return self.post_layernorm(self.forward(pixels, [-1])[0])

    def _embed(self, pixels: Tensor) -> Tensor:
        """[images * tokens_per_image, hidden_size], what goes into the first layer."""
        projection = self.embeddings["patch_embedding"]
        pixels = pixels.to(projection.matrix.device, projection.matrix.dtype)
        size, side = self.patch_size, self.side
        # A rest at the right and at the bottom is in no patch: SigLIP has 14 of 384 pixels.
        pixels = pixels[:, :, : side * size, : side * size]
        patches = pixels.unflatten(2, (side, size)).unflatten(4, (side, size))
        x = projection(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        if self.has_class_token:
            own = self.embeddings.class_embedding.expand(len(x), 1, -1)
            x = torch.cat([own, x], 1)
        x = x + self.embeddings["position_embedding"].weight
        if self.has_class_token:
            x = self.pre_layrnorm(x)
        return x.flatten(0, 1)


class SiglipVisionTower(ClipVisionTower):
    """SigLIP's; `config` is a `transformers.SiglipVisionConfig`."""

    has_class_token = False


_TOWERS = {"clip_vision_model": ClipVisionTower, "siglip_vision_model": SiglipVisionTower}


def tower_class(config: Any) -> type[ClipVisionTower]:
    """The tower of a vision config. Raises UnsupportedModelError for an unknown kind."""
    kind = getattr(config, "model_type", None)
    if kind not in _TOWERS:
        raise UnsupportedModelError(
            f"the vision tower {kind!r} is not implemented; known: {', '.join(sorted(_TOWERS))}"
        )
    return _TOWERS[kind]
