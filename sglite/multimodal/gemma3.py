"""Gemma 3 with vision."""

from typing import Any

from PIL import Image

from sglite.interface.errors import UnsupportedModelError
from sglite.multimodal.base_processor import BaseMultimodalProcessor
from sglite.multimodal.inputs import ProcessedMedia


class Gemma3ImageProcessor(BaseMultimodalProcessor):
    """Pixels [1, 3, side, side] float32 of a picture; its tokens see each other both ways.

    A placeholder is `<start_of_image>`; the model sees it with blank lines around, the picture's
    tokens behind it, and a token that ends them.
    """

    models = ("Gemma3ForConditionalGeneration",)
    whole_spans = True
    # Pictures are not cut up, and the number of their tokens is the model's.
    fixed_settings = frozenset(
        {
            "do_pan_and_scan",
            "pan_and_scan_max_num_crops",
            "pan_and_scan_min_crop_size",
            "pan_and_scan_min_ratio_to_activate",
            "size",
        }
    )

    def __init__(
        self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any
    ):
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        if getattr(self.image_processor, "do_pan_and_scan", None):
            raise UnsupportedModelError(
                "preprocessor_config.json has do_pan_and_scan: crops of a picture beside the whole "
                "are not implemented; set it to false to have pictures seen whole"
            )
        tokenizer = self.tokenizer
        self.image_token = getattr(tokenizer, "image_token", None) or "<image_soft_token>"
        self.begin = getattr(tokenizer, "boi_token", None) or "<start_of_image>"
        end = getattr(tokenizer, "eoi_token", None) or "<end_of_image>"
        self.image_placeholder = f"\n\n{self.begin}{self.image_token}{end}\n\n"

    def process_image(self, image: Image.Image) -> ProcessedMedia:
        """Pixels of an RGB image."""
        pixels = self.image_processor(
            images=[image], return_tensors="pt", do_pan_and_scan=False, do_convert_rgb=True
        )["pixel_values"]
        return ProcessedMedia("image", pixels, self.hf_config.mm_tokens_per_image, {})

    def prepare_text(self, text: str, *, is_rendered: bool = False) -> str:
        """The text with whole placeholders."""
        if not is_rendered:
            text = text.replace("<image>", self.begin)
        return text.replace(self.begin, self.image_placeholder)
