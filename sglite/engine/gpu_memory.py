"""How much of a GPU's memory the KV cache may take."""

from collections.abc import Sequence

import torch
from torch import nn

from sglite.cache.kv_pool import KVPool, LayerSpec
from sglite.interface.errors import OutOfMemoryError
from sglite.layers.forward_batch import ForwardBatch

_GB = 1 << 30


def kv_tokens_on_gpu(
    mem_fraction: float, bytes_per_token: int, step_bytes: int, device: torch.device
) -> int:
    """How many tokens' keys and values fit into a share of what a step leaves free.

    Args:
        mem_fraction: the share.
        bytes_per_token: of the KV cache.
        step_bytes: what `step_memory` gave.
        device: the GPU.

    Raises:
        OutOfMemoryError: not even one.
    """
    free = free_memory(device)
    tokens = int((free - step_bytes) * mem_fraction) // bytes_per_token
    if tokens < 1:
        raise OutOfMemoryError(
            f"no room for the KV cache on {device}: {free / _GB:.2f} GB are free after the "
            f"weights, a step needs {step_bytes / _GB:.2f} GB, and of what is left mem_fraction="
            f"{mem_fraction} may be used, which does not hold one token ({bytes_per_token} bytes): "
            f"free memory on the GPU, or pass a smaller chunked_prefill_size or a larger "
            f"mem_fraction"
        )
    return tokens


def check_kv_cache_fits(num_tokens: int, bytes_per_token: int, device: torch.device) -> None:
    """Raises OutOfMemoryError if a cache of just this size cannot be had."""
    free = free_memory(device)
    needed = num_tokens * bytes_per_token
    if needed > free:
        raise OutOfMemoryError(
            f"a KV cache of {num_tokens} tokens needs {needed / _GB:.2f} GB on {device}, where "
            f"{free / _GB:.2f} GB are free after the weights: pass a kv_cache_tokens of at most "
            f"{free // bytes_per_token}, or free memory on the GPU"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated, those that torch holds in reserve included."""
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def step_memory(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    dtype: torch.dtype,
    device: torch.device,
    *,
    page_size: int,
    num_tokens: int,
    num_requests: int,
    context_length: int,
) -> int:
    """Bytes that the largest step takes beside weights and cache, found by running one.

    Args:
        model: with its weights.
        layers, dtype, page_size: of the KV cache.
        device: the GPU; the current stream is used.
        num_tokens: prefill tokens of a step.
        num_requests: of a step.
        context_length: positions are below it.

    Raises:
        OutOfMemoryError: there is no room for the step.
    """
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info(device)[0]
    num_pages = -(-num_tokens // page_size)
    try:
        pool = KVPool(num_pages + 1, page_size, layers, dtype, device)
        tokens = torch.arange(num_tokens, device=device)
        page_table = torch.arange(1, num_pages + 1, dtype=torch.int32, device=device)
        batch = ForwardBatch(
            query_start=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
            kv_lens=torch.tensor([num_tokens], dtype=torch.int32, device=device),
            kv_end=(tokens + 1).int(),
            slots=tokens + page_size,
            page_table=page_table[None],
            logits_rows=tokens[-num_requests:],
            kv_cache=pool.layers,
            max_query_tokens=num_tokens,
        )
        model(torch.zeros_like(tokens), tokens % context_length, batch)
        torch.cuda.synchronize(device)
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"no room on {device} for a step of {num_tokens} tokens beside the weights, where "
            f"{free_memory(device) / _GB:.2f} GB are free: free memory on the GPU, or pass a "
            f"smaller chunked_prefill_size or max_running_requests"
        ) from error
    taken = before - torch.cuda.mem_get_info(device)[0] - pool.num_bytes
    pool.close()
    del batch, tokens, page_table
    torch.cuda.empty_cache()
    return taken
