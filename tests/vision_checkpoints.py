"""Small vision-language checkpoints with random weights, and Hugging Face as their oracle."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from tests.cancelling import let_sums_cancel
from tests.checkpoints import VOCAB_SIZE, make_tokenizer

_TEXT = {
    "vocab_size": VOCAB_SIZE + 16,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
#: Pixels along a side of a patch.
_PATCH = 4
#: Pixels of a video's frame, at least and at most.
VIDEO_SIZES = (4 * (2 * _PATCH) ** 2, 20 * (2 * _PATCH) ** 2)
_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_IDS = {
    "vision_start_token_id": VOCAB_SIZE,
    "vision_end_token_id": VOCAB_SIZE + 1,
    "image_token_id": VOCAB_SIZE + 2,
    "video_token_id": VOCAB_SIZE + 3,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_QWEN_VISION = {"depth": 3, "num_heads": 2, "patch_size": _PATCH}
_QWEN_IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": _PATCH,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 4 * (2 * _PATCH) ** 2,
    "max_pixels": 48 * (2 * _PATCH) ** 2,
}
_SIDE = 24
_TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": _SIDE,
    "patch_size": _PATCH,
}
_CLIP = {**_TOWER, "model_type": "clip_vision_model", "projection_dim": 16}
_SIGLIP = {**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
# Two pixels more than six patches, as SigLIP's 384 are six more than 27 of 14.
_ODD_SIDE = _SIDE + 2
_ODD_PINPOINTS = [[26, 52], [52, 26], [52, 52], [78, 26], [26, 78]]
_CLIP_IMAGES = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": _SIDE},
    "crop_size": {"height": _SIDE, "width": _SIDE},
}
_PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
_LLAVA_IDS = {"image_token_index": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 1}


class Recipe(NamedTuple):
    """How a checkpoint is made: names of classes of transformers, and what its files say."""

    config_class: str
    model_class: str
    tokens: Sequence[str]  # those beside the tokenizer's own, from id `VOCAB_SIZE` on
    config: dict[str, Any]
    images: dict[str, Any]  # preprocessor_config.json


RECIPES = {
    "qwen2-vl": Recipe(
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        _QWEN_TOKENS,
        {
            **_QWEN_IDS,
            "text_config": {**_TEXT, "rope_parameters": _MROPE},
            "vision_config": {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        },
        _QWEN_IMAGES,
    ),
    "qwen2.5-vl": Recipe(
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        _QWEN_TOKENS,
        {
            **_QWEN_IDS,
            "text_config": {**_TEXT, "rope_parameters": _MROPE},
            "tie_word_embeddings": True,
            "vision_config": {
                **_QWEN_VISION,
                "hidden_size": 32,
                "intermediate_size": 48,
                "out_hidden_size": 64,
                "window_size": 24,
                "fullatt_block_indexes": [1],
                "tokens_per_second": 2,
            },
        },
        _QWEN_IMAGES,
    ),
    "llava": Recipe(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        ("<image>",),
        {
            **_LLAVA_IDS,
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": _CLIP,
        },
        _CLIP_IMAGES,
    ),
    "llava-next": Recipe(
        "LlavaNextConfig",
        "LlavaNextForConditionalGeneration",
        ("<image>",),
        {
            **_LLAVA_IDS,
            "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": None},
            "vision_config": _CLIP,
            "image_grid_pinpoints": _PINPOINTS,
            "vision_feature_layer": [-2, -1],
        },
        {
            **_CLIP_IMAGES,
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": _PINPOINTS,
        },
    ),
    "llava-onevision": Recipe(
        "LlavaOnevisionConfig",
        "LlavaOnevisionForConditionalGeneration",
        ("<image>", "<video>"),
        {
            **_LLAVA_IDS,
            "video_token_index": VOCAB_SIZE + 1,
            "text_config": {**_TEXT, "model_type": "qwen2"},
            "vision_config": {**_SIGLIP, "image_size": _ODD_SIDE},
            "image_grid_pinpoints": _ODD_PINPOINTS,
            "vision_aspect_ratio": "anyres_max_2",
        },
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": _ODD_SIDE, "width": _ODD_SIDE},
            "image_grid_pinpoints": _ODD_PINPOINTS,
        },
    ),
    "gemma3": Recipe(
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        ("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        {
            "boi_token_index": VOCAB_SIZE,
            "eoi_token_index": VOCAB_SIZE + 1,
            "image_token_index": VOCAB_SIZE + 2,
            "mm_tokens_per_image": 9,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "text_config": {
                **_TEXT,
                "head_dim": 16,
                "sliding_window": 7,
                "query_pre_attn_scalar": 16,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": _SIGLIP,
        },
        {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": _SIDE, "width": _SIDE},
            "do_convert_rgb": None,
        },
    ),
}
_QWEN_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def make_vision_checkpoint(
    folder: Path,
    name: str = "qwen2-vl",
    *,
    seed: int = 0,
    cancels: bool = False,
    **overrides: Any,
) -> Path:
    """Writes a checkpoint as Hugging Face writes it, with tokenizer and image processor.

    Args:
        folder: where to; made if it is not there.
        name: a key of `RECIPES`.
        seed: of the weights.
        cancels: whether the text model's sums of products cancel, see `tests.cancelling`.
        **overrides: of the whole config.
    """
    recipe = RECIPES[name]
    # A copy, since config classes change the dicts that they are given.
    values = json.loads(json.dumps({**recipe.config, **overrides}))
    config = getattr(transformers, recipe.config_class)(**values)
    model = getattr(transformers, recipe.model_class)._from_config(config)
    _draw_weights(model, seed)
    if cancels:
        let_sums_cancel(model)
    _generate_no_placeholders(model)
    model.eval().save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(recipe.tokens)})
    tokenizer.chat_template = _QWEN_TEMPLATE if "qwen" in name else None
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(recipe.images))
    if "video_token_id" in values:
        sizes = dict(zip(("min_pixels", "max_pixels"), VIDEO_SIZES, strict=True))
        settings = json.dumps({**recipe.images, **sizes})
        (folder / "video_preprocessor_config.json").write_text(settings)
    return folder


def _generate_no_placeholders(model: nn.Module) -> None:
    """Has their logits be 0, never the best: Hugging Face would want a picture for each."""
    names = ("image_token_id", "video_token_id")
    ids = [getattr(model.config, name) for name in names if hasattr(model.config, name)]
    with torch.no_grad():
        model.get_output_embeddings().weight[ids] = 0


def _draw_weights(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name or "ln_q" in name
            if is_norm and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * draw)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * draw)
            else:
                parameter.copy_(2 * draw / math.sqrt(math.prod(parameter.shape[1:])))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Large random blocks of colour and noise upon them, RGB."""
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
    noise = draw.integers(-20, 20, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def words(count: int, seed: int = 0) -> str:
    """Random words."""
    draw = random.Random(seed)
    return "".join(
        " " + "".join(draw.choice("abcdefghij") for _ in range(draw.randrange(2, 7)))
        for _ in range(count)
    )


class Oracle:
    """A checkpoint in Hugging Face with eager attention; pixels by Hugging Face's own processor.

    Attributes:
        takes_videos: whether prompts may have videos.
    """

    takes_videos = False

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        self.config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, self.config.architectures[0])
        self.model = kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def inputs(self, text: str, images: Sequence[Any], videos: Sequence[Any]) -> dict[str, Any]:
        """What the model takes for a prompt in which `<image>` and `<video>` are placeholders."""
        raise NotImplementedError

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        """Of every position, [tokens, vocabulary] float32."""
        with torch.no_grad():
            return self.model(**inputs).logits[0].float()

    def extended(self, inputs: dict[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
        """The same prompt with text tokens behind it."""
        inputs = dict(inputs)
        behind = torch.tensor([list(tokens)])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], behind], 1)
        # What tells a model which tokens stand for images.
        for key in ("mm_token_type_ids", "token_type_ids"):
            if key in inputs:
                inputs[key] = torch.cat([inputs[key], torch.zeros_like(behind)], 1)
        return inputs


