"""sglite as a model of lm-evaluation-harness.

Tokens, stop strings, truncation and chat templates are handled as in the harness's own `hf` model,
so that scores can be compared; but all requests of a kind go through one `generate`.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sglite.interface.errors import ConfigError, InvalidRequestError
from sglite.interface.outputs import RequestOutput
from sglite.interface.sampling_params import SamplingParams
from sglite.llm import LLM

_log = logging.getLogger(__name__)


@register_model("sglite")
class SGLiteLM(TemplateLM):
    """A model for `lm_eval.simple_evaluate`.

    Args:
        pretrained: a folder, a hub id, "demo" or a live module, as `LLM` takes them; or an `LLM`.
        batch_size, max_batch_size: accepted since the harness always passes them, and without
            effect: how many requests share a step is the engine's affair (`max_running_requests`).
        max_length: tokens of context and continuation together; None: the model's whole context.
            Longer contexts lose their beginning. The last token, which is predicted but never read,
            counts; the harness's `hf` does not count it in what it scores.
        max_gen_toks: tokens generated at most for a task that does not say how many.
        add_bos_token: whether texts get the tokenizer's special tokens; None: as the tokenizer has
            it. Never added to a text that begins with them.
        prefix_token_id: what precedes the first token of a text that has no context; None: the
            tokenizer's BOS, or else its EOS.
        chat_template_args: further arguments of the chat template, such as `enable_thinking`.
        think_end_token: text up to the last one of these is left out of generated texts.
        **llm_arguments: arguments of `LLM`. Unless `seed` is among them, it is torch's seed, which
            the harness sets.

    Attributes:
        llm: the `LLM`.
        tokenizer: its Hugging Face tokenizer.

    Raises:
        ConfigError: an argument is not allowed; and whatever `LLM` raises.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | torch.nn.Module | LLM = "demo",
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        think_end_token: str | None = None,
        **llm_arguments: Any,
    ):
        super().__init__()
        if not isinstance(pretrained, LLM):
            pretrained = LLM(pretrained, **{"seed": torch.initial_seed(), **llm_arguments})
        elif llm_arguments:
            raise ConfigError(
                f"{', '.join(llm_arguments)}: not allowed beside an LLM, which has been made"
            )
        self.llm = pretrained
        self.tokenizer = pretrained.tokenizer
        context_length = pretrained.config.context_length
        if max_length is not None and not 2 <= max_length <= context_length:
            raise ConfigError(
                f"max_length={max_length} is not allowed: it must be at least 2 and at most "
                f"{context_length}, the context length"
            )
        self.max_length = max_length or context_length
        self.max_gen_toks = max_gen_toks
        self._add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        self._chat_template_args = dict(chat_template_args or {})
        self._think_end_token = think_end_token

    # -- tokens -----------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int | None:
        """The id that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text which has no context.

        Raises ConfigError where the tokenizer has neither BOS nor EOS.
        """
        choices = (self._prefix_token_id, self.tokenizer.bos_token_id, self.eot_token_id)
        for token_id in choices:
            if token_id is not None:
                return token_id
        raise ConfigError(
            "the tokenizer has neither a BOS nor an EOS token, and the text has no context: pass "
            "prefix_token_id=, the id to begin with"
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The ids of a text; `add_special_tokens` None: as `add_bos_token` says."""
        if add_special_tokens is None:
            beginning = self._prefix_text()
            has_them = bool(beginning) and string.startswith(beginning)
            add_special_tokens = False if has_them else self._add_bos_token
        arguments = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **arguments))

    def _prefix_text(self) -> str:
        token_id = self._prefix_token_id
        if token_id is None:
            return self.tokenizer.bos_token or self.tokenizer.eos_token or ""
        return self.tokenizer.decode([token_id])

    # -- scoring ----------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether greedy decoding would give it.

        The last token of a continuation is not part of the prompt: it is the only one allowed to
        be generated, so that its log-probability comes with it. Choices that differ in it alone
        (A, B, C and D of MMLU) have the same prompt then, and all but the first find it cached.

        Args:
            requests: for each anything, the ids of the context and those of the continuation.

        Raises:
            InvalidRequestError: a continuation is empty, or leaves no room for a context token.
        """
        prompts, parameters, starts, are_cut = [], [], [], []
        for name, context, continuation in requests:
            self._check_continuation(name, continuation)
            *prompt, last = (context + continuation)[-self.max_length :]
            are_cut.append(len(context) + len(continuation) > self.max_length)
            start = len(prompt) + 1 - len(continuation)  # where the continuation begins
            arguments: dict[str, Any] = {"allowed_token_ids": [last], "logprobs": 0}
            if start < len(prompt):
                arguments |= {"prompt_logprobs": 0, "prompt_logprobs_start": start}
            prompts.append(prompt)
            parameters.append(SamplingParams(max_new_tokens=1, temperature=0, **arguments))
            starts.append(start)
        self._warn_of_cuts(are_cut)
        outputs = self.llm.generate(prompts, parameters)
        return [_score(output, start) for output, start in zip(outputs, starts, strict=True)]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each whole text, by windows if it is longer than the context."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        return [math.fsum(next(scores)[0] for _ in range(count)) for count in counts]

    def _check_continuation(self, name: Any, continuation: Sequence[int]) -> None:
        if not continuation:
            raise InvalidRequestError(f"nothing to score: the continuation in {name} has no token")
        if len(continuation) >= self.max_length:
            raise InvalidRequestError(
                f"a continuation of {len(continuation)} tokens, and at least one of context, do "
                f"not fit into max_length={self.max_length}"
            )

    # -- generation -------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text generated after each context, up to the first of its stop strings.

        Arguments of a task beside `until`, `do_sample` and the number of tokens are sampling
        parameters of sglite's.

        Raises:
            InvalidRequestError: an argument of a task is none of sglite's, or there is no room for
                the tokens asked for.
        """
        prompts, parameters, stops, are_cut = [], [], [], []
        for request in requests:
            context, given = request.args
            params, until = self._sampling_params(given)
            token_ids = self.tok_encode(context)
            room = self.max_length - params.max_new_tokens
            prompts.append(token_ids[-room:])
            parameters.append(params)
            stops.append(until)
            are_cut.append(len(token_ids) > room)
        self._warn_of_cuts(are_cut)
        outputs = self.llm.generate(prompts, parameters)
        return [self._text(output, until) for output, until in zip(outputs, stops, strict=True)]

    def _sampling_params(self, given: Mapping[str, Any]) -> tuple[SamplingParams, list[str]]:
        """What a task's `generation_kwargs` are called here, and its stop strings."""
        arguments: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        until = handle_stop_sequences(arguments.pop("until"), eos=self.tokenizer.eos_token)
        if not arguments.pop("do_sample"):
            arguments["temperature"] = 0.0
        if arguments.get("num_beams") == 1:  # which is no beam search
            del arguments["num_beams"]
        new_tokens = arguments.pop("max_gen_toks")
        if new_tokens >= self.max_length:
            raise InvalidRequestError(
                f"max_gen_toks={new_tokens} leaves no room for a prompt: max_length is "
                f"{self.max_length}"
            )
        # Special tokens are no part of the text in which stop strings are looked for.
        special = self.tokenizer.get_added_vocab()
        if self.eot_token_id is not None:
            special[self.tokenizer.eos_token] = self.eot_token_id
        ids = [special[text] for text in until if text in special]
        arguments |= {"max_new_tokens": new_tokens, "stop_token_ids": ids}
        arguments["stop"] = [text for text in until if text and text not in special]
        return SamplingParams(**arguments), until

    def _text(self, output: RequestOutput, until: list[str]) -> str:
        # Decoded apart from the prompt, as `hf` does: some tokenizers then drop a first space.
        text = self.tokenizer.decode(output.token_ids, skip_special_tokens=True)
        return postprocess_generated_text(text, until, self._think_end_token)

    def _warn_of_cuts(self, are_cut: Sequence[bool]) -> None:
        if any(are_cut):
            _log.warning(
                "%d of %d prompts are too long for max_length=%d and lose their beginning",
                sum(are_cut),
                len(are_cut),
                self.max_length,
            )

    # -- what else the harness asks -----------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """Under what name the harness keeps prompts that it has built."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; without `add_generation_prompt` its last message goes on.

        A template that refuses the conversation gets it without its system messages.
        """
        arguments = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            **self._chat_template_args,
        }
        try:
            return self.tokenizer.apply_chat_template(chat_history, **arguments)
        except jinja2.TemplateError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            _log.warning("the chat template refuses system messages: they are left out")
            return self.tokenizer.apply_chat_template(others, **arguments)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results about the model."""
        config = self.llm.config
        return {
            "model_architecture": config.architecture,
            "model_dtype": config.dtype,
            "model_quantization": config.quantization,
            "model_device": config.device,
        }


def _score(output: RequestOutput, start: int) -> tuple[float, bool]:
    """The log-probability of the tokens from `start` on, and whether each was the likeliest."""
    positions = output.prompt_logprobs[start:] if output.prompt_logprobs else []
    token_ids = output.prompt_token_ids[start:] if positions else []
    scored = [
        position[token_id]
        for position, token_id in zip(
            [*positions, output.logprobs[0]], [*token_ids, output.token_ids[0]], strict=True
        )
    ]
    return math.fsum(one.logprob for one in scored), all(one.rank == 1 for one in scored)
