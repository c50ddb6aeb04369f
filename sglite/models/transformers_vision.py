"""Models of Hugging Face's that see: what stands in the place of a picture's tokens.

Features are the class's own `get_image_features`, of one picture at a time. That nothing else of a
picture reaches the text model is seen, not believed: the class's own forward with pixels, and one
with the features in the place of embeddings, must give every attention layer the same.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sglite.interface.errors import CheckpointError, UnsupportedModelError, foreign_errors_as
from sglite.layers.forward_batch import ForwardBatch
from sglite.models.transformers_attention import (
    IMPLEMENTATION,
    PROBED_IMPLEMENTATION,
    use_implementation,
)
from sglite.models.transformers_calls import record_calls
from sglite.models.transformers_probe import run_recorded
from sglite.models.transformers_recorder import AttentionRecorder
from sglite.multimodal.hub_processor import HubProcessor
from sglite.multimodal.hugging_face import rope_index
from sglite.multimodal.inputs import MultimodalItem

# The picture that a model is tried with: height, width.
_SIZE = (50, 70)
# Settings of image processors that have pictures cut into tiles.
_TILING = ("do_image_splitting", "crop_to_patches")
# What two ways to the same queries, keys and values may differ by, relative to the largest.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class VisionFacts:
    """What was learned of how a model sees.

    Attributes:
        image_token_id: the token that a row of features takes the place of.
        rope: has `get_rope_index`, and no weights; None: positions simply count.
        data: of the picture that was tried, what an image processor makes of it.
        features: its rows, [tokens, hidden_size].
        parts: paths of the modules that made them.
    """

    image_token_id: int
    rope: Any | None
    data: Mapping[str, Any]
    features: Tensor
    parts: frozenset[str]


def takes_images(model_class: type, config: Any) -> bool:
    """Whether a class of Hugging Face's takes pictures.

    Args:
        model_class: the class.
        config: its whole config.
    """
    return hasattr(model_class, "get_image_features") or (
        getattr(config, "vision_config", None) is not None
        and config.get_text_config() is not config
    )


def refuse_vision(name: str, model_class: type, config: Any) -> None:
    """Refuses, before weights are read, models whose pictures or sounds have no place in a prompt.

    Args:
        name: of the architecture.
        model_class: the class.
        config: its whole config.

    Raises:
        UnsupportedModelError: naming what it is.
    """
    if getattr(config, "audio_config", None) is not None:
        raise UnsupportedModelError(
            f"{name} takes sounds as well (audio_config), which are not implemented"
        )
    if not takes_images(model_class, config):
        return
    if not hasattr(model_class, "get_image_features"):
        raise UnsupportedModelError(
            f"{name} has no get_image_features: its pictures do not take the place of tokens (they "
            f"go into cross-attention, as Mllama has it), which is not implemented"
        )
    if getattr(config, "image_token_id", None) is None:
        raise UnsupportedModelError(
            f"{name}: its config names no image_token_id, so that a picture's place in a prompt "
            f"is not known"
        )
    if getattr(config, "visual_indicator_token_ids", None):
        raise UnsupportedModelError(
            f"{name} has the vision tower make embeddings of the marks around a picture as well "
            f"(visual_indicator_token_ids), which is not implemented"
        )
    vision = getattr(config, "vision_config", None)
    if getattr(vision, "deepstack_visual_indexes", None):
        raise UnsupportedModelError(
            f"{name} adds features of a picture to the hidden states of several layers "
            f"(deepstack: {vision.deepstack_visual_indexes}), which is not implemented"
        )


def read_image_processor(name: str, folder: Path) -> Any:
    """Hugging Face's image processor of a checkpoint.

    Args:
        name: of the architecture.
        folder: the checkpoint's.

    Raises:
        UnsupportedModelError: there is none that runs on Pillow alone, and no torchvision.
        CheckpointError: it is not there, or broken.
    """
    try:
        found = HubProcessor.load(folder, None).image_processor
    except CheckpointError as error:
        if "torchvision" in str(error.__cause__).lower():
            raise UnsupportedModelError(
                f"{name}: Hugging Face has no image processor for it that runs on Pillow alone, "
                f"and torchvision is not there: {error.__cause__}"
            ) from error
        raise
    if found is None:
        raise CheckpointError(
            f"{name} takes images, but {folder} has no image processor: neither "
            f"preprocessor_config.json nor processor_config.json is there"
        )
    return found


def learn_images(inner: nn.Module, image_processor: Any, device: torch.device) -> VisionFacts:
    """Tries a model with a picture.

    Args:
        inner: the Hugging Face model with its weights, before any part of it is replaced.
        image_processor: its own.
        device: where the model is going to run; it is tried there.

    Raises:
        UnsupportedModelError: a picture reaches the text model otherwise than in the place of its
            tokens, or its tokens see what follows them.
    """
    with weights_on(inner, device):
        return _learn(inner, image_processor)


@contextmanager
def weights_on(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Has a copy of a module's weights and buffers on a device, and then these as they were.

    Two forwards of a large model take long on the CPU; what comes next wants the weights there.
    """
    if device.type == "cpu":
        yield
        return
    stores = [store for part in module.modules() for store in (part._parameters, part._buffers)]
    before = [dict(store) for store in stores]
    lent: dict[Tensor, Tensor] = {}  # tied ones stay so
    try:
        for store in stores:
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if tensor not in lent:
                    copy = tensor.detach().to(device)
                    is_weight = isinstance(tensor, nn.Parameter)
                    lent[tensor] = nn.Parameter(copy, requires_grad=False) if is_weight else copy
                store[name] = lent[tensor]
        yield
    finally:
        lent.clear()
        for store, own in zip(stores, before, strict=True):
            store.clear()
            store.update(own)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _learn(inner: nn.Module, image_processor: Any) -> VisionFacts:
    name = type(inner).__name__
    # One tile shows as much as many, which some make of the smallest picture.
    whole = {key: False for key in _TILING if getattr(image_processor, key, None)}
    with foreign_errors_as(UnsupportedModelError, f"{name} fails on a picture"):
        data = dict(image_processor(images=[_picture()], return_tensors="pt", **whole))
        with record_calls(inner) as calls:
            features = features_of(inner, data)
    found = VisionFacts(
        inner.config.image_token_id, _rope_of(inner), data, features, frozenset(calls)
    )
    _check_nothing_else_is_seen(inner, found)
    return replace(found, features=features.cpu())


