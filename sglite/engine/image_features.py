"""Embeddings of images: computed once, kept while there is room, and laid out for a step."""

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sglite.engine.batch import ImageRows
from sglite.engine.failures import detach, failed
from sglite.engine.request import Request
from sglite.engine.scheduler import Step
from sglite.interface.errors import RequestError, UnsupportedModelError
from sglite.multimodal.inputs import MultimodalItem


class FeatureCache:
    """Tensors by key; beyond a number of bytes, those used longest ago go.

    Args:
        max_bytes: that they take together at most.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._tensors: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tensors)

    def get(self, key: Hashable) -> Tensor | None:
        """The tensor of a key, which counts as used now; None: it is not there."""
        found = self._tensors.get(key)
        if found is not None:
            self._tensors.move_to_end(key)
        return found

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keeps a tensor; one that is larger than the whole cache is not kept."""
        if key in self._tensors or tensor.nbytes > self.max_bytes:
            return
        self._tensors[key] = tensor
        self.num_bytes += tensor.nbytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._tensors.popitem(last=False)
            self.num_bytes -= oldest.nbytes

    def clear(self) -> None:
        """Forgets all."""
        self._tensors.clear()
        self.num_bytes = 0


class ImageFeatures:
    """Gives a step the embeddings of those tokens in it that stand for images.

    Every image is encoded by itself, so that its bits do not depend on what else is in the step.
    While a request is within an image, its embeddings are held beside the cache.

    Args:
        model: `get_image_feature(items)` gives [tokens of the items, hidden_size].
        max_bytes: of embeddings that are kept.

    Attributes:
        num_encoded: how many images have been encoded.
    """

    def __init__(self, model: nn.Module, max_bytes: int):
        self._model = model
        self._cache = FeatureCache(max_bytes)
        self._held: dict[Hashable, Tensor] = {}
        self.num_encoded = 0

    @property
    def num_cached_bytes(self) -> int:
        """What the embeddings take that are kept for further prompts."""
        return self._cache.num_bytes

    def of_step(
        self, step: Step, query_start: NDArray[np.int32]
    ) -> tuple[ImageRows | None, dict[int, RequestError]]:
        """The rows of the step's tokens that stand for images; None where there are none.

        An image that cannot be encoded is left out: those tokens keep their placeholder's own
        embedding, and what comes of them is nobody's. Also given are the errors of its requests,
        by their index in the step.

        Args:
            step: the requests.
            query_start: [B + 1], where their tokens begin in the step.
        """
        rows, parts = [], []
        held: dict[Hashable, Tensor] = {}
        failed_images: dict[Hashable, BaseException] = {}
        failures: dict[int, RequestError] = {}
        for index, (scheduled, offset) in enumerate(
            zip(step.items, query_start.tolist(), strict=False)
        ):
            request, start, stop = scheduled.request, scheduled.start, scheduled.stop
            if request.multimodal is None:
                continue
            for item in request.multimodal.overlapping(start, stop):
                # Other weights give other embeddings.
                key = request.namespace, item.digest
                if key not in held and key not in failed_images:
                    try:
                        held[key] = self._features(key, request, item)
                    except BaseException as error:  # the model's own code, or no memory for it
                        failed_images[key] = detach(error)
                if key in failed_images:
                    failures[index] = failed(f"encoding the {item.modality}", failed_images[key])
                    continue
                features = held[key]
                first, last = max(start, item.start), min(stop, item.stop)
                rows.append(np.arange(first, last) - start + offset)
                parts.append(features[first - item.start : last - item.start])
            if stop >= request.multimodal.items[-1].stop:
                # Wanted again only after a preemption that cost the request its prefix as well.
                request.multimodal = request.multimodal.released()
        # An image that a chunk has cut is wanted in the next step again.
        self._held = held
        if not parts:
            return None, failures
        embeds = parts[0] if len(parts) == 1 else torch.cat(parts)
        return ImageRows(np.concatenate(rows), embeds), failures

    def rest(self) -> None:
        """Keeps no more embeddings than the cache has room for, as no request wants any now."""
        self._held = {}

    def _features(self, key: Hashable, request: Request, item: MultimodalItem) -> Tensor:
        found = self._held.get(key)
        if found is None:
            found = self._cache.get(key)
        if found is None:
            found = self._encode(_with_pixels(request, item))
            self._cache.put(key, found)
        return found

    def _encode(self, item: MultimodalItem) -> Tensor:
        self.num_encoded += 1
        features = self._model.get_image_feature([item])
        if features.ndim != 2 or features.shape[0] != item.num_tokens:
            raise UnsupportedModelError(
                f"{type(self._model).__name__}.get_image_feature gave {list(features.shape)} for "
                f"an image that stands in {item.num_tokens} tokens of the prompt"
            )
        return features

    def close(self) -> None:
        """Drops the model and all embeddings."""
        self._model = None
        self._cache.clear()
        self._held = {}


def _with_pixels(request: Request, item: MultimodalItem) -> MultimodalItem:
    """The item, its pixels made again where the request has given them up."""
    if item.pixel_values is None:
        # Those of all its images at once, since one may depend on how many there are.
        if not request.multimodal.num_pixel_bytes:
            request.multimodal = request.multimodal.restored()
        (item,) = request.multimodal.overlapping(item.start, item.stop)
    return item
