"""Small vision-language checkpoints with random weights, and Hugging Face as their oracle."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

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
#: Further tokens, from id `VOCAB_SIZE` on.
_TOKENS = {
    "qwen2-vl": ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
}
_PATCH = 4
_QWEN2_VL = {
    "text_config": {
        **_TEXT,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
        },
    },
    "vision_config": {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 2,
        "patch_size": _PATCH,
        "mlp_ratio": 2,
    },
    "vision_start_token_id": VOCAB_SIZE,
    "vision_end_token_id": VOCAB_SIZE + 1,
    "image_token_id": VOCAB_SIZE + 2,
    "video_token_id": VOCAB_SIZE + 3,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
#: Per name the config class, the model class and what the config says.
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2-vl": ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration", _QWEN2_VL),
}
_PREPROCESSORS: dict[str, dict[str, Any]] = {
    "qwen2-vl": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": _PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 4 * (2 * _PATCH) ** 2,
        "max_pixels": 48 * (2 * _PATCH) ** 2,
    },
}
_QWEN_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def make_vision_checkpoint(
    folder: Path, name: str = "qwen2-vl", *, seed: int = 0, **overrides: Any
) -> Path:
    """Writes a checkpoint as Hugging Face writes it, with tokenizer and image processor.

    Args:
        folder: where to; made if it is not there.
        name: a key of `_MODELS`.
        seed: of the weights.
        **overrides: of the whole config.
    """
    config_class, model_class, values = _MODELS[name]
    config = getattr(transformers, config_class)(**json.loads(json.dumps({**values, **overrides})))
    model = getattr(transformers, model_class)._from_config(config)
    _draw_weights(model, seed)
    model.eval().save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(_TOKENS[name])})
    tokenizer.chat_template = _QWEN_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSORS[name]))
    return folder


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
                parameter.copy_(draw / math.sqrt(math.prod(parameter.shape[1:])))


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


class QwenOracle:
    """A Qwen2-VL or Qwen2.5-VL checkpoint in Hugging Face, float32, with eager attention.

    Pixels come from Hugging Face's image processor; placeholders are put in by hand.
    """

    def __init__(self, folder: Path):
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, config.architectures[0])
        self.model = kind.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.image_processor = AutoImageProcessor.from_pretrained(folder)
        self.pads = {"image": config.image_token_id, "video": config.video_token_id}

    def inputs(
        self, text: str, images: Sequence[Any] = (), videos: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> dict[str, Tensor]:
        """What the model takes.

        Args:
            text: with the model's own placeholders.
            images: PIL images.
            videos: pixels and grid of each.
        """
        inputs: dict[str, Tensor] = {}
        grids: dict[str, list] = {"image": [], "video": []}
        if images:
            found = self.image_processor(images=list(images), return_tensors="pt")
            inputs["pixel_values"] = found["pixel_values"]
            inputs["image_grid_thw"] = found["image_grid_thw"]
            grids["image"] = found["image_grid_thw"].tolist()
        if videos:
            inputs["pixel_values_videos"] = torch.cat([pixels for pixels, _ in videos])
            inputs["video_grid_thw"] = torch.stack([grid for _, grid in videos])
            grids["video"] = inputs["video_grid_thw"].tolist()
        ids: list[int] = []
        kinds: list[int] = []
        iterators = {kind: iter(grid) for kind, grid in grids.items()}
        for token in self.tokenizer.encode(text):
            kind = next((kind for kind, pad in self.pads.items() if pad == token), None)
            count = 1
            if kind is not None:
                count = math.prod(next(iterators[kind])) // self.image_processor.merge_size**2
            ids += [token] * count
            kinds += [{None: 0, "image": 1, "video": 2}[kind]] * count
        inputs["input_ids"] = torch.tensor([ids])
        inputs["mm_token_type_ids"] = torch.tensor([kinds])
        return inputs

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Of every position, [tokens, vocabulary]."""
        self.model.model.rope_deltas = None
        with torch.no_grad():
            return self.model(**inputs).logits[0]

    def greedy(self, inputs: dict[str, Tensor], count: int) -> tuple[list[int], list[float]]:
        """Tokens, each from a forward pass over everything before it; and how far apart the two
        best logits of each were, relative to the largest.
        """
        inputs = dict(inputs)
        tokens, gaps = [], []
        for _ in range(count):
            logits = self.logits(inputs)[-1]
            best = logits.topk(2).values
            tokens.append(int(logits.argmax()))
            gaps.append(float((best[0] - best[1]) / logits.abs().max()))
            more = {"input_ids": tokens[-1], "mm_token_type_ids": 0}
            for key, value in more.items():
                inputs[key] = torch.cat([inputs[key], torch.tensor([[value]])], 1)
        return tokens, gaps