def features_of(inner: nn.Module, data: Mapping[str, Any]) -> Tensor:
    """Rows of embeddings of one picture, [tokens, hidden_size].

    Args:
        inner: the Hugging Face model.
        data: what its processor gave for the picture alone; what `get_image_features` does not
            take is left out.
    """
    weight = inner.get_input_embeddings().weight
    given = {
        name: _placed(value, weight)
        for name, value in data.items()
        if name in inspect.signature(inner.get_image_features).parameters
    }
    found = inner.get_image_features(**given)
    found = getattr(found, "pooler_output", found)
    parts = list(found) if isinstance(found, list | tuple) else [found]
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise UnsupportedModelError(
            f"{type(inner).__name__}.get_image_features gives {type(found).__name__}, not rows of "
            f"embeddings (pooler_output)"
        )
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


class SeesImages:
    """The part of a model that takes pictures, over its `inner`, `_running` and embedding."""

    def watch(self, found: VisionFacts) -> None:
        """Has the rows of pictures put in the place of their tokens from now on.

        Args:
            found: what was learned before parts were replaced.
        """
        self.has_mrope = found.rope is not None
        self.rope = found.rope
        self._image_token_id = found.image_token_id
        self._embedding: Callable[[Tensor], Tensor] = self.inner.get_input_embeddings()
        self._embedding.register_forward_hook(self._put_images)
        with torch.inference_mode():
            again = features_of(self.inner, found.data)
        if not _alike(again.cpu(), found.features):
            raise UnsupportedModelError(
                f"{type(self.inner).__name__} gives other features of a picture once the parts "
                f"of its text model are replaced"
            )

    def _put_images(self, _: nn.Module, __: tuple, output: Tensor) -> Tensor | None:
        batch: ForwardBatch | None = self._running.batch
        if batch is None or batch.image_rows is None:
            return None
        return batch.with_images(output.flatten(0, -2)).view_as(output)

    def get_image_feature(self, items: Sequence[MultimodalItem]) -> Tensor:
        """Embeddings of pictures, one behind the other: [their tokens, hidden_size].

        The span of a picture is all that Hugging Face's processor writes for it, so that it has
        rows of text (marks of tiles and of lines) among those of features.
        """
        return torch.cat([self._rows_of(item) for item in items])

    def _rows_of(self, item: MultimodalItem) -> Tensor:
        data = dict(item.data)
        token_ids = data.pop("token_ids").to(self.inner.get_input_embeddings().weight.device)
        is_image = token_ids == self._image_token_id
        features = features_of(self.inner, {**data, "pixel_values": item.pixel_values})
        if len(features) != int(is_image.sum()):
            raise UnsupportedModelError(
                f"{type(self.inner).__name__}.get_image_features gave {len(features)} rows for a "
                f"picture that has {int(is_image.sum())} placeholders in the prompt"
            )
        # The placeholder may be no row of the table.
        rows = self._embedding(token_ids.masked_fill(is_image, 0)[None])[0].clone()
        rows[is_image] = features.to(rows.dtype)
        return rows


