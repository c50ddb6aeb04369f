"""How many tokens the KV cache is to hold."""

from collections.abc import Sequence

import torch
from torch import nn

from sglite.cache.kv_pool import LayerSpec
from sglite.engine.gpu_memory import check_kv_cache_fits, kv_tokens_on_gpu, step_memory
from sglite.engine.memory import check_kv_tokens, kv_tokens_that_fit
from sglite.interface.config import LLMOptions


def kv_tokens(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    dtype: torch.dtype,
    device: torch.device,
    options: LLMOptions,
    context_length: int | None,
    mapped_bytes: int,
) -> int:
    """What the caller asked for, or as many as `options.mem_fraction` of the free memory holds.

    On a GPU the largest step is run once, to see what it leaves free.

    Args:
        model: with its weights.
        layers, dtype: what the cache holds of each token.
        device: where it lies.
        options: with the defaults of the device.
        context_length: tokens of a request at most; None: no limit.
        mapped_bytes: of files that the model's weights lie in.

    Raises:
        OutOfMemoryError: there is no room, or less than was asked for.
    """
    bytes_per_token = sum(layer.bytes_per_token(dtype) for layer in layers)
    if options.kv_cache_tokens is not None:
        if device.type == "cuda":
            check_kv_cache_fits(options.kv_cache_tokens, bytes_per_token, device)
            return options.kv_cache_tokens
        return check_kv_tokens(options.kv_cache_tokens, bytes_per_token, mapped_bytes)
    if device.type == "cpu":
        return kv_tokens_that_fit(options.mem_fraction, bytes_per_token, mapped_bytes)
    step_bytes = step_memory(
        model,
        layers,
        dtype,
        device,
        page_size=options.page_size,
        num_tokens=options.chunked_prefill_size,
        num_requests=options.max_running_requests,
        context_length=context_length or options.chunked_prefill_size,
    )
    fitting = kv_tokens_on_gpu(options.mem_fraction, bytes_per_token, step_bytes, device)
    if context_length is None:
        return fitting
    # More than all requests can use together would be taken from others for nothing.
    return min(fitting, options.max_running_requests * context_length)
