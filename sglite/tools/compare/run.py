"""`sglite.compare`: a model in sglite against the same in Hugging Face transformers."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sglite.interface import checks
from sglite.interface.errors import ConfigError, UnsupportedModelError
from sglite.llm import LLM
from sglite.models.checkpoint import Checkpoint, has_tokenizer, resolve_checkpoint
from sglite.tools.compare.divergence import Divergence, PartResult, find_first
from sglite.tools.compare.itself import compare_with_itself
from sglite.tools.compare.layers import (
    LayerErrors,
    LayerResult,
    errors_between,
    layer_errors,
    layer_outputs,
    layer_results,
)
from sglite.tools.compare.limits import LIMITS, Limits
from sglite.tools.compare.matching import Layout
from sglite.tools.compare.metrics import Closeness
from sglite.tools.compare.ours import Text, forced_logits, generate
from sglite.tools.compare.prompts import (
    NoTokenizer,
    builtin_lengths,
    builtin_prompts,
    given_prompts,
    windows_of,
)
from sglite.tools.compare.reference import Reference, load_reference, reference_of
from sglite.tools.compare.report import ComparisonReport, LogitsResult
from sglite.tools.compare.texts import TextResult, compare_texts
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
    output of every decoder layer. Where these differ by more than `LIMITS` allows for the dtype,
    the parts of the first such layer are run one by one until the first one is found whose output
    diverges while what it was given agrees. The limits for bfloat16 and float16 take Hugging Face's
    own error in the same dtype into account, so it is run in that as well.

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
        if "tokenizer" not in options and self._checkpoint and not has_tokenizer(self._checkpoint):
            self._options["tokenizer"] = NoTokenizer()

    def run(self, prompts: Any, itself: bool, quantization: str | None) -> ComparisonReport:
        """Loads both models, runs them, and looks for the first divergence where they differ."""
        llm = self._llm()
        limits = LIMITS[llm.config.dtype]
        exact = self._reference("float32")
        ids = self._prompts(llm, exact, prompts)
        following, error = generate(llm, ids, self._new_tokens)
        texts = [
            # A text that ended early, with an error, is filled up with what there is.
            Text(prompt, (found + [prompt[-1]] * self._new_tokens)[: self._new_tokens])
            for prompt, found in zip(ids, following, strict=True)
        ]
        layout = _layout(llm.model, exact.model)
        expected = [_rows(exact, text) for text in texts]
        outputs = layer_outputs(exact, layout, texts) if layout else []
        own_logits, own_errors = self._own(llm.config.dtype, layout, texts, outputs)

        logits = _logits_results(forced_logits(llm, texts), expected, own_logits, texts, limits)
        errors = layer_errors(llm, layout, texts, outputs) if layout else None
        layers = layer_results(errors, own_errors, limits) if errors else []
        tokenizer = None if isinstance(llm.tokenizer, NoTokenizer) else llm.tokenizer
        written = compare_texts(texts, expected, exact, _tie(limits, logits, expected), tokenizer)
        failure = _failure(error, logits, layers, written)
        first, parts = None, []
        if failure:
            first, parts = self._search(llm, exact, layout, texts, limits, errors, own_errors)
            first = first or Divergence("", note=failure)
        loss, found = None, []
        if quantization is not None:
            loss = self._loss(quantization)
        if itself:
            checked = llm if quantization is None else self._llm(quantization=quantization)
            found = compare_with_itself(checked, texts)
            broken = next((row for row in found if not row.passed), None)
            if broken and first is None:
                first = Divergence(
                    "",
                    note=f"sglite differs from itself under {broken.condition!r}: "
                    f"{broken.differing_rows} of {broken.rows} rows of logits have other bits",
                )
        return ComparisonReport(
            model=f"{llm.config.model} ({llm.config.architecture}, {llm.config.dtype}, "
            f"{llm.config.device})",
            reference=f"Hugging Face ({type(exact.model).__name__}, float32, eager)",
            limits=limits,
            logits=logits,
            texts=written,
            layers=layers,
            parts=parts,
            itself=found,
            quantization=loss,
            first_divergence=first,
        )

    def _llm(self, **changes: Any) -> LLM:
        return self.enter_context(LLM(self._model, **{**self._options, **changes}))

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
        device = self._options.get("device", "auto")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(device)

    def _prompts(self, llm: LLM, reference: Reference, prompts: Any) -> list[list[int]]:
        config = llm.config
        # What the check of itself puts behind a prompt has to fit as well.
        room = min(config.context_length, config.kv_cache_tokens) - max(self._new_tokens, _TAIL)
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

    def _own(
        self,
        dtype: str,
        layout: Layout | None,
        texts: Sequence[Text],
        outputs: Sequence[Sequence[Tensor]],
    ) -> tuple[list[Tensor] | None, LayerErrors | None]:
        """Hugging Face in the run's dtype: its logits, and how far its layers are off float32."""
        if dtype == "float32":
            return None, None
        low = self._reference(dtype)
        logits = [_rows(low, text) for text in texts]
        if layout is None:
            return logits, None
        return logits, errors_between(layout, layer_outputs(low, layout, texts), outputs)

    def _search(
        self,
        llm: LLM,
        exact: Reference,
        layout: Layout | None,
        texts: Sequence[Text],
        limits: Limits,
        errors: LayerErrors | None,
        own_errors: LayerErrors | None,
    ) -> tuple[Divergence | None, list[PartResult]]:
        """The first divergence: in float32, where the least errors show, whatever the dtype."""
        if layout is None:
            return None, []
        strict = LIMITS["float32"].prefill
        if limits.is_relative:
            return find_first(llm, exact, layout, texts, strict, errors)
        exact_llm = self._llm(dtype="float32")
        exact_errors = layer_errors(exact_llm, layout, texts, layer_outputs(exact, layout, texts))
        found, parts = find_first(exact_llm, exact, layout, texts, strict, exact_errors)
        if found is not None:
            return found, parts
        loose = limits.for_modules(own_errors.largest)
        return find_first(llm, exact, layout, texts, loose, errors)

    def _loss(self, quantization: str) -> QuantizationLoss:
        if self._checkpoint is None:
            raise UnsupportedModelError(
                "quantization= is for a checkpoint, not for a live module: pass the folder"
            )
        names = ("architecture", "dtype", "context_length", "trust_remote_code")
        given = {name: self._options[name] for name in names if name in self._options}
        return quantization_loss(self._checkpoint, quantization, **given)


