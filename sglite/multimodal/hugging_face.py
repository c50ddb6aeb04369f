"""Models that Hugging Face's own class runs: its own processor makes pixels and placeholders."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sglite.interface.errors import CheckpointError, UnsupportedModelError
from sglite.multimodal.base_processor import IMAGE, BaseMultimodalProcessor
from sglite.multimodal.hub_processor import HubProcessor
from sglite.multimodal.inputs import MultimodalInputs, MultimodalItem, ProcessedMedia
from sglite.multimodal.placeholders import Place

# What a processor gives beside pixels, which the prompt has already.
_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class HuggingFaceProcessor(BaseMultimodalProcessor):
    """Pixels of one picture as Hugging Face's whole processor gives them.

    The span of a picture is all that the processor writes for it, marks of tiles and of lines
    among the placeholders; `data["token_ids"]` is that, [tokens] int64.

    Raises:
        UnsupportedModelError: the checkpoint's processor does not say what a picture becomes in a
            prompt, or cannot be made.
    """

    models = ("TransformersVisionModel",)

    def __init__(
        self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any
    ):
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self._whole = make_processor(hf_config, _processor)
        self.image_token_id = hf_config.image_token_id
        # Not the processor's own `image_token`, which some write out as others (Aya Vision).
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        if self.image_token is None:
            raise CheckpointError(
                f"the tokenizer has no token for the config's image_token_id={self.image_token_id}"
            )
        self.image_placeholder = self._written_by_template() or self._whole.image_token
        self._rope: Any | None = None

    def bind(self, model: Any) -> None:
        """Takes the model's function for positions of M-RoPE; the model is not kept."""
        self._rope = model.rope

    def prepare_text(self, text: str, *, is_rendered: bool = False) -> str:
        """The text with one placeholder for each image."""
        if not is_rendered and self._whole.image_token != IMAGE:
            text = text.replace(IMAGE, self.image_placeholder)
        return text.replace(self._whole.image_token, self.image_token)

    def process_image(self, image: Image.Image) -> ProcessedMedia:
        """Pixels of an RGB image."""
        found = dict(
            self._whole(
                images=[image],
                text=[self._whole.image_token],
                add_special_tokens=False,
                return_tensors="pt",
            )
        )
        token_ids = found["input_ids"][0]
        data = {name: value for name, value in found.items() if name not in _OF_TEXT}
        pixels = data.pop("pixel_values")
        return ProcessedMedia("image", pixels, len(token_ids), {**data, "token_ids": token_ids})

    def process(
        self, name: str, token_ids: Sequence[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], MultimodalInputs | None]:
        """As the base's; what stands around placeholders is put in as well."""
        expanded, inputs = super().process(name, token_ids, *args, **kwargs)
        return (self._whole_spans(expanded, inputs.items) if inputs else expanded), inputs

    def positions(
        self, token_ids: Sequence[int], items: Sequence[MultimodalItem]
    ) -> tuple[NDArray[np.int64] | None, int]:
        """Those of the class's own `get_rope_index`; where there is none they simply count."""
        if self._rope is None:
            return None, 0
        ids = torch.tensor(self._whole_spans(token_ids, items))
        kinds = (ids == self.image_token_id).long()
        positions, offset = rope_index(
            type(self._rope).__name__, self._rope, ids, kinds, [item.data for item in items]
        )
        return positions.numpy(), offset

    def _whole_spans(self, token_ids: Sequence[int], items: Sequence[MultimodalItem]) -> list[int]:
        whole = list(token_ids)
        for item in items:
            whole[item.start : item.stop] = item.data["token_ids"].tolist()
        return whole

    def _places(
        self,
        name: str,
        modality: str,
        token: str,
        token_ids: Sequence[int],
        media: Sequence[ProcessedMedia],
    ) -> list[Place]:
        """As the base's; also where the prompt has all that the processor writes for a picture."""
        token_ids = list(token_ids)
        spans, begin = [], 0
        for one in media:
            written = one.data["token_ids"].tolist()
            ahead = written.index(self.image_token_id)
            try:
                start = token_ids.index(self.image_token_id, begin) - ahead
            except ValueError:
                break
            begin = start + len(written)
            if start < 0 or token_ids[start:begin] != written:
                break
            spans.append((start, begin, one))
        if media and len(spans) == len(media) and self.image_token_id not in token_ids[begin:]:
            return spans
        return super()._places(name, modality, token, token_ids, media)

    def _written_by_template(self) -> str | None:
        """What a chat template writes for a picture; None if that cannot be told."""
        templates = (self._processor.chat_template, getattr(self.tokenizer, "chat_template", None))
        found = (self._written_by(one) for one in templates if one)
        return next((written for written in found if written is not None), None)

    def _written_by(self, template: Any) -> str | None:
        before, behind = "(before)", "(behind)"
        parts = [
            {"type": "text", "text": before},
            {"type": "image"},
            {"type": "text", "text": behind},
        ]
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": parts}], chat_template=template, tokenize=False
            )
        except Exception:  # a template for content that is a string
            return None
        written = text.partition(before)[2].partition(behind)[0].strip()
        return written if written.count(self._whole.image_token) == 1 else None


