"""What an `LLM` needs of a checkpoint: the model with its weights, and the tokenizer."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from sglite.interface.config import LLMOptions
from sglite.models.checkpoint import Checkpoint, load_tokenizer, tokenizer_bytes
from sglite.models.loaded_model import LoadedModel
from sglite.models.loader import load_model

# Bytes of a tokenizer's files that are worth a thread. What a thread allocates often stays with
# the process in an arena of malloc's own.
_LARGE_TOKENIZER = 1 << 20


def take_checkpoint(
    options: LLMOptions, checkpoint: Checkpoint, device: torch.device, room: int | None
) -> tuple[LoadedModel, Any]:
    """A checkpoint's model to run, and its tokenizer; one that takes long is read meanwhile.

    Args:
        options: of the `LLM`.
        checkpoint: what `resolve_checkpoint` found.
        device: where the weights go.
        room: bytes that they may take there; None: it is not known.

    Raises: as `load_model` and `load_tokenizer`.
    """
    read_tokenizer = partial(
        load_tokenizer,
        checkpoint,
        options.tokenizer,
        trust_remote_code=options.trust_remote_code,
        cache_dir=options.cache_dir,
        token=options.token,
    )
    takes_long = options.tokenizer is not None or tokenizer_bytes(checkpoint) > _LARGE_TOKENIZER
    tokenizer = None
    with ThreadPoolExecutor(1, "sglite-tokenizer") as pool:

        def begin_tokenizer() -> None:
            nonlocal tokenizer
            tokenizer = pool.submit(read_tokenizer) if takes_long else read_tokenizer()

        loaded = load_model(
            checkpoint,
            architecture=options.architecture,
            dtype=options.dtype,
            device=device,
            room=room,
            quantization=options.quantization,
            context_length=options.context_length,
            batch_invariant=bool(options.batch_invariant),
            trust_remote_code=options.trust_remote_code,
            before_reading=begin_tokenizer,
        )
    return loaded, tokenizer.result() if takes_long else tokenizer
