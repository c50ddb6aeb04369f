"""Loading what Hugging Face's own classes run: checkpoints, and live modules."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from sglite.interface import checks
from sglite.interface.errors import ConfigError, UnsupportedModelError
from sglite.interface.generation_defaults import GenerationDefaults
from sglite.models.checkpoint import Checkpoint
from sglite.models.config import check_counts, end_token_ids_of, resolve_dtype
from sglite.models.loaded_model import LoadedModel, check_room
from sglite.models.quantization import AT_LOAD
from sglite.models.safetensors_file import SafetensorsFile
from sglite.models.transformers import Origin, TransformersModel, TransformersVisionModel
from sglite.models.transformers_live import share_module
from sglite.models.transformers_refusals import refuse_config, refuse_modules, refuse_rope
from sglite.models.transformers_vision import read_image_processor, refuse_vision, takes_images
from sglite.models.transformers_weights import build_empty, find_class, find_config, read_model


def load_unregistered(
    checkpoint: Checkpoint,
    names: Sequence[str],
    *,
    dtype: str | torch.dtype,
    device: torch.device,
    room: int | None,
    quantization: str | None,
    context_length: int | None,
    trust_remote_code: bool,
    before_reading: Callable[[], Any] | None,
    model_class: type[nn.Module] | None = None,
) -> LoadedModel | None:
    """Loads a checkpoint by its Hugging Face class; None if there is none.

    Args: as those of `sglite.models.loader.load_model`; `names` are its architectures, and
        `model_class` is one of the caller's own.

    Raises: as `load_model`; also UnsupportedModelError for all that could not be right.
    """
    config = find_config(checkpoint, model_class, trust_remote_code=trust_remote_code)
    if config is None:
        return None
    model_class = model_class or find_class(
        checkpoint, names, config, trust_remote_code=trust_remote_code
    )
    if model_class is None:
        return None
    name = model_class.__name__
    if quantization is not None and quantization not in AT_LOAD:
        raise UnsupportedModelError(
            f"{checkpoint.folder}: the weights are quantised ({quantization}), and {name} is run "
            f"by Hugging Face's own class, where that is not implemented: use a checkpoint in "
            f"bfloat16, float16 or float32"
        )
    limit = _limit(name, config, context_length)
    entries = {}
    for path in checkpoint.weight_files:
        with SafetensorsFile(path) as file:
            entries |= file.entries
    check_counts(config, entries, may_be_unused=True)
    refuse_vision(name, model_class, config)
    build = TransformersModel
    if takes_images(model_class, config):
        image_processor = read_image_processor(name, checkpoint.folder)
        build = partial(TransformersVisionModel, image_processor=image_processor)
    empty = build_empty(model_class, config)
    refuse_modules(name, empty)
    run_dtype = resolve_dtype(dtype, checkpoint, entries)
    if room is not None:
        needed = sum(parameter.numel() for parameter in empty.parameters()) * run_dtype.itemsize
        check_room(needed, device, room)
    inner = read_model(model_class, checkpoint, config, run_dtype)
    # Not earlier: transformers' modules must not be imported on two threads at once.
    if before_reading is not None:
        before_reading()
    model = build(inner, limit, shared=False, device=device, quantization=quantization)
    defaults = GenerationDefaults.from_generation_config(checkpoint.generation_config)
    return _loaded(
        model.requires_grad_(False), config, name, run_dtype, quantization, limit, defaults
    )


def load_module(
    module: nn.Module,
    *,
    dtype: str | torch.dtype = "auto",
    quantization: str | None = None,
    context_length: int | None = None,
) -> LoadedModel:
    """Takes a live Hugging Face module as it stands, sharing its parameters where they lie.

    Args:
        module: a causal language model with a config; it is left exactly as it is.
        dtype: "auto", or what the module's weights are.
        quantization: must be None.
        context_length: positions that may come up; None: what the config speaks of.

    Raises:
        UnsupportedModelError: it is no such module, or needs something that is not implemented.
        ConfigError: an argument would need other weights than the module's own.
    """
    name = type(module).__name__
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"{name} has no Hugging Face config: a live module is a transformers causal language "
            f"model"
        )
    refuse_modules(name, module)
    limit = _limit(name, config, context_length)
    weights = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weights is None:
        raise UnsupportedModelError(f"{name} has no parameters")
    own_dtype = weights.dtype
    asked = str(dtype).removeprefix("torch.")
    if asked not in ("auto", str(own_dtype).removeprefix("torch.")):
        checks.refuse("dtype", asked, f"{own_dtype}, the live module's own", ConfigError)
    if quantization is not None:
        checks.refuse("quantization", quantization, "None for a live module", ConfigError)
    model = TransformersModel(share_module(module), limit, shared=True, device=weights.device)
    model.origin = Origin(module)
    generation_config = getattr(module, "generation_config", None)
    values = generation_config.to_diff_dict() if generation_config is not None else None
    defaults = GenerationDefaults.from_generation_config(values)
    return _loaded(model, config, name, own_dtype, None, limit, defaults)


def _limit(name: str, config: Any, context_length: int | None) -> int | None:
    """The longest context; refuses configs of models that cannot be run."""
    refuse_config(name, config)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = refuse_rope(name, config, context_length) or limit
    if context_length is not None and limit is not None and context_length > limit:
        checks.refuse(
            "context_length", context_length, f"at most {limit}, the model's limit", ConfigError
        )
    return limit


def _loaded(
    model: TransformersModel,
    config: Any,
    name: str,
    dtype: torch.dtype,
    quantization: str | None,
    limit: int | None,
    defaults: GenerationDefaults,
) -> LoadedModel:
    text = config.get_text_config()
    return LoadedModel(
        model=model.eval(),
        config=text,
        whole_config=config,
        architecture=name,
        dtype=dtype,
        quantization=quantization,
        vocab_size=model.vocab_size,
        max_positions=limit,
        kv_layers=model.kv_layers,
        generation_defaults=defaults,
        end_token_ids=defaults.eos_token_ids or end_token_ids_of(text),
        can_be_batch_invariant=model.can_be_batch_invariant,
    )