class QwenOracle(Oracle):
    """Qwen2-VL and Qwen2.5-VL; placeholders are repeated here, videos cut up by a naive loop."""

    takes_videos = True

    def inputs(self, text: str, images: Sequence[Any], videos: Sequence[Any]) -> dict[str, Any]:
        """What the model takes."""
        inputs: dict[str, Any] = {}
        grids: dict[int, list] = {self.config.image_token_id: [], self.config.video_token_id: []}
        if images:
            inputs |= self.image_processor(images=list(images), return_tensors="pt")
            grids[self.config.image_token_id] = inputs["image_grid_thw"].tolist()
        if videos:
            found = [naive_video(frames, self.image_processor) for frames in videos]
            inputs["pixel_values_videos"] = torch.cat([pixels for pixels, _ in found])
            inputs["video_grid_thw"] = torch.tensor([grid for _, grid in found])
            grids[self.config.video_token_id] = inputs["video_grid_thw"].tolist()
        for kind in ("image", "video"):
            own = f"<|vision_start|><|{kind}_pad|><|vision_end|>"
            text = text.replace(f"<{kind}>", own)
        ids: list[int] = []
        kinds: list[int] = []
        numbers = {self.config.image_token_id: 1, self.config.video_token_id: 2}
        for token in self.tokenizer.encode(text):
            count = math.prod(grids[token].pop(0)) // 4 if token in grids else 1
            ids += [token] * count
            kinds += [numbers.get(token, 0)] * count
        inputs["input_ids"] = torch.tensor([ids])
        inputs["mm_token_type_ids"] = torch.tensor([kinds])
        return inputs

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        """Of every position, [tokens, vocabulary] float32."""
        self.model.model.rope_deltas = None
        return super().logits(inputs)


