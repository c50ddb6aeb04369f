"""Rotary position embedding."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sglite import ops
from sglite.interface.errors import CheckpointError, UnsupportedModelError
from sglite.layers.rope_frequencies import (
    RopeParameters,
    default_positions,
    inverse_frequencies,
    max_positions,
)

# Rows of a table are computed in blocks of this many, always from the block's first row on: vector
# functions may round differently by the length they get, and a row must not depend on the others.
_BLOCK = 4096


class RotaryTable:
    """Cosines and sines of positions.

    On the CPU: of those that have come up so far; it grows with them, since a long context's whole
    table would cost more time and memory than a small model's weights. On a GPU: of the whole
    context, because a step that is captured may neither wait for a position nor grow a table.

    Args:
        parameters: kind and numbers of the scaling.
        rotary_dim: channels that rotate.
        max_position: `max_position_embeddings` of the checkpoint.
        context_length: positions that may come up.
        device: where it lies.

    Attributes:
        cos_sin: [rows, rotary_dim] float32: cosines, then sines.
    """

    def __init__(
        self,
        parameters: RopeParameters,
        rotary_dim: int,
        max_position: int,
        context_length: int,
        device: torch.device | str = "cpu",
    ):
        self.context_length = context_length
        self.rotary_dim = rotary_dim
        with torch.device("cpu"):  # whatever the default is: the last bit differs between devices
            self._frequencies, self._factor = inverse_frequencies(
                parameters, rotary_dim, max_position, context_length
            )
        self.cos_sin = self._first_rows(torch.device(device))

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.cos_sin.device

    def move_to(self, device: torch.device) -> None:
        """Makes it anew on another device."""
        if device != self.device:
            self.cos_sin = self._first_rows(device)

    def grow_for(self, positions: Tensor) -> None:
        """Adds rows until all positions have one, and a few more; none where all have one already.

        Several layers share a table, and each of them may ask.

        Raises:
            IndexError: a position is outside the context.
        """
        smallest, largest = (int(value) for value in positions.aminmax())
        if smallest < 0 or largest >= self.context_length:
            raise IndexError(
                f"positions run from {smallest} to {largest}, but must be from 0 to "
                f"{self.context_length - 1}, one less than the context length"
            )
        present = self.cos_sin.shape[0]  # whole blocks, as it is less than the context
        if largest < present:
            return
        rows = min(max(largest + 1, 2 * present), self.context_length)
        blocks = [self._block(start) for start in range(present, rows, _BLOCK)]
        self.cos_sin = torch.cat([self.cos_sin, *blocks])[: self.context_length].contiguous()

    def _first_rows(self, device: torch.device) -> Tensor:
        """The rows that are there from the beginning: none, or on a GPU all."""
        rows = self.context_length if device.type == "cuda" else 0
        table = torch.empty(rows, self.rotary_dim, dtype=torch.float32, device=device)
        if rows:
            positions = torch.arange(rows, dtype=torch.float32, device=device)
            angles = torch.outer(positions, self._frequencies.to(device))
            cosines, sines = table.chunk(2, 1)
            torch.cos(angles, out=cosines)
            torch.sin(angles, out=sines)
            if self._factor != 1.0:
                table *= self._factor
        return table

    def _block(self, start: int) -> Tensor:
        positions = torch.arange(start, start + _BLOCK, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, self._frequencies)
        block = torch.cat([angles.cos(), angles.sin()], dim=1)
        return block if self._factor == 1.0 else block * self._factor


class RotaryEmbedding(nn.Module):
    """Rotates pairs of channels of queries and keys by angles that grow with the position.

    `(a, b) -> (a * cos - b * sin, b * cos + a * sin)` with `angle = position * frequency[pair]`.
    (Su et al., 2021; kinds of scaling: `sglite.layers.rope_frequencies`.)

    With `mrope_section` a token may have three positions (time, height and width), each for its own
    section of the pairs; where the three agree, that is the same. (M-RoPE; Wang et al., 2024.)

    What a token gets depends on its position and the configured context length only, never on the
    other sequences of a batch; for the kind "dynamic" this differs from Hugging Face once the
    context length is above `max_position`.

    Args:
        head_dim: channels of a head.
        rotary_dim: channels that rotate, from the first on; even.
        max_position: `max_position_embeddings` of the checkpoint; also the context length, until
            `set_context_length` is called on the model.
        base: "rope_theta", where `rope_parameters` has none.
        is_neox_style: pairs are channels (i, i + rotary_dim / 2); otherwise (2 i, 2 i + 1).
        rope_parameters: kind and numbers of the scaling, as in a checkpoint's config.
        mrope_section: pairs that turn by time, height and width, one behind the other.

    Raises:
        UnsupportedModelError: an unknown kind of scaling.
        CheckpointError: a value that the kind needs is missing, or the sections are not the pairs.
    """

    def __init__(
        self,
        head_dim: int,
        rotary_dim: int,
        max_position: int,
        base: float | None = None,
        is_neox_style: bool = True,
        rope_parameters: Mapping[str, Any] | None = None,
        mrope_section: Sequence[int] | None = None,
    ):
        super().__init__()
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise ValueError(
                f"RotaryEmbedding: rotary_dim={rotary_dim} is not allowed: it must be even and at "
                f"most head_dim={head_dim}"
            )
        self.head_dim = head_dim
        self.rotary_dim = rotary_dim
        self.max_position = max_position
        self.is_interleaved = not is_neox_style
        if mrope_section is not None and sum(mrope_section) != rotary_dim // 2:
            raise CheckpointError(
                f"mrope_section={list(mrope_section)} does not add up to the {rotary_dim // 2} "
                f"pairs of channels that rotate"
            )
        self.mrope_section = None if mrope_section is None else tuple(mrope_section)
        self._mixed: tuple[Callable[[], Tensor | None], Tensor, Tensor] | None = None
        self.parameters = RopeParameters.read(rope_parameters, base)
        self.table = self.make_table(max_position, torch.get_default_device())

    @property
    def default_context_length(self) -> int:
        """The context that the checkpoint speaks of."""
        return default_positions(self.parameters, self.max_position)

    @property
    def max_context_length(self) -> int:
        """The longest context that the scaling makes room for."""
        return max_positions(self.parameters, self.max_position)

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates in place, and returns the same two tensors.

        Args:
            positions: [T] or [3, T] int64, below the context length.
            q: [T, heads, head_dim] or [T, heads * head_dim]; rows may be apart.
            k: [T, kv_heads, head_dim] or [T, kv_heads * head_dim], likewise.
        """
        if q.ndim == 3:
            q_heads, k_heads = q, k
        else:
            q_heads, k_heads = (x.view(x.shape[0], -1, self.head_dim) for x in (q, k))
        self.with_table(
            positions,
            lambda rows, cos_sin: ops.apply_rope(
                q_heads, k_heads, rows, cos_sin, interleaved=self.is_interleaved
            ),
        )
        return q, k

    def with_table(self, positions: Tensor, run: Callable[[Tensor, Tensor], Any]) -> Any:
        """`run(rows, cos_sin)` with a table that has a row for each token.

        Args:
            positions: [T] or [3, T] int64, below the context length.
            run: takes [T] int64, the tokens' rows, and the table; raises IndexError, before it
                changes anything, for a row that is not there.
        """
        try:
            return run(*self.rows_and_table(positions))
        except IndexError:  # a position that is new to the table
            self.table.grow_for(positions)
            return run(*self.rows_and_table(positions))

    def rows_and_table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of tokens in a table of cosines and sines, and the table, as it is now.

        Args:
            positions: [T] int64, which are the rows; or [3, T], which get a table of their own,
                the same tensors as long as the positions are the same tensor.

        Raises:
            IndexError: on the CPU, one of three positions has no row in the table yet.
        """
        if positions.ndim == 1:
            return positions, self.table.cos_sin
        mixed = self._mixed
        if mixed is None or mixed[0]() is not positions:
            table = self._mixed_table(positions)
            rows = torch.arange(len(table), device=table.device)
            mixed = self._mixed = weakref.ref(positions), rows, table
        return mixed[1:]

    def _mixed_table(self, positions: Tensor) -> Tensor:
        """[T, rotary_dim]: each section of the pairs from the row of its own position."""
        if self.mrope_section is None:
            raise ValueError(
                f"positions {list(positions.shape)} are M-RoPE's, but this RotaryEmbedding has no "
                f"mrope_section"
            )
        table = self.table.cos_sin
        if not table.is_cuda and positions.numel() and int(positions.max()) >= len(table):
            raise IndexError("a position that is new to the table")
        cosines, sines = (
            [
                half[rows]
                for half, rows in zip(part.split(self.mrope_section, 1), positions, strict=True)
            ]
            for part in table.chunk(2, 1)
        )
        return torch.cat([*cosines, *sines], 1)

    def make_table(
        self, context_length: int, device: torch.device | str | None = None
    ) -> RotaryTable:
        """A table for so many positions, on the device of the one that it replaces if None."""
        return RotaryTable(
            self.parameters,
            self.rotary_dim,
            self.max_position,
            context_length,
            self.table.device if device is None else device,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        """Moves the table where `to(device)` moves parameters; its dtype stays float32."""
        super()._apply(fn, recurse)
        self.table.move_to(fn(torch.empty(0, device=self.table.device)).device)
        return self

    def extra_repr(self) -> str:
        """The part of the module's repr in brackets."""
        kind, base = self.parameters.kind, self.parameters.base
        return f"{self.rotary_dim} of {self.head_dim}, kind={kind}, base={base:g}"


