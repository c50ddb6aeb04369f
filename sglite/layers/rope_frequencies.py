"""The frequencies of rotary position embedding, by the kinds of scaling that checkpoints name.

A kind turns the description of a RoPE into inverse frequencies, [rotary_dim / 2], and a factor on
cosines and sines. All arithmetic is float32 in the order in which Hugging Face does it, because the
angle of a position far out is large enough for the last bit of a frequency to count.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sglite.interface.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True)
class RopeParameters:
    """What `rope_parameters` (`rope_scaling` in older checkpoints) says, checked.

    Attributes:
        kind: a key of `KINDS`.
        base: wavelengths run from 2 pi to about 2 pi times this ("rope_theta").
        values: the kind's own numbers, as sorted pairs, so that equal descriptions compare equal.
    """

    kind: str = "default"
    base: float = 10000.0
    values: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def read(
        cls, parameters: Mapping[str, Any] | None, base: float | None = None
    ) -> "RopeParameters":
        """Reads a dict of either spelling (`rope_type` or `type`); None is the default kind.

        Args:
            parameters: the dict.
            base: "rope_theta" where the dict has none.

        Raises:
            UnsupportedModelError: an unknown kind.
            CheckpointError: a value that the kind needs is missing or no number.
        """
        given = dict(parameters or {})
        kind = given.pop("rope_type", None) or given.get("type") or "default"
        given.pop("type", None)
        if kind not in KINDS:
            raise UnsupportedModelError(
                f"rope_parameters: the kind {kind!r} is not implemented; known kinds: "
                f"{', '.join(sorted(KINDS))}"
            )
        theta = given.pop("rope_theta", None)
        theta = theta if theta is not None else base if base is not None else 10000.0
        numbers = {
            name: tuple(given[name]) if isinstance(given[name], list) else given[name]
            for name in (*KINDS[kind].required, *KINDS[kind].optional)
            if given.get(name) is not None
        }
        for name in KINDS[kind].required:
            if name not in numbers:
                raise CheckpointError(f"rope_parameters: the kind {kind!r} needs {name!r}")
        for name, value in {"rope_theta": theta, **numbers}.items():
            may_be_zero = name not in ("rope_theta", *KINDS[kind].required)
            if name in _LISTS:
                if not isinstance(value, tuple) or not all(_is_number(v, False) for v in value):
                    raise CheckpointError(
                        f"rope_parameters: {name}={value!r} is not allowed: it must be a list of "
                        f"numbers above 0"
                    )
            elif not _is_number(value, may_be_zero):
                raise CheckpointError(
                    f"rope_parameters: {name}={value!r} is not allowed: it must be a number above 0"
                )
        return cls(kind, float(theta), tuple(sorted(numbers.items())))

    def __getitem__(self, name: str) -> Any:
        return dict(self.values)[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The value called `name`, or the default."""
        return dict(self.values).get(name, default)


def inverse_frequencies(
    parameters: RopeParameters, rotary_dim: int, max_position: int, context_length: int
) -> tuple[Tensor, float]:
    """Frequencies [rotary_dim / 2] float32, and the factor on cosines and sines.

    Args:
        parameters: the kind and its numbers.
        rotary_dim: channels that rotate.
        max_position: `max_position_embeddings` of the checkpoint.
        context_length: positions that may come up; only the kinds "dynamic" and "longrope" look at
            it.
    """
    return KINDS[parameters.kind].compute(parameters, rotary_dim, max_position, context_length)


def default_positions(parameters: RopeParameters, max_position: int) -> int:
    """The context that a checkpoint speaks of: with "yarn", its original length times the factor.

    (Many "yarn" checkpoints leave `max_position_embeddings` at the length before scaling.) With
    "longrope" it is the original length: see there.
    """
    if parameters.kind == "longrope":
        return min(max_position, int(_original_positions(parameters, max_position)))
    if parameters.kind == "yarn":
        original = parameters.get("original_max_position_embeddings", max_position)
        return max(max_position, int(original * parameters["factor"]))
    return max_position


def max_positions(parameters: RopeParameters, max_position: int) -> int:
    """The longest context that may be asked for.

    "linear" and "dynamic" checkpoints leave it open whether `max_position_embeddings` was raised
    with the factor, so that up to `factor` times as much is allowed. "longrope" ones raised it.
    """
    if parameters.kind == "longrope":
        return max_position
    if parameters.kind in ("linear", "dynamic"):
        return max(max_position, int(max_position * parameters["factor"]))
    return default_positions(parameters, max_position)


