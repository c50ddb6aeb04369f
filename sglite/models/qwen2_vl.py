"""Qwen2-VL: Qwen2 with M-RoPE, which sees pictures and videos through a tower of its own.

The tower takes patches of pictures of any size, merges each square of four, and gives embeddings
in the language model's width; its patches have rotary positions of rows and columns, and see all
others of their picture, or of their point of time in a video. (Wang et al., 2024.)
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sglite.layers import (
    ForwardBatch,
    LayerNorm,
    Linear,
    LogitsProcessorOutput,
    PPProxyTensors,
    QuantizationConfig,
    add_prefix,
)
from sglite.layers.vision import (
    PatchEmbedding,
    Segments,
    VisionAttention,
    VisionMLP,
    grid_rotation,
)
from sglite.models.qwen2 import Qwen2ForCausalLM
from sglite.models.vision_language import text_config_of
from sglite.multimodal.inputs import MultimodalItem
from sglite.multimodal.keys import pad_input_ids


class Qwen2VisionBlock(nn.Module):
    """`x += attn(norm1(x))`, then `x += mlp(norm2(x))`."""

    def __init__(self, config: Any, quant_config: QuantizationConfig | None, prefix: str):
        super().__init__()
        width = config.embed_dim
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(
            width,
            config.num_heads,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )
        self.mlp = VisionMLP(
            width,
            int(width * config.mlp_ratio),
            config.hidden_act,
            quant_config=quant_config,
            prefix=add_prefix("mlp", prefix),
        )

    def forward(self, x: Tensor, segments: Segments, cos_sin: Tensor) -> Tensor:
        """[patches, embed_dim] -> [patches, embed_dim]."""
        x = x + self.attn(self.norm1(x), segments, cos_sin)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """`mlp(norm of each patch, the patches of a square side by side)`.

    Args:
        embed_dim: width of a patch.
        hidden_size: of the language model.
        merge_size: patches along a side of a square.
        norm: of a patch.
        quant_config, prefix: as for `Linear`.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_size: int,
        merge_size: int,
        norm: nn.Module,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ):
        super().__init__()
        self.width = embed_dim * merge_size**2
        self.ln_q = norm
        self.mlp = nn.Sequential(
            Linear(
                self.width,
                self.width,
                quant_config=quant_config,
                prefix=add_prefix("mlp.0", prefix),
            ),
            nn.GELU(),
            Linear(
                self.width,
                hidden_size,
                quant_config=quant_config,
                prefix=add_prefix("mlp.2", prefix),
            ),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[patches, embed_dim] -> [patches / merge_size ** 2, hidden_size]."""
        return self.mlp(self.ln_q(x).view(-1, self.width))


class Qwen2VisionTransformer(nn.Module):
    """The vision tower; `config` is a `transformers.Qwen2VLVisionConfig`."""

    block_class: ClassVar[type[nn.Module]] = Qwen2VisionBlock

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__()
        width, out_width = self.widths_of(config)
        self.merge_size = config.spatial_merge_size
        self.head_dim = width // config.num_heads
        self.rope_base = rope_base_of(config)
        self.patch_embed = nn.ModuleDict(
            {
                "proj": PatchEmbedding(
                    patch_shape_of(config),
                    width,
                    quant_config=quant_config,
                    prefix=add_prefix("patch_embed.proj", prefix),
                )
            }
        )
        self.blocks = nn.ModuleList(
            self.block_class(config, quant_config, add_prefix(f"blocks.{index}", prefix))
            for index in range(config.depth)
        )
        self.merger = PatchMerger(
            width,
            out_width,
            config.spatial_merge_size,
            self.make_norm(width),
            quant_config,
            add_prefix("merger", prefix),
        )

    @staticmethod
    def widths_of(config: Any) -> tuple[int, int]:
        """Of a patch, and of the language model."""
        return config.embed_dim, config.hidden_size

    @staticmethod
    def make_norm(width: int) -> nn.Module:
        """The norm in front of the merger."""
        return LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        """Embeddings of pictures, one behind the other: [their tokens, hidden_size].

        Args:
            pixels: [patches, channels * time * height * width], those of a square side by side.
            grids: per picture (time, height, width) in patches.
        """
        projection = self.patch_embed["proj"]
        x = projection(pixels.to(projection.matrix.device, projection.matrix.dtype))
        rows, columns = grid_places(grids, self.merge_size)
        cos_sin = grid_rotation(rows, columns, self.head_dim, self.rope_base).to(x.device)
        segments = Segments(frame_lengths(grids), x.device)
        for block in self.blocks:
            x = block(x, segments, cos_sin)
        return self.merger(x)


class Qwen2VLForConditionalGeneration(Qwen2ForCausalLM):
    """Qwen2-VL with its output head.

    Args:
        config: a `transformers.Qwen2VLConfig`.
        quant_config, prefix: as for `LlamaForCausalLM`.
    """

    takes_whole_config: ClassVar[bool] = True
    has_mrope: ClassVar[bool] = True
    # Other layouts of the same tensors: the left side of a name as this class has it.
    checkpoint_renames: ClassVar[dict[str, str]] = {
        r"^model\.visual\.": "visual.",
        r"^model\.language_model\.": "model.",
    }
    vision_class: ClassVar[type[nn.Module]] = Qwen2VisionTransformer

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__(_with_mrope(text_config_of(config)), quant_config, prefix)
        self.config = config
        self.visual = self.vision_class(
            config.vision_config, quant_config, add_prefix("visual", prefix)
        )

    pad_input_ids = staticmethod(pad_input_ids)

    def get_image_feature(self, items: Sequence[MultimodalItem]) -> Tensor:
        """Embeddings of images and videos, one behind the other: [their tokens, hidden_size]."""
        grids = [item.data["grid_thw"].tolist() for item in items]
        return self.visual(torch.cat([item.pixel_values for item in items]), grids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
        get_embedding: bool = False,
    ) -> LogitsProcessorOutput:
        """As `LlamaForCausalLM.forward`; with M-RoPE's positions where the batch has some."""
        if forward_batch.mrope_positions is not None:
            positions = forward_batch.mrope_positions
        return super().forward(
            input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors, get_embedding
        )


def _with_mrope(text: Any) -> Any:
    """The config of the language model with the sections of M-RoPE, which old files leave out."""
    text.rope_parameters = {"mrope_section": [16, 24, 24], **text.rope_parameters}
    return text


def rope_base_of(config: Any) -> float:
    """The base of the tower's rotary positions."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)


def patch_shape_of(config: Any) -> tuple[int, int, int, int]:
    """(channels, time, height, width) of a patch."""
    side, depth = config.patch_size, config.temporal_patch_size
    height, width = side if isinstance(side, list | tuple) else (side, side)
    depth = depth[0] if isinstance(depth, list | tuple) else depth
    return config.in_channels, depth, height, width


def frame_lengths(grids: Sequence[Sequence[int]]) -> list[int]:
    """Patches of each point of time, all pictures one behind the other."""
    return [height * width for time, height, width in grids for _ in range(time)]


def grid_places(grids: Sequence[Sequence[int]], merge_size: int) -> tuple[Tensor, Tensor]:
    """The row and the column of each patch, [patches] int64, those of a square side by side."""
    rows, columns = [], []
    for time, height, width in grids:
        squares = (height // merge_size, merge_size, width // merge_size, merge_size)
        for places, axis in ((rows, 0), (columns, 1)):
            count = (height, width)[axis]
            place = torch.arange(count).unsqueeze(1 - axis).expand(height, width)
            places.append(place.reshape(squares).transpose(1, 2).flatten().repeat(time))
    return torch.cat(rows), torch.cat(columns)