#: Tokens that `LLM.check_invariance` needs behind a prompt, as `compare_with_itself` asks for it.
_TAIL = 24


def _layout(ours: nn.Module, theirs: nn.Module) -> Layout | None:
    """Where the layers lie; None where they cannot be told, and only logits can be compared."""
    try:
        return Layout.of(ours, theirs)
    except UnsupportedModelError:
        return None


def _rows(reference: Reference, text: Text) -> Tensor:
    """The reference's logits that are compared, as `forced_logits` gives ours."""
    return reference.logits(text.computed)[text.first_row :]


def _logits_results(
    ours: Sequence[Tensor],
    expected: Sequence[Tensor],
    own: Sequence[Tensor] | None,
    texts: Sequence[Text],
    limits: Limits,
) -> list[LogitsResult]:
    """Per phase a row for each prompt, and one over all, which the limits are for."""
    results = []
    for phase in ("prefill", "decode"):

        def part(rows: Tensor, text: Text, phase: str = phase) -> Tensor:
            split = len(text.prompt) - text.first_row
            return rows[:split] if phase == "prefill" else rows[split:]

        def closeness(found: Sequence[Tensor], part=part) -> list[Closeness]:
            triples = zip(found, expected, texts, strict=True)
            return [Closeness.of(part(a, text), part(b, text)) for a, b, text in triples]

        found = closeness(ours)
        theirs = closeness(own) if own is not None else [None] * len(found)
        results += [
            LogitsResult(phase, len(text.prompt), a, b)
            for text, a, b in zip(texts, found, theirs, strict=True)
        ]
        over = Closeness.over(found)
        own_over = Closeness.over(theirs) if own is not None else None
        results.append(
            LogitsResult(phase, None, over, own_over, limits.broken_by(phase, over, own_over))
        )
    return results


def _tie(limits: Limits, logits: Sequence[LogitsResult], expected: Sequence[Tensor]) -> float:
    """Two logits of the reference that are no further apart may change places."""
    if limits.is_relative:
        spread = max((rows - rows.mean(-1, keepdim=True)).abs().max().item() for rows in expected)
        return 2 * limits.decode * spread
    own = max(row.own.largest for row in logits)
    return 2 * max(limits.decode, limits.times_own * own)


def _failure(
    error: str,
    logits: Sequence[LogitsResult],
    layers: Sequence[LayerResult],
    texts: Sequence[TextResult],
) -> str:
    """What is wrong, in words; "" where nothing is."""
    if error:
        return error
    for row in logits:
        if row.failure:
            return row.failure
    for layer in layers:
        if not layer.passed:
            return f"{layer.path}: relative error {layer.relative_error:.2g}"
    for text in texts:
        if not text.passed:
            return (
                f"the greedy text after {text.prompt_tokens} tokens differs at its token "
                f"{text.same_tokens}, where Hugging Face's logits are {text.gap:.2g} apart, "
                f"although the logits agree"
            )
    return ""
