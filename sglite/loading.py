"""From the options of an `LLM` to an engine that takes calls."""

import logging
import sys
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from sglite.engine.assembly import make_engine
from sglite.engine.device import (
    EngineThread,
    release_after,
    resolve_device,
    resolve_num_threads,
)
from sglite.engine.gpu_memory import free_memory
from sglite.engine.intake import Intake, Limits
from sglite.engine.kv_tokens import kv_tokens
from sglite.engine.open_engine import OpenEngine
from sglite.engine.prompt_reader import PromptReader
from sglite.engine.tokenizer import Tokenizer
from sglite.interface.config import EngineConfig, LLMOptions
from sglite.interface.errors import ConfigError
from sglite.models.checkpoint import Checkpoint, errors_name_files, resolve_checkpoint
from sglite.models.from_checkpoint import take_checkpoint
from sglite.models.live import device_of, take_module
from sglite.models.loaded_model import LoadedModel
from sglite.multimodal.loading import load_processor

_log = logging.getLogger(__name__)


def load(options: LLMOptions) -> OpenEngine:
    """Loads weights and tokenizer, and makes an engine over them.

    What fails leaves nothing behind, whoever keeps the error.

    Raises: as `LLM`.
    """
    handled = sys.exception()
    num_threads = resolve_num_threads(options.num_threads)
    is_live = isinstance(options.model, nn.Module)
    device = resolve_device(device_of(options.model, options.device) if is_live else options.device)
    options = options.with_defaults_of(device.type)
    checkpoint = None
    if not is_live:
        checkpoint = resolve_checkpoint(
            options.model,
            revision=options.revision,
            cache_dir=options.cache_dir,
            token=options.token,
        )
    try:
        with errors_name_files(checkpoint) if checkpoint else nullcontext():
            return _load(options, checkpoint, device, num_threads)
    except BaseException as error:
        release_after(error, device, handled)
        raise


def _load(
    options: LLMOptions, checkpoint: Checkpoint | None, device: torch.device, num_threads: int
) -> OpenEngine:
    """`load`, from a checkpoint or, without one, from a live module."""
    if checkpoint is None:
        loaded, tokenizer = take_module(options)
    else:
        room = free_memory(device) if device.type == "cuda" else None
        loaded, tokenizer = take_checkpoint(options, checkpoint, device, room)
    if options.batch_invariant and not loaded.can_be_batch_invariant:
        raise ConfigError(
            f"batch_invariant=True: parts of {loaded.architecture} run as Hugging Face has "
            f"them, with other bits in other batches: leave it out"
        )
    thread = EngineThread(device, num_threads)
    try:
        config = _resolve_config(options, checkpoint, loaded, device, num_threads, thread)
        opened = _open_engine(config, thread, options, checkpoint, loaded, tokenizer)
        _log.info("loaded %s, with a cache of %d tokens", config.title, config.kv_cache_tokens)
    except BaseException:
        thread.close()  # which gives its stream back
        raise
    return opened


def _resolve_config(
    options: LLMOptions,
    checkpoint: Checkpoint | None,
    loaded: LoadedModel,
    device: torch.device,
    num_threads: int,
    thread: EngineThread,
) -> EngineConfig:
    """Every setting, where the caller left it open too."""
    with thread():
        fitting = kv_tokens(
            loaded.model,
            loaded.kv_layers,
            loaded.dtype,
            device,
            options,
            options.context_length or loaded.max_positions,
            loaded.mapped_bytes,
        )
    return EngineConfig.resolve(
        options,
        model=str(options.model) if checkpoint else type(options.model).__name__,
        architecture=loaded.architecture,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(device),
        quantization=loaded.quantization,
        context_limit=loaded.max_positions,
        kv_cache_tokens=fitting,
        num_threads=num_threads,
        batch_invariant=bool(options.batch_invariant)
        or (device.type == "cpu" and loaded.can_be_batch_invariant),
    )


def _open_engine(
    config: EngineConfig,
    thread: EngineThread,
    options: LLMOptions,
    checkpoint: Checkpoint | None,
    loaded: LoadedModel,
    hf_tokenizer: Any,
) -> OpenEngine:
    """The engine, and what makes requests for it."""
    tokenizer = Tokenizer(hf_tokenizer)
    processor = None
    if checkpoint is not None:
        processor = load_processor(
            loaded.model,
            loaded.architecture,
            loaded.whole_config,
            checkpoint.folder,
            hf_tokenizer,
            options,
        )
    elif options.image_processor:
        raise ConfigError("image_processor is for checkpoints: a live module takes text only")
    reader = PromptReader(
        tokenizer,
        loaded.architecture,
        processor,
        getattr(loaded.model, "pad_input_ids", None),
        options.image_fetcher,
    )
    intake = Intake(
        tokenizer,
        reader,
        Limits(loaded.vocab_size, config.context_length, config.kv_cache_tokens),
        loaded.generation_defaults,
        loaded.end_token_ids,
        config.seed,
    )
    make = partial(
        make_engine,
        model=loaded.model,
        kv_layers=loaded.kv_layers,
        dtype=loaded.dtype,
        vocab_size=loaded.vocab_size,
        tokenizer=tokenizer,
    )
    return OpenEngine(config, thread, loaded.model, tokenizer, intake, make)
