"""LLaVA 1.5, LLaVA-NeXT and LLaVA-OneVision."""

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image

from sglite.multimodal.base_processor import BaseMultimodalProcessor
from sglite.multimodal.chat_templates import register_chat_template
from sglite.multimodal.inputs import ProcessedMedia
from sglite.multimodal.tiling import crop_of, shrunk

# What the files for videos may have other than those for images.
_VIDEO_SETTINGS = ("size", "resample", "rescale_factor", "image_mean", "image_std")


class LlavaFamilyProcessor(BaseMultimodalProcessor):
    """Pixels [1, 3, side, side] float32 of a picture."""

    def __init__(
        self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any
    ):
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.image_token = getattr(self.tokenizer, "image_token", None) or "<image>"
        self.image_placeholder = self.image_token
        vision = hf_config.vision_config
        self.side = vision.image_size // vision.patch_size
        has_class_token = vision.model_type == "clip_vision_model"
        drops_first = hf_config.vision_feature_select_strategy == "default"
        #: Tokens of one whole picture.
        self.num_patches = self.side**2 + has_class_token - drops_first

    def process_image(self, image: Image.Image) -> ProcessedMedia:
        """Pixels of an RGB image."""
        pixels = self.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        return ProcessedMedia("image", pixels, self.num_patches, {})


class LlavaImageProcessor(LlavaFamilyProcessor):
    """That of LLaVA 1.5."""

    models = ("LlavaForConditionalGeneration",)


class LlavaNextImageProcessor(LlavaFamilyProcessor):
    """Pixels [1 + tiles, 3, side, side] float32: the whole picture, small, then its tiles.

    `data["tiles"]` is (tiles down, tiles across), `data["image_size"]` (height, width) in pixels.
    """

    models = ("LlavaNextForConditionalGeneration",)

    def process_image(self, image: Image.Image) -> ProcessedMedia:
        """Pixels of an RGB image."""
        from transformers.image_processing_utils import select_best_resolution

        found = self.image_processor(images=[image], return_tensors="pt")
        pixels = found["pixel_values"][0]
        height, width = (int(value) for value in found["image_sizes"][0])
        tile = self.hf_config.vision_config.image_size
        pinpoints = self.image_processor.image_grid_pinpoints
        best = select_best_resolution((height, width), [list(size) for size in pinpoints])
        down, across = best[0] // tile, best[1] // tile
        rows, columns = crop_of(down * self.side, across * self.side, height, width)
        rows, columns = self.shrunk(rows.stop - rows.start, columns.stop - columns.start)
        count = self.num_patches + rows * (columns + 1)
        data = {"tiles": (down, across), "image_size": (height, width)}
        return ProcessedMedia("image", pixels, count, data)

    def shrunk(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of patches that are left of a picture; here all."""
        return rows, columns


class LlavaOnevisionImageProcessor(LlavaNextImageProcessor):
    """As for LLaVA-NeXT; a picture that is not alone in its prompt is not cut into tiles.

    Pixels of a video are [frames, 3, side, side] float32: each frame whole, stretched to a square.
    """

    models = ("LlavaOnevisionForConditionalGeneration",)

    def __init__(
        self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any
    ):
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.video_token = getattr(self.tokenizer, "video_token", None) or "<video>"
        self.video_placeholder = self.video_token

    def process_video(self, frames: Sequence[Image.Image]) -> ProcessedMedia:
        """Pixels of a video's frames."""
        settings = self._processor.video_settings
        given = {key: settings[key] for key in _VIDEO_SETTINGS if settings.get(key) is not None}
        side = self.hf_config.vision_config.image_size
        # Each is a picture in a single tile, which stands behind the whole.
        found = self.image_processor(
            images=list(frames), image_grid_pinpoints=[[side, side]], return_tensors="pt", **given
        )
        pixels = found["pixel_values"][:, 0].contiguous()
        count = len(pixels) * math.ceil(self.side / 2) ** 2 + 1
        return ProcessedMedia("video", pixels, count, {})

    def process_images(self, images: Sequence[Image.Image]) -> list[ProcessedMedia]:
        """Pixels of all images of a prompt."""
        if len(images) == 1:
            return super().process_images(images)
        found = self.image_processor(images=[list(images)], return_tensors="pt")["pixel_values"]
        # One row more for a newline.
        count = self.num_patches + 1
        return [ProcessedMedia("image", pixels[:1], count, {}) for pixels in found]

    def shrunk(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of patches that are left of a picture."""
        return shrunk(rows, columns, self.side, self.hf_config.vision_aspect_ratio)


# That of Vicuna, which LLaVA 1.5 was trained with; a checkpoint with one of its own has another
# language model inside.
register_chat_template(
    LlavaImageProcessor,
    "{% for message in messages %}{% if message.role != 'system' %}{{ message.role | upper }}: "
    "{% endif %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% elif "
    "part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    replaces=False,
)