def get_rope(
    head_size: int,
    rotary_dim: int,
    max_position: int,
    base: float | None = None,
    is_neox_style: bool = True,
    rope_scaling: Mapping[str, Any] | None = None,
    partial_rotary_factor: float = 1.0,
) -> RotaryEmbedding:
    """A `RotaryEmbedding`, by the arguments that SGLang and vLLM have for it."""
    if partial_rotary_factor < 1.0:
        rotary_dim = int(rotary_dim * partial_rotary_factor)
    return RotaryEmbedding(head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling)


def rope_from_config(
    config: Any,
    head_dim: int,
    *,
    layer_type: str | None = None,
    is_partial: bool = False,
    is_neox_style: bool = True,
) -> RotaryEmbedding:
    """The `RotaryEmbedding` that a Hugging Face config describes.

    Args:
        config: has `max_position_embeddings`, and `rope_parameters` (transformers 5), or
            `rope_theta` and `rope_scaling`.
        head_dim: channels of a head.
        layer_type: the kind of layer, where `rope_parameters` has a table for each.
        is_partial: whether `partial_rotary_factor` may say which share of the channels rotates;
            it is refused otherwise, and all of them do.
        is_neox_style: as for `RotaryEmbedding`.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if layer_type is not None:
        parameters = (parameters or {}).get(layer_type)
        if not isinstance(parameters, Mapping):
            raise CheckpointError(f"rope_parameters: there are none for {layer_type!r}")
    if any(isinstance(value, Mapping) for value in (parameters or {}).values()):
        raise UnsupportedModelError(
            f"rope_parameters: different values for each of {', '.join(parameters)} are not "
            f"implemented for this architecture"
        )
    if (parameters or {}).get("mrope_interleaved"):
        raise UnsupportedModelError(
            "rope_parameters: mrope_interleaved is not implemented; known are sections of M-RoPE "
            "that lie one behind the other"
        )
    share = (parameters or {}).get("partial_rotary_factor", 1.0)
    share = 1.0 if share is None else share
    if share != 1.0 and not is_partial:
        raise UnsupportedModelError(
            f"rope_parameters: partial_rotary_factor={share!r} is not implemented for this "
            f"architecture, whose heads rotate whole"
        )
    return RotaryEmbedding(
        head_dim,
        int(head_dim * share),
        config.max_position_embeddings,
        getattr(config, "rope_theta", None),
        is_neox_style,
        rope_parameters=parameters,
        mrope_section=(parameters or {}).get("mrope_section"),
    )


def set_context_length(model: nn.Module, context_length: int) -> None:
    """Tells every `RotaryEmbedding` of a model how many positions may come up.

    Those with the same angles share one table from now on.
    """
    tables: dict[tuple, RotaryTable] = {}
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            device = module.table.device
            key = (module.rotary_dim, module.max_position, module.parameters, device)
            if key not in tables:
                tables[key] = module.make_table(context_length, device)
            module.table = tables[key]