def make_processor(hf_config: Any, hub: HubProcessor) -> Any:
    """Hugging Face's processor of a checkpoint, without the part for videos.

    Its `from_pretrained` wants torchvision for those.

    Args:
        hf_config: the checkpoint's whole config.
        hub: its parts.

    Raises:
        UnsupportedModelError: transformers has none for the model, or one that does not say what a
            picture becomes in a prompt (`replace_image_token`), or it cannot be made.
    """
    from transformers import ProcessorMixin
    from transformers.models.auto import processing_auto

    model_type = hf_config.model_type
    name = hub.settings.get("processor_class") or hub.tokenizer.init_kwargs.get("processor_class")
    name = name or processing_auto.PROCESSOR_MAPPING_NAMES.get(model_type)
    kind = processing_auto.processor_class_from_name(name) if name else None
    try:
        tells = kind is not None and (
            kind.replace_image_token is not ProcessorMixin.replace_image_token
        )
    except ImportError as error:  # the stand-in of a class that wants torchvision
        raise UnsupportedModelError(
            f"{model_type}: Hugging Face's {name} cannot be made here: {error}"
        ) from error
    if not tells:
        what = f"{name}, does not say" if kind else f"{name or 'none'}, is not there to say"
        raise UnsupportedModelError(
            f"{model_type}: Hugging Face's processor, {what} what a picture becomes in a prompt "
            f"(replace_image_token), so that its images have no place"
        )
    parts = {"tokenizer": hub.tokenizer, "image_processor": hub.image_processor}
    attributes = kind.get_attributes()
    accepted = inspect.signature(kind.__init__).parameters
    settings = {
        key: json.loads(json.dumps(value))
        for key, value in hub.settings.items()
        if key in accepted and key not in attributes
    }
    # Nothing stands for the part for videos, which the constructor's check would not have.
    unchecked = type(kind.__name__, (kind,), {"check_argument_for_proper_class": _no_check})
    try:
        made = unchecked(**{name: parts.get(name) for name in attributes}, **settings)
    except Exception as error:  # of whatever kind the class's own code raises
        raise UnsupportedModelError(
            f"{model_type}: Hugging Face's {name} cannot be made of the checkpoint's files: "
            f"{type(error).__name__}: {error}"
        ) from error
    if getattr(made, "image_token", None) is None:
        raise UnsupportedModelError(
            f"{model_type}: Hugging Face's {name} has no image_token, so that images have no place "
            f"in a prompt"
        )
    return made


def _no_check(self: Any, name: str, argument: Any) -> None:
    """Any part will do."""


def rope_index(
    name: str, rope: Any, token_ids: Tensor, kinds: Tensor, data: Sequence[Mapping[str, Any]]
) -> tuple[Tensor, int]:
    """Positions of M-RoPE by the class's own function.

    Args:
        name: of the architecture.
        rope: has `get_rope_index`.
        token_ids: [T] int64.
        kinds: [T] int64, 1 for placeholders of pictures.
        data: per picture what its processor gave.

    Returns:
        [3, T] int64, and what to add to the index of a token behind the prompt.

    Raises:
        UnsupportedModelError: the function wants something else, or gives something else.
    """
    parameters = inspect.signature(rope.get_rope_index).parameters
    given: dict[str, Any] = {"input_ids": token_ids[None], "mm_token_type_ids": kinds[None]}
    for key in parameters.keys() & set().union(*data):
        given[key] = torch.cat([torch.as_tensor(one[key]) for one in data])
    try:
        positions, offset = rope.get_rope_index(
            **{key: value for key, value in given.items() if key in parameters}
        )
    except Exception as error:  # of whatever kind the class's own code raises
        raise UnsupportedModelError(
            f"{name}: its get_rope_index, which gives positions of M-RoPE, cannot be used: "
            f"{type(error).__name__}: {error}"
        ) from error
    if positions.shape != (3, 1, len(token_ids)):
        raise UnsupportedModelError(
            f"{name}: its get_rope_index gives positions {list(positions.shape)}; three rows are "
            f"implemented"
        )
    return positions[:, 0], int(torch.as_tensor(offset).reshape(-1)[0])
