"""The two sides of `bench/mmmu.py`: sglite, and Hugging Face transformers with the same files.

Both are greedy, without a repetition penalty, and get conversations of the same parts. Reading the
pictures and making tokens of prompts counts on both sides. Pixels are made by Hugging Face's image
processors on Pillow on both, whatever else is installed, so that both models see the same ones.
"""

import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import transformers
from transformers.utils import is_torchvision_available

import sglite
from bench.mmmu_prompts import Prompt, as_messages
from sglite.models.registry import ModelRegistry
from sglite.multimodal.chat_templates import registered_template
from sglite.multimodal.registry import find_processor

_AT_ONCE = 256  # prompts that sglite gets together: the files of all of them are opened


class Reply(NamedTuple):
    """What an engine answered, and how many tokens prompt and answer were."""

    text: str
    prompt_tokens: int
    new_tokens: int


class Engine(Protocol):
    """One engine with the model loaded.

    Made with the checkpoint's folder, the dtype's name ("auto", "bfloat16", ...), the device
    ("auto", "cpu", "cuda") and how many prompts a batch has where batches are made by hand.
    """

    name: str
    about: str  # the version

    def answer(self, prompts: list[Prompt], max_new_tokens: int) -> Iterator[Reply]:
        """Answers all prompts, as fast as it can; replies come in their order."""

    def first_token_seconds(self, prompt: Prompt) -> float:
        """From a prompt alone to its first token."""

    def close(self) -> None:
        """Gives the memory back."""


class Sglite:
    """Many prompts at once; batches are the engine's own."""

    name = "sglite"

    def __init__(self, model: str, dtype: str, device: str, batch_size: int):
        self.about = f"sglite {sglite.__version__}"
        self._llm = sglite.LLM(model, dtype=dtype, device=device)
        self._settings = {"temperature": 0, "repetition_penalty": 1.0, "max_new_tokens": 1}
        self._llm.chat([{"role": "user", "content": "warm-up"}], **self._settings)

    def answer(self, prompts: list[Prompt], max_new_tokens: int) -> Iterator[Reply]:
        settings = {**self._settings, "max_new_tokens": max_new_tokens}
        for start in range(0, len(prompts), _AT_ONCE):
            conversations = [as_messages(prompt) for prompt in prompts[start : start + _AT_ONCE]]
            for output in self._llm.chat(conversations, progress=False, **settings):
                usage = output.usage
                yield Reply(output.text, usage.prompt_tokens, usage.completion_tokens)

    def first_token_seconds(self, prompt: Prompt) -> float:
        start = time.perf_counter()
        self._llm.chat(as_messages(prompt), **self._settings)
        return time.perf_counter() - start

    def close(self) -> None:
        self._llm.close()


