"""The settings of an `LLM`: what the caller passed, and what it came to.

`LLMOptions` is the former, `EngineConfig` the latter.
Nothing here touches hardware. The engine finds out what only the machine can tell (device, memory,
threads) and hands it to `EngineConfig.resolve`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sglite.interface import checks
from sglite.interface.errors import ConfigError, suggest
from sglite.interface.foreign_names import advice_for_option
from sglite.interface.option_checks import CHECKS, MODEL
from sglite.interface.sampling_params import ALIASES as SAMPLING_ALIASES
from sglite.interface.sampling_params import PARAMETER_NAMES

__all__ = ["ALIASES", "EngineConfig", "LLMOptions", "check_keywords", "refuse_foreign_option"]

#: Other spellings that are accepted, and what they are called here.
ALIASES = {"model_path": "model"}

#: Prefill tokens of a step. On the CPU a step of 512 tokens already runs at the full speed of the
#: matrix product, and a longer one only makes the running requests wait.
_CHUNKED_PREFILL_SIZE = {"cpu": 512, "cuda": 8192}
#: Rows of logits are float32 over the vocabulary, so the number of requests costs memory.
_MAX_RUNNING_REQUESTS = {"cpu": 64, "cuda": 256}
#: Leaves room for the rest of the process: on a GPU, a model that is trained there too.
_MEM_FRACTION = {"cpu": 0.4, "cuda": 0.6}


@dataclass(frozen=True, kw_only=True)
class LLMOptions:
    """What was passed to `LLM(...)`, each value checked by itself. None and "auto" are unset.

    Attributes:
        model: a folder, a hub id, "demo", or a live Hugging Face module.
        tokenizer: a folder, a hub id or a tokenizer object; None: the one beside the weights.
        architecture: the registered name of the model class; None: what config.json says.
        dtype: "auto" (the checkpoint's), "bfloat16", "float16" or "float32", or torch's dtypes.
        device: "auto", "cpu", "cuda" or "cuda:N", or a torch device.
        quantization: name of a method; None: what config.json says.
        context_length: tokens of prompt and completion together; None: the model's own limit.
        kv_cache_tokens: tokens that the KV cache holds; None: from `mem_fraction`.
        mem_fraction: the share of the free memory that the KV cache takes, between 0 and 1.
        page_size: tokens per page of the KV cache.
        max_running_requests: how many requests run at the same time; None: 64 on the CPU, 256
            on a GPU.
        chunked_prefill_size: prefill tokens of a step over all requests; None: 512 on the CPU,
            8192 on a GPU.
        prefix_cache: whether prompts reuse the cached prefixes of others.
        cuda_graphs: whether decode steps run as CUDA graphs; of no effect on the CPU.
        num_threads: threads of the CPU kernels; None: as many as torch uses.
        seed: makes the seeds that requests without one draw reproducible, 0 to 2**64 - 1.
        trust_remote_code: whether Python code of a checkpoint may run (tokenizers, configs).
        batch_invariant: whether a prompt's result is independent of what shares its batch, to
            the bit; None: where it costs nothing.
        revision: branch, tag or commit of a hub model.
        cache_dir: folder of downloaded hub files; None: Hugging Face's own.
        token: access token of the hub, or whether to send the one that is logged in. Shown
            nowhere.
        image_cache_bytes: what the embeddings of images may take that are kept for further
            prompts with the same images.
        image_fetcher: gives the bytes of the file behind a http(s) URL of an image; None: such
            images are refused.
        image_processor: settings of the Hugging Face image processor that are to be others than
            the checkpoint's, such as `{"max_pixels": 1003520}`.

    Raises:
        ConfigError: naming the argument, the value and what is allowed.
    """

    model: Any
    tokenizer: Any = None
    architecture: str | None = None
    dtype: Any = "auto"
    device: Any = "auto"
    quantization: str | None = None
    context_length: int | None = None
    kv_cache_tokens: int | None = None
    mem_fraction: float | None = None
    page_size: int = 16
    max_running_requests: int | None = None
    chunked_prefill_size: int | None = None
    prefix_cache: bool = True
    cuda_graphs: bool = True
    num_threads: int | None = None
    seed: int | None = None
    trust_remote_code: bool = False
    batch_invariant: bool | None = None
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = field(default=None, repr=False)
    image_cache_bytes: int = 256 << 20
    image_fetcher: Callable[[str], bytes] | None = None
    image_processor: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if value is None and option.name != "model":
                value = option.default
            if value is not None or option.name == "model":
                value = CHECKS[option.name](option.name, value)
            object.__setattr__(self, option.name, value)
        if self.mem_fraction is not None and self.kv_cache_tokens is not None:
            raise ConfigError(
                f"mem_fraction={self.mem_fraction} and kv_cache_tokens={self.kv_cache_tokens} "
                "both size the KV cache: give one of them."
            )

    def with_defaults_of(self, kind: str) -> LLMOptions:
        """Return these options with the defaults of "cpu" or "cuda" for what is unset."""
        fraction = None if self.kv_cache_tokens is not None else _MEM_FRACTION[kind]
        return replace(
            self,
            max_running_requests=self.max_running_requests or _MAX_RUNNING_REQUESTS[kind],
            chunked_prefill_size=self.chunked_prefill_size or _CHUNKED_PREFILL_SIZE[kind],
            mem_fraction=self.mem_fraction or fraction,
            cuda_graphs=self.cuda_graphs and kind == "cuda",
        )

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> LLMOptions:
        """Return the options that the keywords of a call say; see `check_keywords`."""
        own = check_keywords(keywords)
        if "model" not in own:
            raise ConfigError(f"model is missing: it must be {MODEL}.")
        return cls(**own)


@dataclass(frozen=True, kw_only=True, repr=False)
class EngineConfig:
    """Every setting of a loaded `LLM`, resolved: `llm.config`. Printing it shows a table.

    Attributes:
        model: the folder or hub id, or the class of a live module.
        architecture: the registered name of the model class that runs.
        dtype: "bfloat16", "float16" or "float32".
        device: "cpu" or "cuda:N".
        quantization: name of the method, or None.
        context_length: tokens of prompt and completion together.
        kv_cache_tokens: tokens that the KV cache holds, a multiple of `page_size`.
        mem_fraction: the share of the free memory that the KV cache took; None if its size was
            given in tokens.
        page_size: tokens per page of the KV cache.
        max_running_requests: how many requests run at the same time.
        chunked_prefill_size: prefill tokens of a step over all requests.
        prefix_cache: whether prompts reuse the cached prefixes of others.
        cuda_graphs: whether decode steps run as CUDA graphs.
        num_threads: threads of the CPU kernels.
        seed: what the seeds of requests without one are drawn from; None: the system.
        trust_remote_code: whether Python code of the checkpoint may run.
        batch_invariant: whether a prompt's result is independent of what shares its batch.
        revision: branch, tag or commit of a hub model.
        cache_dir: folder of downloaded hub files; None: Hugging Face's own.
        image_cache_bytes: what the embeddings of images may take that are kept.
        image_processor: what of the image processor is not as in the checkpoint; None: nothing.
    """

    model: str
    architecture: str
    dtype: str
    device: str
    quantization: str | None
    context_length: int
    kv_cache_tokens: int
    mem_fraction: float | None
    page_size: int
    max_running_requests: int
    chunked_prefill_size: int
    prefix_cache: bool
    cuda_graphs: bool
    num_threads: int
    seed: int | None
    trust_remote_code: bool
    batch_invariant: bool
    revision: str | None
    cache_dir: str | None
    image_cache_bytes: int
    image_processor: Mapping[str, Any] | None = None

    @property
    def title(self) -> str:
        """An `LLM` with these settings, in a line."""
        return f"LLM({self.model!r}, {self.architecture}, {self.dtype}, {self.device})"

    @property
    def num_pages(self) -> int:
        """Pages of the KV cache that requests can use."""
        return self.kv_cache_tokens // self.page_size

    @classmethod
    def resolve(
        cls,
        options: LLMOptions,
        *,
        model: str,
        architecture: str,
        dtype: str,
        device: str,
        quantization: str | None,
        context_limit: int | None,
        kv_cache_tokens: int,
        num_threads: int,
        batch_invariant: bool,
    ) -> EngineConfig:
        """Fill in what the caller left open; the arguments are what was found out since.

        Args:
            options: what the caller passed.
            model: how to call the model.
            architecture: the registered name of its class.
            dtype: the element type of its weights and its cache.
            device: "cpu" or "cuda:N".
            quantization: the method that the checkpoint or the caller names.
            context_limit: the longest context that the model was made for; None if unbounded.
            kv_cache_tokens: how many tokens fit in the memory for the KV cache, cut to whole
                pages. What the caller asked for goes before it, brought up to whole pages.
            num_threads: threads to use.
            batch_invariant: whether results are independent of the batch.

        Raises:
            ConfigError: `context_length` is above the model's limit, or not one page fits.
        """
        options = options.with_defaults_of(device.partition(":")[0])
        if options.kv_cache_tokens is not None:
            pages = math.ceil(options.kv_cache_tokens / options.page_size)
        else:
            pages = kv_cache_tokens // options.page_size
        if not pages:
            raise ConfigError(
                f"The memory for the KV cache holds {kv_cache_tokens} tokens, but one page takes "
                f"page_size={options.page_size}: free memory, or give a larger mem_fraction."
            )
        usable = pages * options.page_size
        return cls(
            model=model,
            architecture=architecture,
            dtype=dtype,
            device=device,
            quantization=quantization,
            context_length=_context_length(options.context_length, context_limit, usable),
            kv_cache_tokens=usable,
            mem_fraction=options.mem_fraction,
            page_size=options.page_size,
            max_running_requests=options.max_running_requests,
            chunked_prefill_size=options.chunked_prefill_size,
            prefix_cache=options.prefix_cache,
            cuda_graphs=options.cuda_graphs,
            num_threads=num_threads,
            seed=options.seed,
            trust_remote_code=options.trust_remote_code,
            batch_invariant=batch_invariant,
            revision=options.revision,
            cache_dir=None if options.cache_dir is None else os.fspath(options.cache_dir),
            image_cache_bytes=options.image_cache_bytes,
            image_processor=options.image_processor,
        )

    def __repr__(self) -> str:
        rows = [(option.name, getattr(self, option.name)) for option in fields(self)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(
            ["EngineConfig", *(f"  {name:<{width}}  {_shown(value)}" for name, value in rows)]
        )


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def _context_length(asked: int | None, limit: int | None, kv_cache_tokens: int) -> int:
    """Return the context length: what was asked for, within the model's limit."""
    if limit is None:
        return asked or kv_cache_tokens
    if asked is not None and asked > limit:
        checks.refuse(
            "context_length", asked, f"at most {limit}, the model's own limit", ConfigError
        )
    return asked or limit


def check_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of an `LLM(...)` call under our own names.

    Raises:
        ConfigError: a name is unknown or belongs to another library, or the same option was
            given twice.
    """
    own: dict[str, Any] = {}
    known = [option.name for option in fields(LLMOptions)]
    for spelling, value in keywords.items():
        name = ALIASES.get(spelling, spelling)
        if name not in known:
            refuse_foreign_option(spelling)
            hint = suggest(spelling, known)
            raise ConfigError(
                f"LLM() has no argument {spelling!r}.{hint} Known: {', '.join(known)}."
            )
        if own.get(name) is None:
            own[name] = value
        elif value is not None:
            raise ConfigError(f"{name} was given twice, as {' and '.join(_spellings(name))}.")
    return own


def refuse_foreign_option(name: str) -> None:
    """Raise a `ConfigError` with our name if `name` belongs to vLLM, SGLang or to `generate`."""
    advice = advice_for_option(name)
    if advice is None and (name in PARAMETER_NAMES or name in SAMPLING_ALIASES):
        advice = "it is a sampling parameter; pass it to llm.generate(...)"
    if advice is not None:
        raise ConfigError(f"The argument {name!r} of LLM() does not exist here: {advice}.")


def _spellings(name: str) -> list[str]:
    return [name, *(alias for alias, own in ALIASES.items() if own == name)]
