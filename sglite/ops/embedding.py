"""Embedding lookup."""

import torch
from torch import Tensor

from sglite import _C
from sglite.ops.packed_weight import PackedWeight
from sglite.ops.quantized_weight import QuantizedWeight


def embedding(ids: Tensor, weight: PackedWeight | QuantizedWeight | Tensor) -> Tensor:
    """`out[i] = weight[ids[i]]`.

    Args:
        ids: [count], int64.
        weight: the table, [rows, width], float32, bfloat16 or float16: plain with the elements of a
            row side by side, or packed or quantised, as an output head that shares its weight is.

    Returns:
        [count, width], the dtype of `weight`.

    Raises:
        IndexError: an id is below 0 or not below the number of rows.
    """
    width = weight.shape[1]
    out = torch.empty((*ids.shape, width), dtype=weight.dtype, device=weight.device)
    if type(weight) is PackedWeight:
        _C.embedding_packed(out, ids, weight.storage, weight.n, width)
    elif type(weight) is QuantizedWeight:
        _C.embedding_quantized(out, ids, weight.arguments)
        out = weight.in_columns_order(out)
    else:
        _C.embedding_plain(out, ids, weight)
    return out