def _is_number(value: Any, may_be_zero: bool) -> bool:
    """Whether it is a finite number above 0, or 0 where that is allowed."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return value >= 0 if may_be_zero else value > 0


def _original_positions(parameters: RopeParameters, max_position: int) -> float:
    """The context of a checkpoint before it was extended."""
    return parameters.get("original_max_position_embeddings", max_position)


def _plain(base: float, rotary_dim: int) -> Tensor:
    """`base ** (-2 i / rotary_dim)`. (Su et al., 2021.)"""
    return 1.0 / _wavelengths(base, rotary_dim)


def _wavelengths(base: float, rotary_dim: int) -> Tensor:
    """`base ** (2 i / rotary_dim)`: the wavelengths, divided by 2 pi."""
    return base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def _default(parameters, rotary_dim, max_position, context_length):
    return _plain(parameters.base, rotary_dim), 1.0


def _linear(parameters, rotary_dim, max_position, context_length):
    """Positions divided by the factor. (Chen et al., 2023: position interpolation.)"""
    return _plain(parameters.base, rotary_dim) / parameters["factor"], 1.0


def _dynamic(parameters, rotary_dim, max_position, context_length):
    """The base grows with the context. ("NTK-aware" scaling.)

    Hugging Face takes the longest sequence so far for the context, which makes a prompt's result
    depend on what ran before it. Here the base follows from the configured context length alone:
    no scaling up to `max_position`, where both agree, and beyond it one base for all positions.
    """
    factor = parameters["factor"]
    length = max(context_length, max_position)
    growth = factor * length / max_position - (factor - 1)
    base = parameters.base * growth ** (rotary_dim / (rotary_dim - 2))
    return _plain(base, rotary_dim), 1.0


def _llama3(parameters, rotary_dim, max_position, context_length):
    """Long wavelengths divided by the factor, short ones kept, a ramp between. (Llama 3.1.)"""
    frequencies = _plain(parameters.base, rotary_dim)
    factor, low, high = (
        parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    original = _original_positions(parameters, max_position)
    wavelengths = 2 * math.pi / frequencies
    share_kept = (original / wavelengths - low) / (high - low)
    ramp = (1 - share_kept) * frequencies / factor + share_kept * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, ramp)
    return torch.where(wavelengths < original / high, frequencies, scaled), 1.0


def _yarn(parameters, rotary_dim, max_position, context_length):
    """Interpolates slow channels, keeps fast ones, sharpens attention. (Peng et al., 2023.)"""
    factor = parameters["factor"]
    original = _original_positions(parameters, max_position)
    wavelengths = _wavelengths(parameters.base, rotary_dim)

    def channel_of(num_rotations: float) -> float:
        """The channel pair that turns so many times within the original context."""
        ratio = original / (num_rotations * 2 * math.pi)
        return rotary_dim * math.log(ratio) / (2 * math.log(parameters.base))

    low = channel_of(parameters.get("beta_fast") or 32)
    high = channel_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - ramp
    frequencies = (1.0 / (factor * wavelengths)) * (1 - kept) + (1.0 / wavelengths) * kept

    def sharpness(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        weights = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention_factor = (
            sharpness(weights[0]) / sharpness(weights[1]) if all(weights) else sharpness()
        )
    return frequencies, float(attention_factor)


def _longrope(parameters, rotary_dim, max_position, context_length):
    """A factor for each wavelength, of two lists, and sharper attention. (Ding et al., 2024.)

    One list is for contexts up to the original length, the other for longer ones. Hugging Face
    chooses by the longest sequence of a batch, so that a prompt's result depends on what shares the
    batch, and a text that grows past the original length meets keys rotated by the other list. Here
    the configured context length chooses, for all positions: the original length unless more was
    asked for, where both agree, and the list for long contexts if it was, where both agree on
    sequences longer than the original length.
    """
    original = _original_positions(parameters, max_position)
    name = "long_factor" if context_length > original else "short_factor"
    factors = torch.tensor(parameters[name], dtype=torch.float32)
    if len(factors) != rotary_dim // 2:
        raise CheckpointError(
            f"rope_parameters: {name} has {len(factors)} numbers, but {rotary_dim // 2} pairs of "
            f"channels rotate"
        )
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        growth = parameters.get("factor", max_position / original)
        attention_factor = 1.0
        if growth > 1:
            attention_factor = math.sqrt(1 + math.log(growth) / math.log(original))
    return 1.0 / (factors * _wavelengths(parameters.base, rotary_dim)), float(attention_factor)


@dataclass(frozen=True)
class _Kind:
    compute: Callable[[RopeParameters, int, int, int], tuple[Tensor, float]]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


# What is a number for each pair of channels.
_LISTS = ("short_factor", "long_factor")

#: The kinds that are implemented, by the name that checkpoints use.
KINDS: dict[str, _Kind] = {
    "default": _Kind(_default),
    "linear": _Kind(_linear, ("factor",)),
    "dynamic": _Kind(_dynamic, ("factor",)),
    "llama3": _Kind(
        _llama3,
        ("factor", "low_freq_factor", "high_freq_factor"),
        ("original_max_position_embeddings",),
    ),
    "longrope": _Kind(
        _longrope, _LISTS, ("original_max_position_embeddings", "attention_factor", "factor")
    ),
    "yarn": _Kind(
        _yarn,
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}