class HuggingFace:
    """`generate` with batches padded on the left; for the first token, one prompt alone."""

    name = "hf"

    def __init__(self, model: str, dtype: str, device: str, batch_size: int):
        self.about = f"transformers {transformers.__version__}"
        self._batch_size = batch_size
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._processor = load_processor(Path(model))
        tokenizer = self._processor.tokenizer
        if tokenizer.pad_token is None:  # any token will do, since padding is masked
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        if not self._processor.chat_template:
            self._processor.chat_template = _registered_template(Path(model))
        self._model = transformers.AutoModelForImageTextToText.from_pretrained(
            model, dtype=dtype, local_files_only=True
        )
        self._model = self._model.to(device).eval()
        self._settings = {"do_sample": False, "repetition_penalty": 1.0}
        self._generate([["warm-up"]], max_new_tokens=1)

    def answer(self, prompts: list[Prompt], max_new_tokens: int) -> Iterator[Reply]:
        for start in range(0, len(prompts), self._batch_size):
            yield from self._generate(
                prompts[start : start + self._batch_size], max_new_tokens=max_new_tokens
            )

    def first_token_seconds(self, prompt: Prompt) -> float:
        start = time.perf_counter()
        self._generate([prompt], max_new_tokens=1)
        return time.perf_counter() - start

    def close(self) -> None:
        del self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _generate(self, prompts: list[Prompt], **settings: Any) -> list[Reply]:
        conversations = [as_messages(prompt) for prompt in prompts]
        texts = [
            self._processor.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
            for conversation in conversations
        ]
        images = [_images(conversation) for conversation in conversations]
        tokenizer = self._processor.tokenizer
        starts = tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token)
        inputs = self._processor(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            padding_side="left",
            add_special_tokens=not starts,
            return_tensors="pt",
        ).to(self._model.device)
        ids = self._model.generate(**inputs, **self._settings, **settings)
        length = inputs["input_ids"].shape[1]
        replies = []
        for mask, new_ids in zip(inputs["attention_mask"], ids[:, length:], strict=True):
            count = _without_padding(new_ids.tolist(), self._ends())
            text = tokenizer.decode(new_ids[:count], skip_special_tokens=True)
            replies.append(Reply(text, int(mask.sum()), count))
        return replies

    def _ends(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        return set(ends if isinstance(ends, list) else [ends])


def load_processor(folder: Path) -> transformers.ProcessorMixin:
    """The checkpoint's processor, its image processor on Pillow.

    Without torchvision Hugging Face refuses to make a processor that has a part for videos: it is
    put together here from the parts that there are.
    """
    # Not the class of that name in `transformers` itself, which asks for torchvision.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    image_processor = AutoImageProcessor.from_pretrained(
        folder, local_files_only=True, backend="pil"
    )
    if is_torchvision_available():
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
        processor.image_processor = image_processor
    else:
        processor = _without_video(folder, image_processor)
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template
    if getattr(processor, "patch_size", 0) is None:
        # Older checkpoints of LLaVA leave it to the model to count a picture's tokens.
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        # CLIP's tower has a class token beside its patches, SigLIP's has none.
        has_class_token = config.vision_config.model_type == "clip_vision_model"
        processor.num_additional_image_tokens = int(has_class_token)
    return processor


def _without_video(folder: Path, image_processor: Any) -> transformers.ProcessorMixin:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    settings = _read(folder / "processor_config.json")
    settings.pop("chat_template", None)
    named = settings.pop("processor_class", None)
    named = named or _read(folder / "preprocessor_config.json").get("processor_class")
    kind = getattr(
        transformers,
        named or PROCESSOR_MAPPING_NAMES[_read(folder / "config.json")["model_type"]],
    )
    parts = {
        "image_processor": image_processor,
        "tokenizer": transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True),
    }
    if "video_processor" in kind.get_attributes():
        parts["video_processor"] = None
    # How its tokens are laid out; what is a dict is one of the parts.
    parts |= {key: value for key, value in settings.items() if not isinstance(value, dict)}

    class WithoutVideo(kind):
        """Takes None for a part that is not there."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is not None:
                return super().check_argument_for_proper_class(argument_name, argument)
            return None

    processor = WithoutVideo(**parts)
    # As `from_pretrained` finds it among the files.
    found, _ = kind.get_processor_dict(folder, local_files_only=True)
    processor.chat_template = found.get("chat_template")
    return processor


def _registered_template(folder: Path) -> str:
    """What sglite uses where a checkpoint has no chat template, so that both get the same text."""
    architecture, model = ModelRegistry.resolve(_read(folder / "config.json")["architectures"])
    template = registered_template(find_processor(model, architecture) or object, has_own=False)
    if template is None:
        raise ValueError(f"{folder} has no chat template, and none is registered for its family")
    return template


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _images(conversation: list[dict[str, Any]]) -> list[Any]:
    parts = [part for message in conversation for part in message["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]


def _without_padding(ids: list[int], ends: set[int]) -> int:
    """How many tokens there are up to the first end token, which counts."""
    return next((count for count, token in enumerate(ids, 1) if token in ends), len(ids))


ENGINES: dict[str, type[Engine]] = {"sglite": Sglite, "hf": HuggingFace}
