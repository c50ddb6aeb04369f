"""A model that is ready to run."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sglite.cache.kv_pool import LayerSpec
from sglite.interface.errors import OutOfMemoryError
from sglite.interface.generation_defaults import GenerationDefaults

_GB = 1 << 30


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, and what an engine has to know about it.

    Attributes:
        model: in evaluation mode, without gradients.
        config: the Hugging Face config of the text model.
        architecture: the registered name of the model's class.
        dtype: of weights, hidden states and KV cache.
        quantization: how weights are stored instead, by the name of the method; None: plainly.
        vocab_size: width of the logits.
        max_positions: the longest context; None if the model sets no limit.
        kv_layers: what each attention layer stores per token, by its `layer_id`.
        generation_defaults: of `generation_config.json`.
        end_token_ids: ids that end a text.
        whole_config: the Hugging Face config of all parts, where there are several.
        can_be_batch_invariant: whether a row's bits need not depend on what shares its batch, as
            far as the model's parts are concerned.
        mapped_bytes: of files that weights lie in, which the system still counts as free memory.
    """

    model: nn.Module
    config: Any
    architecture: str
    dtype: torch.dtype
    quantization: str | None
    vocab_size: int
    max_positions: int | None
    kv_layers: tuple[LayerSpec, ...]
    generation_defaults: GenerationDefaults
    end_token_ids: tuple[int, ...]
    whole_config: Any = None
    can_be_batch_invariant: bool = True
    mapped_bytes: int = 0


def check_room(needed: int, device: torch.device, room: int) -> None:
    """Refuses weights that there is no room for, before any of them is read.

    Args:
        needed: bytes of the weights.
        device: where they go.
        room: bytes that are free there.

    Raises:
        OutOfMemoryError: they do not fit.
    """
    if needed > room:
        raise OutOfMemoryError(
            f"the weights need {needed / _GB:.2f} GB on {device}, where {room / _GB:.2f} GB are "
            f"free: free memory there, or pass another device"
        )
