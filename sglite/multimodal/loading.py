"""The processor of a checkpoint."""

from pathlib import Path
from typing import Any

from sglite.interface.errors import (
    CheckpointError,
    ConfigError,
    UnsupportedModelError,
    foreign_errors_as,
)
from sglite.multimodal.registry import find_processor


def load_processor(
    model: Any,
    architecture: str,
    hf_config: Any,
    folder: Path,
    tokenizer: Any,
    options: Any,
) -> Any:
    """A `BaseMultimodalProcessor` for a model; None for one that takes text only.

    Args:
        model: which it is for.
        architecture: the name that it is registered under.
        hf_config: the checkpoint's whole config.
        folder: the checkpoint's.
        tokenizer: the Hugging Face tokenizer.
        options: what was passed to `LLM`.

    Raises:
        UnsupportedModelError: the model takes images, and nothing is registered that makes them.
        ConfigError: `options.image_processor` cannot be had.
        CheckpointError: the checkpoint's image processor is broken, or its files do not fit.
    """
    model_class = type(model)
    kind = find_processor(model_class, architecture)
    if kind is None:
        _refuse_settings(options, f"{architecture} takes text only")
        return None
    if not hasattr(model_class, "get_image_feature"):
        raise UnsupportedModelError(
            f"{architecture} has a processor for images, {kind.__name__}, but {model_class} has no "
            f"get_image_feature(items)"
        )
    # Imported here, since few need it: it imports Pillow.
    from sglite.multimodal.hub_processor import HubProcessor

    hub = HubProcessor.load(
        folder,
        tokenizer,
        trust_remote_code=options.trust_remote_code,
        image_settings=options.image_processor,
        fixed_settings=getattr(kind, "fixed_settings", frozenset()),
    )
    if hub.image_processor is None:
        _refuse_settings(options, f"{folder} has no image processor")
    what = f"{kind.__name__} cannot be made from the files in {folder}"
    with foreign_errors_as(CheckpointError, what):
        processor = kind(hf_config, options, hub)
        processor.bind(model)
    return processor


def _refuse_settings(options: Any, reason: str) -> None:
    if options.image_processor:
        raise ConfigError(f"image_processor={options.image_processor}: {reason}")
