"""Small vision-language checkpoints without a file of their own, and Hugging Face as the oracle."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from transformers.models.auto import processing_auto

from tests.checkpoints import VOCAB_SIZE, make_tokenizer
from tests.vision_checkpoints import _TEXT, Oracle, _draw_weights

_LLAMA = {**_TEXT, "model_type": "llama", "vocab_size": VOCAB_SIZE + 48, "pad_token_id": None}
_QWEN2 = {**_LLAMA, "model_type": "qwen2"}
_TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
_ENDS = {"bos_token_id": 0, "eos_token_id": 1}
_TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_IDEFICS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *_TILES)
_IDEFICS_CONFIG = {
    **_ENDS,
    "text_config": _LLAMA,
    "vision_config": _TOWER,
    "image_token_id": VOCAB_SIZE,
    "scale_factor": 2,
    "pad_token_id": 1,
}
_IDEFICS_IMAGES = {
    "size": {"longest_edge": 48},
    "max_image_size": {"longest_edge": 24},
    "do_image_splitting": True,
}
_SQUARE = {"size": {"height": 24, "width": 24}}
_CROPS = {**_SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4}
_GLM_TOKENS = ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|video|>")
_GLM_IDS = {
    "image_start_token_id": VOCAB_SIZE,
    "image_end_token_id": VOCAB_SIZE + 1,
    "image_token_id": VOCAB_SIZE + 2,
    "video_token_id": VOCAB_SIZE + 3,
    "video_start_token_id": VOCAB_SIZE + 4,
    "video_end_token_id": VOCAB_SIZE + 5,
}
_GRIDS = {
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 2 * 4 * 8**2, "longest_edge": 2 * 40 * 8**2},
}
_GLM_VISION = {
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "out_hidden_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "image_size": 24,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_GLM_ROPE = {**_MROPE, "partial_rotary_factor": 1.0}


class Stranger(NamedTuple):
    """How a checkpoint is made: classes of transformers, and what its files say."""

    config_class: str
    model_class: str
    processor_class: str
    image_processor: str
    tokens: Sequence[str]  # those beside the tokenizer's own, from id `VOCAB_SIZE` on
    config: dict[str, Any]
    images: dict[str, Any]  # preprocessor_config.json
    settings: Mapping[str, Any] = MappingProxyType({})  # processor_config.json
    names: Mapping[str, str] = MappingProxyType({})  # tokens that the tokenizer has as attributes


#: What runs, by the names of tests.
RUN = {
    "idefics3": Stranger(
        "Idefics3Config",
        "Idefics3ForConditionalGeneration",
        "Idefics3Processor",
        "Idefics3ImageProcessor",
        _IDEFICS,
        _IDEFICS_CONFIG,
        _IDEFICS_IMAGES,
        {"image_seq_len": 9},
    ),
    "smolvlm": Stranger(
        "SmolVLMConfig",
        "SmolVLMForConditionalGeneration",
        "SmolVLMProcessor",
        "SmolVLMImageProcessor",
        _IDEFICS,
        _IDEFICS_CONFIG,
        _IDEFICS_IMAGES,
        {"image_seq_len": 9},
    ),
    "internvl": Stranger(
        "InternVLConfig",
        "InternVLForConditionalGeneration",
        "InternVLProcessor",
        "GotOcr2ImageProcessor",
        ("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
        {
            **_ENDS,
            "text_config": _QWEN2,
            "vision_config": {**_TOWER, "image_size": [24, 24], "patch_size": [4, 4]},
            "image_token_id": VOCAB_SIZE,
            "image_seq_length": 9,
        },
        _CROPS,
        {"image_seq_length": 9},
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "aya-vision": Stranger(
        "AyaVisionConfig",
        "AyaVisionForConditionalGeneration",
        "AyaVisionProcessor",
        "GotOcr2ImageProcessor",
        ("<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE_GLOBAL", "TILE"),
        {
            **_ENDS,
            "text_config": {**_LLAMA, "model_type": "cohere2", "sliding_window": 7},
            "vision_config": {**_TOWER, "model_type": "siglip_vision_model"},
            "image_token_index": VOCAB_SIZE,
            "downsample_factor": 2,
            "adapter_layer_norm_eps": 1e-6,
            "alignment_intermediate_size": 64,
        },
        _CROPS,
        {"patch_size": 4, "img_size": 24, "downsample_factor": 2},
    ),
    "mistral3": Stranger(
        "Mistral3Config",
        "Mistral3ForConditionalGeneration",
        "PixtralProcessor",
        "PixtralImageProcessor",
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        {
            **_ENDS,
            "text_config": {**_LLAMA, "model_type": "mistral", "sliding_window": None},
            "vision_config": {**_TOWER, "model_type": "pixtral", "image_size": 48},
            "image_token_index": VOCAB_SIZE,
            "spatial_merge_size": 2,
        },
        {"size": {"longest_edge": 48}, "patch_size": 4},
        {"patch_size": 4, "spatial_merge_size": 2},
    ),
    "lighton-ocr": Stranger(
        "LightOnOcrConfig",
        "LightOnOcrForConditionalGeneration",
        "LightOnOcrProcessor",
        "PixtralImageProcessor",
        ("<|image_pad|>", "<|vision_pad|>", "<|vision_end|>"),
        {
            **_ENDS,
            "text_config": {**_LLAMA, "model_type": "qwen3", "head_dim": 16},
            "vision_config": {**_TOWER, "model_type": "pixtral", "image_size": 48},
            "image_token_id": VOCAB_SIZE,
            "spatial_merge_size": 2,
        },
        {"size": {"longest_edge": 48}, "patch_size": 4},
        {"patch_size": 4, "spatial_merge_size": 2},
        {
            "image_token": "<|image_pad|>",
            "image_break_token": "<|vision_pad|>",
            "image_end_token": "<|vision_end|>",
        },
    ),
    "vip-llava": Stranger(
        "VipLlavaConfig",
        "VipLlavaForConditionalGeneration",
        "LlavaProcessor",
        "CLIPImageProcessor",
        ("<image>",),
        {
            **_ENDS,
            "text_config": _LLAMA,
            "vision_config": {**_TOWER, "model_type": "clip_vision_model", "projection_dim": 16},
            "image_token_index": VOCAB_SIZE,
            "vision_feature_layers": [-2, -1],
        },
        {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
        {
            "patch_size": 4,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "ovis2": Stranger(
        "Ovis2Config",
        "Ovis2ForConditionalGeneration",
        "Ovis2Processor",
        "Ovis2ImageProcessor",
        (
            *("<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
            "<image>",
        ),
        {
            **_ENDS,
            "text_config": _QWEN2,
            "vision_config": {
                **_TOWER,
                "hidden_stride": 2,
                "vocab_size": 40,
                "num_visual_indicator_tokens": 5,
            },
            "image_token_id": VOCAB_SIZE,
            "visual_indicator_token_ids": [VOCAB_SIZE + index for index in range(1, 6)],
            "vocab_size": VOCAB_SIZE + 48,
            "hidden_size": 64,
        },
        _CROPS,
        {"image_seq_length": 9},
        {"image_token": "<IMG_ATOM>"},
    ),
    "glm4v": Stranger(
        "Glm4vConfig",
        "Glm4vForConditionalGeneration",
        "Glm4vProcessor",
        "Glm4vImageProcessor",
        _GLM_TOKENS,
        {
            **_ENDS,
            **_GLM_IDS,
            "text_config": {**_LLAMA, "model_type": "glm4v_text", "rope_parameters": _GLM_ROPE},
            "vision_config": _GLM_VISION,
        },
        _GRIDS,
    ),
    "glm46v": Stranger(
        "Glm46VConfig",
        "Glm46VForConditionalGeneration",
        "Glm46VProcessor",
        "Glm46VImageProcessor",
        _GLM_TOKENS,
        {
            **_ENDS,
            **_GLM_IDS,
            "text_config": {**_LLAMA, "model_type": "glm4v_text", "rope_parameters": _GLM_ROPE},
            "vision_config": {**_GLM_VISION, "model_type": "glm4v_vision"},
        },
        _GRIDS,
    ),
    "paddleocr-vl": Stranger(
        "PaddleOCRVLConfig",
        "PaddleOCRVLForConditionalGeneration",
        "PaddleOCRVLProcessor",
        "PaddleOCRVLImageProcessor",
        ("<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>", "<|video_pad|>"),
        {
            **_ENDS,
            "text_config": {
                **_LLAMA,
                "model_type": "paddleocr_vl_text",
                "rope_parameters": _MROPE,
                "head_dim": 16,
            },
            "vision_config": _TOWER,
            "vision_start_token_id": VOCAB_SIZE,
            "vision_end_token_id": VOCAB_SIZE + 1,
            "image_token_id": VOCAB_SIZE + 2,
            "video_token_id": VOCAB_SIZE + 3,
        },
        {**_GRIDS, "temporal_patch_size": 1, "min_pixels": 4 * 8**2, "max_pixels": 40 * 8**2},
        {},
        {"image_token": "<|IMAGE_PLACEHOLDER|>"},
    ),
    "video-llama3": Stranger(
        "VideoLlama3Config",
        "VideoLlama3ForConditionalGeneration",
        "VideoLlama3Processor",
        "VideoLlama3ImageProcessor",
        ("<image>", "<video>"),
        {
            **_ENDS,
            "text_config": _QWEN2,
            "vision_config": _TOWER,
            "image_token_id": VOCAB_SIZE,
            "video_token_id": VOCAB_SIZE + 1,
        },
        {**_GRIDS, "temporal_patch_size": 1, "merge_size": 1},
        {},
        {"image_token": "<image>", "video_token": "<video>"},
    ),
}


def _moved(*names: str) -> dict[str, Stranger]:
    return {name: RUN.pop(name) for name in names}


_NEEDING = _moved("smolvlm", "mistral3", "ovis2", "video-llama3")
#: What is refused, and a part of the message.
REFUSED = {
    "smolvlm": (_NEEDING["smolvlm"], "num2words"),
    "mistral3": (_NEEDING["mistral3"], "Torchvision"),
    "ovis2": (_NEEDING["ovis2"], "visual_indicator_token_ids"),
    "video-llama3": (_NEEDING["video-llama3"], "image_merge_sizes"),
    "qwen3-vl": (
        Stranger(
            "Qwen3VLConfig",
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLProcessor",
            "Qwen2VLImageProcessor",
            ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
            {
                **_ENDS,
                "text_config": {
                    **_LLAMA,
                    "model_type": "qwen3_vl_text",
                    "head_dim": 16,
                    "rope_parameters": _MROPE,
                },
                "vision_config": {**_GLM_VISION, "deepstack_visual_indexes": [0, 1]},
                "vision_start_token_id": VOCAB_SIZE,
                "vision_end_token_id": VOCAB_SIZE + 1,
                "image_token_id": VOCAB_SIZE + 2,
                "video_token_id": VOCAB_SIZE + 3,
            },
            _GRIDS,
        ),
        "deepstack",
    ),
    "mllama": (
        Stranger(
            "MllamaConfig",
            "MllamaForConditionalGeneration",
            "MllamaProcessor",
            "MllamaImageProcessor",
            ("<|image|>",),
            {
                "text_config": {
                    **_LLAMA,
                    "model_type": "mllama_text_model",
                    "cross_attention_layers": [1],
                    "pad_token_id": 1,
                },
                "vision_config": {
                    "hidden_size": 24,
                    "num_hidden_layers": 2,
                    "num_global_layers": 1,
                    "attention_heads": 2,
                    "image_size": 24,
                    "patch_size": 4,
                    "intermediate_size": 40,
                    "vision_output_dim": 48,
                    "intermediate_layers_indices": [0],
                },
                "image_token_index": VOCAB_SIZE,
            },
            {"size": {"height": 24, "width": 24}, "max_image_tiles": 1},
        ),
        "cross-attention",
    ),
    "cohere2-vision": (
        Stranger(
            "Cohere2VisionConfig",
            "Cohere2VisionForConditionalGeneration",
            "Cohere2VisionProcessor",
            "Cohere2VisionImageProcessor",
            ("<|IMG_PATCH|>",),
            {
                "text_config": {**_LLAMA, "model_type": "cohere2"},
                "vision_config": {**_TOWER, "model_type": "siglip_vision_model"},
                "image_token_id": VOCAB_SIZE,
                "downsample_factor": 2,
                "alignment_intermediate_size": 64,
            },
            _SQUARE,
        ),
        "Pillow alone",
    ),
    "paligemma": (
        Stranger(
            "PaliGemmaConfig",
            "PaliGemmaForConditionalGeneration",
            "PaliGemmaProcessor",
            "SiglipImageProcessor",
            ("<image>",),
            {
                "text_config": {**_LLAMA, "model_type": "gemma", "head_dim": 16},
                "vision_config": {
                    **_TOWER,
                    "model_type": "siglip_vision_model",
                    "projection_dim": 64,
                    "vision_use_head": False,
                },
                "image_token_index": VOCAB_SIZE,
                "projection_dim": 64,
                "hidden_size": 64,
            },
            _SQUARE,
        ),
        "neither causal",
    ),
}


def make_stranger(folder: Path, one: Stranger, *, seed: int = 0) -> Path:
    """Writes a checkpoint as Hugging Face writes it, with what its processor needs."""
    values = json.loads(json.dumps(one.config))
    config = getattr(transformers, one.config_class)(**values)
    model = getattr(transformers, one.model_class)._from_config(config)
    _draw_weights(model, seed)
    model.eval().save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(one.tokens)})
    tokenizer.chat_template = None
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    saved = json.loads(path.read_text())
    saved |= {"processor_class": one.processor_class, "extra_special_tokens": dict(one.names)}
    saved |= {"additional_special_tokens": list(one.tokens)}
    path.write_text(json.dumps(saved))
    images = {"image_processor_type": one.image_processor, **one.images}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    settings = {"processor_class": one.processor_class, **one.settings}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


class StrangerOracle(Oracle):
    """Any model, with Hugging Face's own processor of whole prompts."""

    def __init__(self, folder: Path, one: Stranger):
        super().__init__(folder)
        kind = processing_auto.processor_class_from_name(one.processor_class)
        parts = {"tokenizer": self.tokenizer, "image_processor": self.image_processor}
        with mock.patch.object(kind, "check_argument_for_proper_class"):
            given = {name: parts.get(name) for name in kind.get_attributes()}
            self.processor = kind(**given, **one.settings)

    def inputs(self, text: str, images: Sequence[Any], videos: Sequence[Any]) -> dict[str, Any]:
        """What the model takes."""
        text = text.replace("<image>", self.processor.image_token)
        found = dict(self.processor(images=list(images) or None, text=[text], return_tensors="pt"))
        found.pop("attention_mask", None)
        return found

    def logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Of every position, [tokens, vocabulary] float32."""
        if hasattr(self.model.model, "rope_deltas"):
            self.model.model.rope_deltas = None
        return super().logits({"use_cache": False, **inputs})

    def greedy(self, inputs: dict[str, Any], count: int) -> tuple[list[int], list[float]]:
        """Tokens, each from a forward pass over everything before it; and how far apart the two
        best logits of each were, relative to the largest.

        A placeholder that is drawn is the last one: the class has no picture to put in its place.
        """
        tokens, gaps = [], []
        while len(tokens) < count and self.config.image_token_id not in tokens:
            logits = self.logits(inputs)[-1]
            best = logits.topk(2).values
            tokens.append(int(logits.argmax()))
            gaps.append(float((best[0] - best[1]) / logits.abs().max()))
            inputs = self.extended(inputs, tokens[-1:])
        return tokens, gaps