def _picture() -> Image.Image:
    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(0, 256, (*_SIZE, 3), np.uint8))


def _placed(value: Any, weight: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.to(weight.device)
    return value.to(weight.dtype) if value.is_floating_point() else value


def _rope_of(inner: nn.Module) -> Any | None:
    """A module without weights that has the model's own `get_rope_index`; None: it has none."""
    for module in (inner, getattr(inner, "model", None)):
        if hasattr(module, "get_rope_index"):
            # Not the module, which would be kept alive by whoever reads prompts.
            shell = type(module).__new__(type(module))
            nn.Module.__init__(shell)
            shell.config = module.config
            return shell
    return None


def _check_nothing_else_is_seen(inner: nn.Module, found: VisionFacts) -> None:
    name = type(inner).__name__
    text = [5, 6]
    ids = torch.tensor([[*text, *[found.image_token_id] * len(found.features), 7, 8, 9]])
    kinds = (ids == found.image_token_id).long()
    positions = torch.arange(ids.shape[1])[None]
    if found.rope is not None:
        positions = rope_index(name, found.rope, ids[0], kinds[0], [found.data])[0][:, None]
    taken = inspect.signature(inner.forward).parameters
    weight = inner.get_input_embeddings().weight
    pixels = {key: _placed(value, weight) for key, value in found.data.items() if key in taken}
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
        "token_type_ids": kinds,
        **pixels,
    }
    given = {key: value for key, value in given.items() if key in taken or "mm_token" in key}
    if "mm_token_type_ids" not in taken and found.rope is None:
        given.pop("mm_token_type_ids")

    def put(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, len(text) : len(text) + len(found.features)] = found.features.to(output)
        return output

    use_implementation(inner, PROBED_IMPLEMENTATION)
    own, _ = run_recorded(inner, ids.shape[1], given)
    use_implementation(inner, IMPLEMENTATION)
    handle = inner.get_input_embeddings().register_forward_hook(put)
    try:
        ours, _ = run_recorded(inner, ids.shape[1], {"input_ids": ids, "position_ids": positions})
    finally:
        handle.remove()
    _compare(name, own, ours)


def _compare(name: str, own: AttentionRecorder, ours: AttentionRecorder) -> None:
    if own.calls.keys() != ours.calls.keys():
        raise UnsupportedModelError(f"{name} has other layers attend where there is a picture")
    for path, call in own.calls.items():
        other = ours.calls[path]
        for part in ("query", "key", "value"):
            if not _alike(getattr(other, part), getattr(call, part)):
                raise UnsupportedModelError(
                    f"{name} lets a picture reach its text model otherwise than in the place of "
                    f"its tokens (deepstack, or positions that are not known): {path} gets another "
                    f"{part}"
                )


def _alike(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    error = (actual.float() - expected.float()).abs().max()
    return bool(error <= _TOLERANCE.get(expected.dtype, 1e-3) * expected.float().abs().max())
