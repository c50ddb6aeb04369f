"""`LLM`: load a model, generate text. The one class that most people ever see."""

import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import torch

from sglite.engine.calls import Asked, Work
from sglite.engine.conversations import render_conversations
from sglite.engine.invariance import (
    InvarianceReport,
    Settings,
    check_invariance,
    compute,
    read_prompts,
)
from sglite.engine.leaving import empty_frames, keeps_nothing
from sglite.engine.memory import give_back_free_memory
from sglite.engine.open_engine import OpenEngine
from sglite.engine.progress import someone_is_watching
from sglite.engine.request import Request
from sglite.engine.waiting import FORKED, PATIENCE
from sglite.interface.config import LLMOptions
from sglite.interface.errors import EngineClosedError
from sglite.interface.outputs import RequestOutput, StreamChunk
from sglite.interface.prompts import Prompt, normalize_prompts
from sglite.interface.sampling_params import SamplingParams
from sglite.loading import load
from sglite.models.description import ModelDescription, describe


class LLM:
    """A model, ready to generate in this process.

    Args:
        model: a folder, a hub id, "demo" or "demo-vl" (small models that ship with the library,
            the second for pictures), or a live Hugging Face module, whose parameters are shared
            where they lie; call `weights_changed` once they have been trained.
        tokenizer: a folder, a hub id or a tokenizer; the one beside the weights when absent.
        architecture: a registered model class to use instead of what `config.json` names, or
            "transformers" for Hugging Face's own class.
        dtype: "auto" (the checkpoint's), "bfloat16", "float16" or "float32".
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N".
        quantization: "int8" or "int4" quantises the weights while they are read (on the CPU); None:
            as in the checkpoint, which may be quantised itself.
        context_length: tokens of prompt and completion together; None: the model's own limit.
        kv_cache_tokens: tokens that the KV cache holds; None: from `mem_fraction`.
        mem_fraction: the share of the free memory for the KV cache (0.4; on a GPU 0.6 of what the
            weights and the largest step leave).
        page_size: tokens per page of the KV cache.
        max_running_requests: requests in one batch at most; others wait.
        chunked_prefill_size: prompt tokens computed in one step, over all requests.
        prefix_cache: whether prompts reuse cached prefixes of others.
        cuda_graphs: whether decode steps run as CUDA graphs, on a GPU.
        num_threads: threads of the CPU kernels; None: as many as torch uses.
        seed: where the seeds of requests without one come from; None: the system's randomness.
        trust_remote_code: whether Python code of the checkpoint may run.
        batch_invariant: whether results are the same bits whatever shares the batch; always so on
            the CPU.
        revision, cache_dir, token: for hub models, as huggingface_hub takes them.
        image_cache_bytes: what the embeddings of images may take that are kept for further prompts.
        image_fetcher: gives the bytes of the file behind a http(s) URL of an image; None: such
            images are refused.
        image_processor: settings of the Hugging Face image processor that are to be others than
            the checkpoint's: `{"max_pixels": 1003520}`, say, or `min_pixels`.

    Attributes:
        config: every setting, resolved; prints as a table.
        tokenizer: the Hugging Face tokenizer.

    Raises:
        ConfigError: an argument is unknown or has a value that is not allowed.
        CheckpointError: the checkpoint cannot be read.
        UnsupportedModelError: the checkpoint needs something that is not implemented.
        OutOfMemoryError: no room for the weights or the KV cache.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        tokenizer: Any = None,
        architecture: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        quantization: str | None = None,
        context_length: int | None = None,
        kv_cache_tokens: int | None = None,
        mem_fraction: float | None = None,
        page_size: int = 16,
        max_running_requests: int | None = None,
        chunked_prefill_size: int | None = None,
        prefix_cache: bool = True,
        cuda_graphs: bool = True,
        num_threads: int | None = None,
        seed: int | None = None,
        trust_remote_code: bool = False,
        batch_invariant: bool | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        image_cache_bytes: int = 256 << 20,
        image_fetcher: Callable[[str], bytes] | None = None,
        image_processor: Mapping[str, Any] | None = None,
        **others: Any,
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "others")}
        if model is None:
            del given["model"]
        self._opened: OpenEngine | None = load(LLMOptions.from_keywords({**given, **others}))
        self.config = self._opened.config
        self.tokenizer = self._opened.tokenizer.hf

    # -- generation -------------------------------------------------------------------------

    @keeps_nothing
    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Mapping | Sequence | None = None,
        *,
        images: Any = None,
        videos: Any = None,
        progress: bool | None = None,
        **keywords: Any,
    ) -> RequestOutput | list[RequestOutput]:
        """Generates for one prompt, or for a list of prompts in one batch.

        Args:
            prompts: a string, a list of token ids, or a dict with `text` or `token_ids` and maybe
                `images` and `videos`; or a list of these. `<image>` in a text stands for an image.
            images: for one prompt an image or a list of them, for a list of prompts a list of such.
                An image is a PIL image, a path, the bytes of a file, a `data:` URL, a numpy array
                or a torch tensor.
            videos: likewise, always in a list; a video is a list of frames, or a dict with `frames`
                and `fps`, how many of them there are in a second.
            sampling_params: a `SamplingParams` or a dict of its fields, one for all prompts or a
                list with one for each.
            progress: whether a bar is shown; None: for a batch, when someone is watching.
            **keywords: fields of `SamplingParams`, as the short form.

        Returns:
            A `RequestOutput` for a single prompt, else a list of them in the order of the prompts.

        Raises:
            InvalidRequestError: a prompt or a parameter is wrong; nothing has been computed.
            GenerationError: a request failed; `.outputs` holds all outputs, those of the others
                complete.
            EngineClosedError: after `close()`, and in a fork of the process.
            KeyboardInterrupt: as it came; see `interrupted` and `resume`.
        """
        calls = self._open.calls
        normalized = normalize_prompts(prompts, images=images, videos=videos)
        return calls.run(calls.prepare(*normalized, sampling_params, keywords), progress)

    @keeps_nothing
    def chat(
        self,
        messages: Sequence,
        sampling_params: SamplingParams | Mapping | Sequence | None = None,
        *,
        tools: Sequence | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: bool | None = None,
        **keywords: Any,
    ) -> RequestOutput | list[RequestOutput]:
        """Generates the next turn of one conversation, or of each in a list of conversations.

        Args:
            messages: a list of dicts with `role` and `content`, or a list of such lists. A content
                is a string or a list of parts: `{"type": "text", "text": ...}`,
                `{"type": "image", "image": ...}`, `{"type": "image_url", "image_url": ...}`,
                `{"type": "video", "video": frames, "fps": 2.0}`.
            sampling_params: as in `generate`.
            tools: functions or JSON schemas, given to the chat template.
            chat_template_kwargs: further arguments of the chat template, such as
                `add_generation_prompt` (True unless given) or `enable_thinking`.
            progress: as in `generate`.
            **keywords: as in `generate`.

        Returns, raises: as `generate`; also InvalidRequestError where the model's tokenizer has no
        chat template, or the template refuses the conversation.
        """
        called_at = time.perf_counter()
        calls = self._open.calls
        conversations = self._render(messages, tools, chat_template_kwargs)
        work = calls.prepare(*conversations, sampling_params, keywords, called_at=called_at)
        return calls.run(work, progress)

    @keeps_nothing
    def stream(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Mapping | Sequence | None = None,
        *,
        images: Any = None,
        videos: Any = None,
        **keywords: Any,
    ) -> Iterator[StreamChunk]:
        """Generates like `generate`, handing out the text in pieces as it comes.

        The pieces of a prompt add up to exactly its `text`; with several prompts `chunk.index`
        says whose it is, and with `n` above 1 `chunk.completion_index` which. The last piece of a
        prompt carries its `output`. Leaving the loop early frees the requests. The arguments are
        checked at once, not at the first piece.
        """
        calls = self._open.calls
        normalized = normalize_prompts(prompts, images=images, videos=videos)
        return self._stream(calls.prepare(*normalized, sampling_params, keywords, streams=True))

    @keeps_nothing
    def stream_chat(
        self,
        messages: Sequence,
        sampling_params: SamplingParams | Mapping | Sequence | None = None,
        *,
        tools: Sequence | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> Iterator[StreamChunk]:
        """`chat`, handing out the text in pieces as `stream` does."""
        called_at = time.perf_counter()
        calls = self._open.calls
        conversations = self._render(messages, tools, chat_template_kwargs)
        return self._stream(
            calls.prepare(
                *conversations, sampling_params, keywords, streams=True, called_at=called_at
            )
        )

    @keeps_nothing
    async def agenerate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Mapping | Sequence | None = None,
        *,
        images: Any = None,
        videos: Any = None,
        **keywords: Any,
    ) -> RequestOutput | list[RequestOutput]:
        """`generate` for a task of a running event loop, which goes on meanwhile.

        Requests of all tasks and threads share batches. Cancelling the task ends its requests.
        Pictures and long texts are read on a thread of the loop's own pool. Arguments, results and
        errors are those of `generate`, but that there is no `progress`.
        """
        calls = self._open.calls
        normalized = normalize_prompts(prompts, images=images, videos=videos)
        asked = calls.ask(*normalized, sampling_params, keywords)
        return await calls.run_in_loop(await calls.read_in_loop(asked))

    @keeps_nothing
    def astream(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Mapping | Sequence | None = None,
        *,
        images: Any = None,
        videos: Any = None,
        **keywords: Any,
    ) -> AsyncIterator[StreamChunk]:
        """`stream` for `async for`, in a running event loop.

        What is read on a thread, as in `agenerate`, is read and checked when the first piece is
        asked for.
        """
        calls = self._open.calls
        normalized = normalize_prompts(prompts, images=images, videos=videos)
        asked = calls.ask(*normalized, sampling_params, keywords, streams=True)
        return self._astream(asked if asked.takes_long else calls.read(asked))

    #: SGLang's name.
    async_generate = agenerate

    @property
    @keeps_nothing
    def interrupted(self) -> RequestOutput | list[RequestOutput] | None:
        """What this thread's call that was interrupted last had generated until then.

        Of `generate`, `chat` and streams, in threads; also of a stream that was left early, as
        Ctrl-C may come while its reader is at work. In the shape in which the call would have
        returned it, unfinished completions with the finish reason "abort". None if there is none,
        and after `resume`.
        """
        return self._open.calls.interrupted

    @keeps_nothing
    def resume(self, *, progress: bool | None = None) -> RequestOutput | list[RequestOutput]:
        """Carries on with the interrupted call, and returns what it would have returned.

        The tokens are those of a call that was never interrupted. A stream's come as outputs too,
        from their first token on.

        Args:
            progress: as in `generate`.

        Raises: as `generate`; InvalidRequestError also where no call was interrupted.
        """
        return self._open.calls.resume(progress)

    # These two keep the LLM alive until their stream ends.
    @keeps_nothing
    def _stream(self, work: Work) -> Iterator[StreamChunk]:
        yield from self._open.calls.stream(work)

    async def _astream(self, work: Work | Asked) -> AsyncIterator[StreamChunk]:
        try:
            calls = self._open.calls
            if isinstance(work, Asked):
                work = await calls.read_in_loop(work)
            async with aclosing(calls.stream_in_loop(work)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except BaseException as error:
            empty_frames(error)
            del self, work
            calls = None
            raise

    @property
    def _open(self) -> OpenEngine:
        """What runs calls; asked for once in each, as another thread may close at any moment.

        Raises:
            EngineClosedError: there is none any more, or it is another process's.
        """
        opened = self._opened
        if opened is None:
            raise EngineClosedError("this LLM is closed; make a new one")
        if opened.driver.is_forked:
            raise EngineClosedError(FORKED)
        return opened

    def _render(self, messages, tools, arguments) -> tuple[list[Prompt], bool]:
        opened = self._open
        return render_conversations(
            opened.tokenizer, opened.intake.reader, self.config.model, messages, tools, arguments
        )

    # -- the model and its numbers ----------------------------------------------------------

    @keeps_nothing
    def check_invariance(
        self,
        prompts: Any = None,
        *,
        new_tokens: int = 16,
        batch_sizes: Sequence[int] = (2, 3, 8, 17, 64),
        chunk_sizes: Sequence[int] = (5, 16, 61, 256),
        prefix_lengths: Sequence[int] | None = None,
        num_threads: Sequence[int] = (1, 2),
        prompt_logits: int = 64,
        progress: bool | None = None,
    ) -> InvarianceReport:
        """Whether a prompt's logits are the same bits whatever it is computed with.

        Each prompt is computed alone; then in batches, in chunks, after prefix hits, as a second
        turn over what decoding wrote, as requests that ask for nothing but tokens, after
        preemption, and, one condition of each kind, by other numbers of threads. All of this runs
        on engines of its own over the same model, and leaves this one's cache and statistics as
        they are.

        Args:
            prompts: as in `generate`; None: random ids, up to 600.
            new_tokens: tokens generated after each prompt.
            batch_sizes: requests of a batch; it is filled up with starts of the prompts.
            chunk_sizes: prompt tokens of a step.
            prefix_lengths: tokens that come out of the cache; None: some around the page size. All
                but the last of a prompt are always tried as well.
            num_threads: of the CPU kernels; more than there are processors is a condition that is
                not met.
            prompt_logits: of a prompt, logits are compared from the last so many positions on.
            progress: as in `generate`.

        Returns:
            The report: true if no bit differs; prints as a table that names the first difference,
            and the conditions that could not be met (`is_complete`).

        Raises:
            InvalidRequestError: a prompt or an argument is wrong.
            RequestError: the model fails on a prompt.
        """
        opened = self._open
        settings = Settings(
            new_tokens, batch_sizes, chunk_sizes, prefix_lengths, num_threads, prompt_logits
        )
        token_ids = read_prompts(prompts, opened.calls, opened.intake, settings)
        progress = someone_is_watching() if progress is None else progress
        return check_invariance(
            opened.make_engine, self.config, token_ids, settings, progress=progress
        )

    @keeps_nothing
    def record_logits(self, batches: Sequence[Sequence[Request]], **changes: Any) -> None:
        """Computes requests that record their logits, on an engine of their own.

        For checks: the engine runs the same model, with a KV cache of its own.

        Args:
            batches: of requests whose logits processor is a `LogitsRecorder`, one batch after the
                other.
            **changes: of fields of `config`.

        Raises:
            RequestError: the model fails on a request.
        """
        compute(self._open.make_engine, replace(self.config, **changes), batches)

    @keeps_nothing
    def describe(self) -> ModelDescription:
        """What the model is made of: its layers, what of it runs as one op, how weights are stored.

        Of a model that Hugging Face's class runs, also what stands in for that class's parts.
        """
        opened = self._open
        return describe(opened.model, opened.config.architecture, opened.config.dtype)

    @keeps_nothing
    def weights_changed(self) -> None:
        """Says that the weights are not what they were, after an optimizer's step, say.

        Requests made from now on read nothing that older weights wrote into the prefix cache; those
        that are running go on with what they have.

        Raises:
            ConfigError: a live module's parameter was replaced instead of changed.
        """
        opened = self._open
        origin = getattr(opened.model, "origin", None)
        if origin is not None:
            origin.check()
        opened.intake.start_namespace()

    # -- life -------------------------------------------------------------------------------

    @property
    def model(self) -> torch.nn.Module:
        """The model itself. Hooks on its modules are called; training it is not supported.

        Raises EngineClosedError after `close()`.
        """
        return self._open.model

    def stats(self) -> dict[str, int | float]:
        """Counts since the model was loaded, and what the KV cache holds now.

        `kv_tokens_total`, `kv_tokens_used` (by running requests and the prefix cache),
        `kv_tokens_cached` (reusable prefixes), `running`, `waiting` (requests), `prompt_tokens`,
        `cached_tokens` (of them, from the cache), `completion_tokens`, `preemptions`, `steps`,
        `tokens_per_second` (completion tokens over the time spent in steps), `images_encoded`
        (images and videos that went through the model's encoder), `image_cache_bytes` (what their
        embeddings take that are kept).
        """
        return self._open.engine.stats()

    @keeps_nothing
    def close(self) -> None:
        """Ends running requests and gives back weights and cache. May be called again.

        Within a step (by a logits processor, say) they are given back once that has ended.
        """
        self._close()

    def _close(self, patience: float | None = None) -> None:
        opened = self._opened
        if opened is not None:
            opened.close(patience)
            self._opened = opened = None
            give_back_free_memory()

    #: SGLang's name.
    shutdown = close

    # The interpreter's own end may have emptied this module already.
    def __del__(self, is_finalizing=sys.is_finalizing):
        if getattr(self, "_opened", None) is not None and not is_finalizing():
            self._close(PATIENCE)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return self.config.title
