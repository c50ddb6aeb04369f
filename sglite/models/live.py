"""What an `LLM` needs beside a live module's weights: a device that fits, and a tokenizer."""

import os
from typing import Any

import torch
from torch import nn

from sglite.interface.config import LLMOptions
from sglite.interface.errors import ConfigError
from sglite.models.checkpoint import load_tokenizer
from sglite.models.loaded_model import LoadedModel


def device_of(module: nn.Module, asked: str) -> str:
    """Where a live module runs: where it is.

    Args:
        module: the live module.
        asked: "auto", or where the caller wants it to run.

    Raises:
        ConfigError: that is elsewhere.
    """
    where = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    wanted = where if asked == "auto" else torch.device(asked)
    if wanted.type != where.type or wanted.index not in (None, where.index):
        raise ConfigError(
            f"device={asked!r}: the live module is on {where}; move it there first, or leave out "
            f"device="
        )
    return str(where)


def take_module(options: LLMOptions) -> tuple[LoadedModel, Any]:
    """The live module of `options.model` as a model to run, and its tokenizer.

    Args:
        options: of the `LLM`.

    Raises:
        ConfigError: there is no tokenizer, or an option would need other weights.
        UnsupportedModelError: the module cannot be run as it stands.
    """
    # Imported here, since few need it: it imports Hugging Face's modelling code.
    from sglite.models.transformers_loading import load_module

    module = options.model
    tokenizer = options.tokenizer
    if tokenizer is None:
        origin = getattr(module, "name_or_path", None)
        if not isinstance(origin, str) or not os.path.isdir(origin):
            raise ConfigError(
                "a live module comes without a tokenizer: pass tokenizer= with a folder, a hub id "
                "or a tokenizer"
            )
        tokenizer = origin
    if options.architecture is not None:
        raise ConfigError(
            f"architecture={options.architecture!r} is for checkpoints: a live module is run as it "
            f"stands"
        )
    loaded = load_module(
        module,
        dtype=options.dtype,
        quantization=options.quantization,
        context_length=options.context_length,
    )
    found = load_tokenizer(
        None,
        tokenizer,
        trust_remote_code=options.trust_remote_code,
        cache_dir=options.cache_dir,
        token=options.token,
    )
    return loaded, found
