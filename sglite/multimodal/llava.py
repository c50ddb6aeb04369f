"""LLaVA 1.5, LLaVA-NeXT and LLaVA-OneVision."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from sglite.multimodal.base_processor import BaseMultimodalProcessor, ProcessedMedia
from sglite.multimodal.chat_templates import register_chat_template
from sglite.multimodal.tiling import crop_of, shrunk


class LlavaImageProcessor(BaseMultimodalProcessor):
    """Pixels [1, 3, side, side] float32 of a picture."""

    models = ("LlavaForConditionalGeneration",)

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


class LlavaNextImageProcessor(LlavaImageProcessor):
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
    """As for LLaVA-NeXT; a picture that is not alone in its prompt is not cut into tiles."""

    models = ("LlavaOnevisionForConditionalGeneration",)

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


# That of Vicuna, which LLaVA 1.5 was trained with.
register_chat_template(
    LlavaImageProcessor,
    "{% for message in messages %}{{ message.role | upper }}: {% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<image>\n{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
)