def naive_video(frames: Sequence[Image.Image], processor: Any) -> tuple[Tensor, list[int]]:
    """Pixels [patches, 3 * 2 * patch ** 2] of a video, and its grid, patch by patch."""
    side = processor.patch_size
    height, width = smart_resize(frames[0].height, frames[0].width, 2 * side, *VIDEO_SIZES)
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    planes = [
        (np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC)) / 255 - mean) / std
        for frame in frames
    ]
    if len(planes) % 2:
        planes.append(planes[-1])
    grid = [len(planes) // 2, height // side, width // side]
    patches = []
    for time in range(grid[0]):
        for top in range(0, grid[1], 2):
            for left in range(0, grid[2], 2):
                for row in (top, top + 1):
                    for column in (left, left + 1):
                        patches.append(
                            [
                                planes[2 * time + frame][row * side + y, column * side + x, channel]
                                for channel in range(3)
                                for frame in range(2)
                                for y in range(side)
                                for x in range(side)
                            ]
                        )
    return torch.tensor(np.array(patches, np.float32)), grid


class LlavaOracle(Oracle):
    """LLaVA 1.5, NeXT and OneVision; the number of tokens is Hugging Face's own."""

    def inputs(self, text: str, images: Sequence[Any], videos: Sequence[Any]) -> dict[str, Any]:
        """What the model takes."""
        name = self.config.model_type
        inputs: dict[str, Any] = {}
        if images:
            given = [list(images)] if name == "llava_onevision" else list(images)
            inputs = dict(self.image_processor(images=given, return_tensors="pt"))
        counter = self._counter()
        ids: list[int] = []
        number = 0
        for token in self.tokenizer.encode(text):
            count = 1
            if token == self.config.image_token_id:
                count = counter(inputs, number).count("<image>")
                number += 1
            ids += [token] * count
        inputs["input_ids"] = torch.tensor([ids])
        return inputs

    def _counter(self):
        """`replace_image_token` of Hugging Face's processor, which needs no video processor."""
        from transformers.models.llava.processing_llava import LlavaProcessor
        from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
        from transformers.models.llava_onevision.processing_llava_onevision import (
            LlavaOnevisionProcessor,
        )

        kind = {
            "llava": LlavaProcessor,
            "llava_next": LlavaNextProcessor,
            "llava_onevision": LlavaOnevisionProcessor,
        }[self.config.model_type]
        processor = self.processor = kind.__new__(kind)
        vars(processor).update(
            image_token="<image>",
            video_token="<video>",
            patch_size=_PATCH,
            num_additional_image_tokens=1,
            num_image_tokens=(_SIDE // _PATCH) ** 2,
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
            vision_aspect_ratio=getattr(self.config, "vision_aspect_ratio", None),
            image_processor=self.image_processor,
        )
        return processor.replace_image_token


class OnevisionOracle(LlavaOracle):
    """LLaVA-OneVision, with videos of frames that are stretched to squares by a naive loop."""

    takes_videos = True

    def inputs(self, text: str, images: Sequence[Any], videos: Sequence[Any]) -> dict[str, Any]:
        """What the model takes."""
        inputs = super().inputs(text, images, [])
        if not videos:
            return inputs
        (frames,) = videos
        mean, std = (
            np.array(values)[:, None, None]
            for values in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        planes = []
        for frame in frames:
            small = frame.resize((_ODD_SIDE, _ODD_SIDE), Image.Resampling.BICUBIC)
            planes.append((np.asarray(small).transpose(2, 0, 1) / 255 - mean) / std)
        inputs["pixel_values_videos"] = torch.tensor(np.array(planes, np.float32))[None]
        ids = inputs["input_ids"][0].tolist()
        place = ids.index(self.config.video_token_id)
        count = self.processor.replace_video_token(inputs, 0).count("<video>")
        ids[place : place + 1] = [ids[place]] * count
        inputs["input_ids"] = torch.tensor([ids])
        return inputs


class GemmaOracle(Oracle):
    """Gemma 3."""

    def inputs(self, text: str, images: Sequence[Any], videos: Sequence[Any]) -> dict[str, Any]:
        """What the model takes."""
        whole = "<start_of_image>" + "<image_soft_token>" * 9 + "<end_of_image>"
        ids = self.tokenizer.encode(text.replace("<image>", f"\n\n{whole}\n\n"))
        inputs = {"input_ids": torch.tensor([ids])}
        inputs["token_type_ids"] = (inputs["input_ids"] == self.config.image_token_id).long()
        if images:
            found = self.image_processor(images=list(images), return_tensors="pt")
            inputs["pixel_values"] = found["pixel_values"]
        return inputs


#: Per name of a checkpoint its oracle.
ORACLES: dict[str, type[Oracle]] = {
    "qwen2-vl": QwenOracle,
    "qwen2.5-vl": QwenOracle,
    "llava": LlavaOracle,
    "llava-next": LlavaOracle,
    "llava-onevision": OnevisionOracle,
    "gemma3": GemmaOracle,
}
