"""`sglite.compare`: a model in sglite against the same in Hugging Face transformers."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from sglite.engine.device import resolve_device
from sglite.interface import checks
from sglite.interface.errors import ConfigError, UnsupportedModelError
from sglite.llm import LLM
from sglite.models.checkpoint import Checkpoint, has_tokenizer, resolve_checkpoint
from sglite.tools.compare.divergence import Divergence, PartResult, find_first
from sglite.tools.compare.itself import ROOM, SelfResult, compare_with_itself
from sglite.tools.compare.layers import Expectation
from sglite.tools.compare.matching import Layout
from sglite.tools.compare.measuring import Measurement, measure
from sglite.tools.compare.ours import Text, generate
from sglite.tools.compare.prompts import (
    NoTokenizer,
    builtin_lengths,
    builtin_prompts,
    given_prompts,
    windows_of,
)
from sglite.tools.compare.reference import Reference, load_reference, reference_of
from sglite.tools.compare.report import ComparisonReport
from sglite.tools.compare.texts import TextResult, compare_texts, excuse_experts
from sglite.tools.quantization_loss import QuantizationLoss, quantization_loss

# Small, so that a prompt which is longer does not take long.
_CHUNK = 64
# Enough for the longest built-in prompts with a window of 4096, and for the checks of itself.
_KV_TOKENS = 16384


def compare(
    model: str | os.PathLike[str] | nn.Module,
    *,
    reference: nn.Module | None = None,
    prompts: Any = None,
    new_tokens: int = 16,
    itself: bool = True,
    quantization: str | None = None,
    **options: Any,
) -> ComparisonReport:
    """Whether a model is right, and if not, where it first goes wrong.

    Runs it in sglite and in Hugging Face transformers (float32, eager attention), teacher-forced
    over prompts of several lengths: logits of prefill and decode apart, greedy texts, and the
    output of every decoder layer. Where these differ by more than `sglite.tools.compare.limits`
    allows for the dtype, the parts of the first such layer are run one by one until the first one
    is found whose output diverges while what it was given agrees.

    A model that runs in bfloat16 or float16 is run in float32 as well, where the least error of a
    formula shows; and Hugging Face in the model's dtype, whose own error the limits for that take
    into account.

    A mixture of experts runs with the reference's experts wherever its own choice differs from them
    by no more than rounding, which the report counts; a choice that differs otherwise is an error.

    Args:
        model: a folder, a hub id, "demo", or a live Hugging Face module.
        reference: a module to compare with, which is called with token ids [1, n] and gives an
            object with `logits` [1, n, vocabulary]; None: the class that `config.json` names.
        prompts: as in `LLM.generate`; None: a text cut to lengths at which something may go wrong
            (one token, around a page, beyond a chunk, beyond a sliding window).
        new_tokens: decoded after each prompt; 2 or more.
        itself: whether sglite is compared with itself as well: cached, chunked, batched, by other
            numbers of threads, as CUDA graphs.
        quantization: "int8" or "int4": what quantising loses is measured in addition, and the model
            is compared with itself with such weights. The comparison with Hugging Face is of the
            weights as they are.
        **options: further arguments of `LLM`, such as `architecture`, `dtype` or `device`.

    Returns:
        The report: true if the model is right; `print` shows its tables.

    Raises:
        UnsupportedModelError: Hugging Face has no class for the model, and there is no `reference`.
        InvalidRequestError: a prompt is wrong.
        SGLiteError: of loading the model.
    """
    new_tokens = checks.integer("new_tokens", new_tokens, minimum=2)
    if reference is not None and not isinstance(reference, nn.Module):
        checks.refuse("reference", reference, "a torch module", ConfigError)
    comparison = _Comparison(model, reference, new_tokens, options)
    with comparison:
        return comparison.run(prompts, itself, quantization)


class _Comparison(ExitStack):
    """One comparison; closes what it loaded."""

    def __init__(
        self, model: Any, reference: nn.Module | None, new_tokens: int, options: dict[str, Any]
    ):
        super().__init__()
        self._model = model
        self._new_tokens = new_tokens
        self._checkpoint: Checkpoint | None = None
        if isinstance(model, nn.Module):
            reference = model if reference is None else reference
        else:
            names = ("revision", "cache_dir", "token")
            self._checkpoint = resolve_checkpoint(
                model, **{name: options[name] for name in names if name in options}
            )
        self._module = reference
        self._options = {"chunked_prefill_size": _CHUNK, **options}
        if "mem_fraction" not in options:
            self._options.setdefault("kv_cache_tokens", _KV_TOKENS)
        has_one = self._checkpoint is not None and has_tokenizer(self._checkpoint)
        if options.get("tokenizer") is None and not has_one:
            self._options["tokenizer"] = NoTokenizer()

    def run(self, prompts: Any, itself: bool, quantization: str | None) -> ComparisonReport:
        """Loads both models, runs them, and looks for the first divergence where they differ."""
        llm = self._llm()
        config, tokenizer = llm.config, llm.tokenizer
        exact = self._reference("float32")
        texts, error = self._texts(llm, exact, prompts)
        layout = _layout(llm.model, exact.model)
        expected = Expectation.of_all(exact, layout, texts)
        if any(layer is None for each in expected for layer in each.layers):
            layout = None  # they give no row for each token
        own = None
        if config.dtype != "float32":
            low = self._reference(config.dtype)
            own = Expectation.of_all(low, layout, texts, expected)
            del low
        measured = [measure(llm, layout, texts, expected, own)]
        written = compare_texts(
            texts,
            expected,
            exact,
            measured[0].tie,
            None if isinstance(tokenizer, NoTokenizer) else tokenizer,
        )
        if measured[0].guide is not None:
            written = excuse_experts(llm, texts, written, measured[0].tie)
        found = self._itself(llm, texts, quantization) if itself else []
        if config.dtype != "float32":
            llm.close()
            llm = self._exact_llm(exact)
            measured.append(measure(llm, layout, texts, expected, None))
        failure = _failure(error, measured, written, found)
        first, parts = None, []
        if failure:
            first, parts = self._search(llm, exact, layout, texts, measured)
        return ComparisonReport(
            model=f"{config.model} ({config.architecture}, {config.dtype}, {config.device})",
            reference=f"Hugging Face ({type(exact.model).__name__}, float32, eager)",
            limits=[each.limits for each in measured],
            logits=[row for each in measured for row in each.logits],
            texts=written,
            routing=[row for each in measured for row in each.routing],
            layers=[row for each in measured for row in each.layers],
            parts=parts,
            itself=found,
            quantization=None if quantization is None else self._loss(quantization),
            first_divergence=first or (Divergence("", note=failure) if failure else None),
        )

    def _texts(self, llm: LLM, reference: Reference, prompts: Any) -> tuple[list[Text], str]:
        """Prompts with what follows them greedily in sglite, and the error that ended it."""
        count = self._new_tokens
        ids = self._prompts(llm, reference, prompts)
        following, error = generate(llm, ids, count)
        texts = [
            # A text that ended early, with an error, is filled up with what there is.
            Text(prompt, (found + prompt[-1:] * count)[:count])
            for prompt, found in zip(ids, following, strict=True)
        ]
        return texts, error

    def _itself(
        self, llm: LLM, texts: Sequence[Text], quantization: str | None
    ) -> list[SelfResult]:
        if quantization is None:
            return compare_with_itself(llm, texts)
        with self._llm(quantization=quantization) as quantized:
            return compare_with_itself(quantized, texts)

    def _llm(self, **changes: Any) -> LLM:
        return self.enter_context(LLM(self._model, **{**self._options, **changes}))

    def _exact_llm(self, reference: Reference) -> LLM:
        changes = {"dtype": "float32", "batch_invariant": None}
        if self._checkpoint is None:  # a live module shares its parameters, dtype and all
            return self.enter_context(LLM(reference.model, **{**self._options, **changes}))
        return self._llm(**changes)

    def _reference(self, dtype: str) -> Reference:
        device = self._device
        if self._module is not None:
            return reference_of(self._module, getattr(torch, dtype), device)
        return load_reference(
            self._checkpoint,
            getattr(torch, dtype),
            device,
            trust_remote_code=self._options.get("trust_remote_code", False),
        )

    @property
    def _device(self) -> torch.device:
        return resolve_device(str(self._options.get("device", "auto")))

    def _prompts(self, llm: LLM, reference: Reference, prompts: Any) -> list[list[int]]:
        config = llm.config
        # What the check of itself puts behind a prompt has to fit as well.
        room = min(config.context_length, config.kv_cache_tokens) - max(self._new_tokens, ROOM)
        if room < 1:
            raise UnsupportedModelError(
                f"a context of {config.context_length} tokens leaves no room for a prompt in front "
                f"of new_tokens={self._new_tokens}"
            )
        if prompts is not None:
            return given_prompts(prompts, llm.tokenizer.encode, room)
        lengths = builtin_lengths(
            config.page_size, config.chunked_prefill_size, windows_of(llm.model), room
        )
        return builtin_prompts(lengths, reference.vocab_size, llm.tokenizer)

    def _search(
        self,
        llm: LLM,
        reference: Reference,
        layout: Layout | None,
        texts: Sequence[Text],
        measured: Sequence[Measurement],
    ) -> tuple[Divergence | None, list[PartResult]]:
        """The first divergence: in float32, where the least errors show, whatever the dtype."""
        if layout is None:
            return None, []
        exact = measured[-1]
        found, parts = find_first(
            llm, reference, layout, texts, exact.module_limit, exact.errors, exact.guide
        )
        if found is not None or len(measured) == 1 or not measured[0].failure:
            return found, parts
        llm.close()
        low = measured[0]
        return find_first(
            self._llm(), reference, layout, texts, low.module_limit, low.errors, low.guide
        )

    def _loss(self, quantization: str) -> QuantizationLoss:
        if self._checkpoint is None:
            raise UnsupportedModelError(
                "quantization= is for a checkpoint, not for a live module: pass the folder"
            )
        names = ("architecture", "dtype", "context_length", "trust_remote_code")
        given = {name: self._options[name] for name in names if name in self._options}
        return quantization_loss(self._checkpoint, quantization, **given)


def _layout(ours: nn.Module, theirs: nn.Module) -> Layout | None:
    """Where the layers lie; None where they cannot be told, and only logits can be compared."""
    try:
        return Layout.of(ours, theirs)
    except UnsupportedModelError:
        return None


def _failure(
    error: str,
    measured: Sequence[Measurement],
    texts: Sequence[TextResult],
    itself: Sequence[SelfResult],
) -> str:
    """What is wrong, in words; "" where nothing is."""
    if error:
        return error
    for found in reversed(measured):
        if found.failure:
            return f"{found.failure} in {found.limits.dtype}"
    for text in texts:
        if not text.passed:
            return (
                f"the greedy text after {text.prompt_tokens} tokens differs at its token "
                f"{text.same_tokens}, where Hugging Face's logits are {text.gap:.2g} apart, "
                f"although the logits agree"
            )
    for row in itself:
        if not row.passed:
            return (
                f"sglite differs from itself under {row.condition!r}: {row.differing_rows} of "
                f"{row.rows} rows of logits have other bits"
            )
    return ""
