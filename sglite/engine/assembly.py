"""Puts an engine together."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from sglite.cache.kv_pool import KVPool, LayerSpec
from sglite.cache.prefix_cache import PrefixCache
from sglite.engine.decode_graphs import DecodeGraphs
from sglite.engine.decode_steps import DecodeSteps
from sglite.engine.engine import Engine
from sglite.engine.image_features import ImageFeatures
from sglite.engine.model_runner import ModelRunner
from sglite.engine.scheduler import Scheduler
from sglite.engine.tokenizer import Tokenizer
from sglite.interface.config import EngineConfig

# Floats of logits that one step may hold for prompt log-probabilities: 256 MB.
_MAX_LOGITS = 1 << 26


def make_engine(
    config: EngineConfig,
    model: nn.Module,
    kv_layers: Sequence[LayerSpec],
    dtype: torch.dtype,
    vocab_size: int,
    tokenizer: Tokenizer,
    runner: type[ModelRunner] = ModelRunner,
) -> Engine:
    """An engine for a loaded model.

    Args:
        config: every setting.
        model: on the device that `config` names.
        kv_layers, dtype: what the KV cache holds of each token.
        vocab_size: width of the logits.
        tokenizer: for the text of log-probabilities.
        runner: what computes the steps.
    """
    num_pages = config.num_pages + 1  # page 0 is reserved
    scheduler = Scheduler(
        PrefixCache(num_pages, config.page_size, enabled=config.prefix_cache),
        max_running_requests=config.max_running_requests,
        chunked_prefill_size=config.chunked_prefill_size,
        max_logits_rows=max(1, _MAX_LOGITS // vocab_size),
    )
    pool = KVPool(num_pages, config.page_size, kv_layers, dtype, config.device)
    make_decode = partial(
        DecodeSteps if pool.device.type == "cpu" else DecodeGraphs,
        vocab_size=vocab_size,
        max_requests=config.max_running_requests,
        max_tokens=min(config.context_length, config.kv_cache_tokens),
    )
    if pool.device.type == "cuda" and not config.cuda_graphs:
        make_decode = None
    images = None
    if hasattr(model, "get_image_feature"):
        images = ImageFeatures(model, config.image_cache_bytes)
    return Engine(scheduler, runner(model, pool, tokenizer, make_decode, images))
