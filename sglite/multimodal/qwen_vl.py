"""Qwen2-VL and Qwen2.5-VL: pictures of any size, as a grid of patches; videos likewise."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sglite.multimodal.base_processor import BaseMultimodalProcessor
from sglite.multimodal.inputs import MultimodalItem, ProcessedMedia
from sglite.multimodal.rope_positions import Grid, mrope_positions
from sglite.multimodal.videos import Video

# Of a video's frames, where the checkpoint has no file for them.
_VIDEO_SIZE = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}


class QwenVLImageProcessor(BaseMultimodalProcessor):
    """Pixels [patches, 3 * temporal_patch * patch ** 2] float32, patches that merge side by side.

    `data["grid_thw"]` is int64[3]: patches along time, height and width. One token stands for
    `merge_size ** 2` patches. A video is cut into pairs of frames (`temporal_patch_size`), the last
    one repeated where one is missing; a picture is a pair of itself. Qwen2.5-VL's positions along
    time follow the clock, and so depend on the rate of the frames.
    """

    models = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")

    def __init__(
        self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any
    ):
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.image_token = getattr(self.tokenizer, "image_token", None) or "<|image_pad|>"
        self.video_token = getattr(self.tokenizer, "video_token", None) or "<|video_pad|>"
        self.image_placeholder = f"<|vision_start|>{self.image_token}<|vision_end|>"
        self.video_placeholder = f"<|vision_start|>{self.video_token}<|vision_end|>"

    def process_image(self, image: Image.Image) -> ProcessedMedia:
        """Pixels of an RGB image."""
        found = self.image_processor(images=[image], return_tensors="pt")
        (grid,) = found["image_grid_thw"]
        return self._media("image", found["pixel_values"], grid, {})

    def process_video(self, frames: Video) -> ProcessedMedia:
        """Pixels of a video's frames."""
        settings = self._processor.video_settings
        size = dict(settings.get("size") or _VIDEO_SIZE)
        for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
            if settings.get(name) is not None:
                size[edge] = settings[name]
        found = self.image_processor(images=list(frames), size=size, return_tensors="pt")
        grids = found["image_grid_thw"]
        pixels, num_points = self._pairs(found["pixel_values"], len(frames))
        grid = torch.stack([torch.tensor(num_points), grids[0, 1], grids[0, 2]])
        return self._media("video", pixels, grid, self.video_data(frames.fps))

    def video_data(self, fps: float | None) -> dict[str, Any]:
        """What else the positions of a video depend on; part of its digest.

        Args:
            fps: its frames per second; None: as many as the checkpoint samples videos at.
        """
        vision = self.hf_config.vision_config
        rate = getattr(vision, "tokens_per_second", None)
        if rate is None:
            return {}
        fps = fps or self._processor.video_settings.get("fps") or 2.0
        seconds = self.image_processor.temporal_patch_size / fps
        # In float32, where Hugging Face's positions are counted.
        return {"interval": float(np.float32(rate) * np.float32(seconds))}

    def _pairs(self, pixels: Tensor, num_frames: int) -> tuple[Tensor, int]:
        """Patches of pairs of frames, from those in which each frame is a pair of itself."""
        depth = self.image_processor.temporal_patch_size
        side = self.image_processor.patch_size
        frames = pixels.view(num_frames, -1, 3, depth, side * side)[:, :, :, 0]
        if missing := -num_frames % depth:
            frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        pairs = frames.unflatten(0, (-1, depth)).permute(0, 2, 3, 1, 4)
        return pairs.reshape(-1, pixels.shape[1]), pairs.shape[0]

    def _media(
        self, modality: str, pixels: Tensor, grid: Tensor, data: dict[str, Any]
    ) -> ProcessedMedia:
        count = int(grid.prod()) // self.image_processor.merge_size**2
        return ProcessedMedia(modality, pixels, count, {"grid_thw": grid, **data})

    def positions(
        self, token_ids: Sequence[int], items: Sequence[MultimodalItem]
    ) -> tuple[NDArray[np.int64], int]:
        """The three rows of M-RoPE."""
        merge = self.image_processor.merge_size
        grids = []
        for item in items:
            time, height, width = item.data["grid_thw"].tolist()
            interval = item.data.get("interval", 1.0)
            grids.append(Grid(item.start, time, height // merge, width // merge, interval))
        return mrope_positions(len(token_ids), grids)
