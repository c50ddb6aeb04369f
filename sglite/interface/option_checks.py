"""Checks of what is passed to `LLM(...)`, each value by itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from sglite.interface import checks
from sglite.interface.errors import ConfigError

# Names of element types, by every spelling that is accepted.
_DTYPES = {
    "auto": "auto",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
}

#: What the option `model` may be.
MODEL = "a folder, a hub id, 'demo', or a live Hugging Face module"


def _path(name: str, value: Any) -> str | os.PathLike[str]:
    if isinstance(value, os.PathLike):
        return value
    if not isinstance(value, str) or not value:
        checks.refuse(name, value, "a path (a string or a pathlib.Path)", ConfigError)
    return value


def _model(name: str, value: Any) -> Any:
    is_module = hasattr(value, "named_parameters") and not isinstance(value, type)
    if isinstance(value, os.PathLike) or (isinstance(value, str) and value) or is_module:
        return value
    checks.refuse(name, value, MODEL, ConfigError)


def _tokenizer(name: str, value: Any) -> Any:
    is_tokenizer = hasattr(value, "encode") and hasattr(value, "decode")
    if isinstance(value, os.PathLike) or (isinstance(value, str) and value) or is_tokenizer:
        return value
    checks.refuse(name, value, "a folder, a hub id or a tokenizer object", ConfigError)


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        checks.refuse(name, value, "a name (a string)", ConfigError)
    return value


def _dtype(name: str, value: Any) -> str:
    dtype = _DTYPES.get(str(value).removeprefix("torch."))
    if dtype is None:
        checks.refuse(name, value, "'auto', 'bfloat16', 'float16' or 'float32'", ConfigError)
    return dtype


def _device(name: str, value: Any) -> str:
    kind, colon, number = str(value).partition(":")
    if kind == "cuda" and (number.isdecimal() or not colon):
        return str(value)
    if str(value) in ("auto", "cpu"):
        return str(value)
    if str(value) == "cpu:0":
        return "cpu"
    checks.refuse(name, value, "'auto', 'cpu', 'cuda' or 'cuda:N'", ConfigError)


def _token(name: str, value: Any) -> str | bool:
    # The value stays out of the message: it may be a secret of another form.
    if not isinstance(value, str | bool) or value == "":
        given = "an empty string" if value == "" else f"a {type(value).__name__}"
        raise ConfigError(f"{name} must be a string, True or False, not {given}.")
    return value


def _function(name: str, value: Any) -> Callable[[str], bytes]:
    if not callable(value):
        checks.refuse(name, value, "a function from a URL to the bytes of a file", ConfigError)
    return value


def _settings(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        allowed = "a dict of settings of the Hugging Face image processor, {'max_pixels': 1003520}"
        checks.refuse(name, value, allowed, ConfigError)
    return {key: setting for key, setting in value.items() if setting is not None}


_integer = partial(checks.integer, minimum=1, error=ConfigError)
_boolean = partial(checks.boolean, error=ConfigError)

#: By the name of an option: takes that and a value, and gives the value in its plain type.
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "model": _model,
    "tokenizer": _tokenizer,
    "architecture": _name,
    "dtype": _dtype,
    "device": _device,
    "quantization": _name,
    "context_length": _integer,
    "kv_cache_tokens": _integer,
    "mem_fraction": partial(
        checks.real, minimum=0.0, maximum=1.0, above=True, below=True, error=ConfigError
    ),
    "page_size": _integer,
    "max_running_requests": _integer,
    "chunked_prefill_size": _integer,
    "prefix_cache": _boolean,
    "cuda_graphs": _boolean,
    "num_threads": _integer,
    "seed": partial(checks.integer, minimum=0, maximum=checks.SEED_MAX, error=ConfigError),
    "trust_remote_code": _boolean,
    "batch_invariant": _boolean,
    "revision": _name,
    "cache_dir": _path,
    "token": _token,
    "image_cache_bytes": partial(checks.integer, minimum=0, error=ConfigError),
    "image_fetcher": _function,
    "image_processor": _settings,
}
