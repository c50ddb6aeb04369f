"""The ways of computing prompts that a check of invariance compares."""

import os
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from sglite.interface import checks
from sglite.interface.config import EngineConfig

#: Tokens behind what the first turn generated, with which the second turn begins.
TAIL = 11
# Up to past a kernel's first split of keys; the last two share a start.
_LENGTHS = (1, 23, 48, 130, 600)
_SHARED = 40
# Prompts of the short requests that fill up a batch are shorter than this.
_SHORT = 25


@dataclass(frozen=True, slots=True)
class Span:
    """A request over the tokens of a prompt and what followed it when it was computed alone.

    Attributes:
        prompt: which.
        num_prompt: tokens that are given; those behind them are generated, whatever the logits say.
        num_new: how many.
        cached: how many of those given are to come out of the prefix cache.
        is_plain: whether the request has no logits processor and asks for nothing but tokens; what
            is to be generated must then be what the logits say.
    """

    prompt: int
    num_prompt: int
    num_new: int
    cached: int = 0
    is_plain: bool = False

    def grows(self, page_size: int) -> bool:
        """Whether what it generates comes to need another page than the given tokens."""
        last = self.num_prompt + self.num_new - 2  # the last token has no place in the cache
        return (self.num_prompt - 1) // page_size < last // page_size

    def num_pages(self, page_size: int) -> int:
        """Pages that it writes to, at most."""
        return -(-(self.num_prompt + self.num_new) // page_size) - self.cached // page_size + 1


@dataclass(frozen=True, slots=True)
class Plan:
    """One condition: batches of requests, one after the other, and the engine for them.

    Attributes:
        name: of the condition.
        batches: an engine that was new before the first one runs them all.
        is_reference: whether rows that are not known yet become the reference.
        chunk: prompt tokens of a step; None: as configured.
        num_pages: of the KV cache; None: enough.
        running: requests of a step at most; None: all of a batch.
        prefix_cache: whether it is on.
        num_threads: of the CPU kernels; None: as configured.
        preempts: whether requests are to be preempted.
        for_threads: whether it is one of those that other numbers of threads compute too.
        impossible: why the condition cannot be met, if it cannot.
    """

    name: str
    batches: Sequence[Sequence[Span]] = ()
    is_reference: bool = False
    chunk: int | None = None
    num_pages: int | None = None
    running: int | None = None
    prefix_cache: bool = False
    num_threads: int | None = None
    preempts: bool = False
    for_threads: bool = False
    impossible: str = ""


@dataclass(frozen=True, slots=True)
class Settings:
    """What `LLM.check_invariance` was asked for; see there.

    Raises:
        InvalidRequestError: a value that is not a positive integer, or a list of such.
    """

    new_tokens: int
    batch_sizes: Sequence[int]
    chunk_sizes: Sequence[int]
    prefix_lengths: Sequence[int] | None
    num_threads: Sequence[int]
    prompt_logits: int

    def __post_init__(self):
        for name in ("new_tokens", "prompt_logits"):
            checks.integer(name, getattr(self, name), minimum=1)
        for name in ("batch_sizes", "chunk_sizes", "prefix_lengths", "num_threads"):
            values = getattr(self, name)
            if values is None and name == "prefix_lengths":
                continue
            if isinstance(values, str) or not isinstance(values, Iterable):
                checks.refuse(name, values, "a list of integers")
            checked = tuple(checks.integer(name, value, minimum=1) for value in values)
            object.__setattr__(self, name, checked)

    @property
    def room(self) -> int:
        """Tokens that must fit behind each prompt."""
        return self.new_tokens + TAIL


def builtin_prompts(vocab_size: int, room: int, avoid: Collection[int] = ()) -> list[list[int]]:
    """Prompts of random ids, of 1 to 600 tokens as far as there is room; two share their start.

    Args:
        vocab_size: ids are below it.
        room: tokens of a prompt at most.
        avoid: ids that are not drawn.
    """
    draw = random.Random(0)
    lengths = sorted({min(length, room) for length in _LENGTHS})
    ids = (drawn for drawn in iter(lambda: draw.randrange(vocab_size), None) if drawn not in avoid)
    prompts = [list(islice(ids, length)) for length in lengths]
    prompts[-1][:_SHARED] = prompts[-2 if len(prompts) > 1 else -1][:_SHARED]
    return prompts


def alone(prompts: Sequence[Sequence[int]], settings: Settings) -> Plan:
    """Each prompt by itself: what everything else is compared with."""
    spans = [Span(i, len(ids), settings.new_tokens) for i, ids in enumerate(prompts)]
    return Plan("alone", [[span] for span in spans], is_reference=True)


@dataclass(slots=True)
class Planner:
    """Makes the plans that follow once it is known what the prompts generate.

    Args:
        texts: each prompt, what it generated, and `TAIL` tokens.
        settings, config: what was asked for, and the LLM's own configuration.
    """

    texts: Sequence[Sequence[int]]
    settings: Settings
    config: EngineConfig
    whole: list[Span] = field(init=False)  # the prompts, longest first
    short: list[Span] = field(init=False)  # of their first few tokens
    growing: list[Span] = field(init=False)  # those that come to need another page

    def __post_init__(self):
        new = self.settings.new_tokens
        sizes = [len(text) - new - TAIL for text in self.texts]
        order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
        self.whole = [Span(i, sizes[i], new) for i in order]
        lengths = {(i, min(1 + (7 * i + 11 * j) % _SHORT, sizes[i])) for i in order for j in (0, 1)}
        self.short = [Span(i, length, new) for i, length in sorted(lengths)]
        page = self.config.page_size
        ends = {
            (i, max(1, min(page - 1 - (3 * i + 5 * j) % new, sizes[i])))
            for i in order
            for j in (0, 1)
        }
        spans = (Span(i, length, new) for i, length in sorted(ends))
        self.growing = [span for span in spans if span.grows(page)]

    def plans(self) -> Iterator[Plan]:
        """In the order in which they are to be computed, since some add to the reference."""
        plans = [*self._rows(), *self._cached(), *self._plain(), *self._preempted()]
        yield from plans
        if self.config.device == "cpu":
            for count in self.settings.num_threads:
                yield from self._threads(count, plans)

    def _rows(self) -> Iterator[Plan]:
        singles = sorted(set(self.short + self.growing) - set(self.whole), key=_place)
        if singles:
            yield Plan("alone, decoded from fewer tokens", [[s] for s in singles], True)
        largest, smallest = (
            pick(sizes, default=None)
            for pick, sizes in ((max, self.settings.batch_sizes), (min, self.settings.chunk_sizes))
        )
        for size in self.settings.batch_sizes:
            yield Plan(f"batch of {size}", [self._batch(size)], for_threads=size == largest)
        for size in self.settings.chunk_sizes:
            yield Plan(
                f"chunks of {size}",
                [self.whole + self.short],
                chunk=size,
                for_threads=size == smallest,
            )

    def _threads(self, count: int, plans: Sequence[Plan]) -> Iterator[Plan]:
        """One condition of each kind by so many threads."""
        processors = os.cpu_count() or 1
        if count > processors:
            reason = f"there are {processors} processors"
            yield Plan(f"num_threads={count}", impossible=reason)
        elif count != self.config.num_threads:
            first = Plan("alone", [[span] for span in self.whole], for_threads=True)
            for plan in (first, *plans):
                if plan.for_threads:
                    name = f"num_threads={count}, {plan.name}"
                    yield replace(plan, name=name, num_threads=count)

    def _batch(self, size: int) -> list[Span]:
        """The prompts, longest first, and then short ones over and over."""
        spans = self.whole[:size]
        return spans + [self.short[i % len(self.short)] for i in range(size - len(spans))]

    def _cached(self) -> Iterator[Plan]:
        turn = [Span(span.prompt, len(self.texts[span.prompt]), 1) for span in self.whole]
        yield Plan("prefill of what decode wrote", [[span] for span in turn], is_reference=True)
        if not self.config.prefix_cache:
            reason = "prefix_cache is off"
            yield Plan("prefix hits", impossible=reason)
            return
        page, whole = self.config.page_size, self.whole
        lengths = self.settings.prefix_lengths
        if lengths is None:
            lengths = sorted({1, max(1, page - 1), page, page + 1, 3 * page + 5, 512})
        for length in lengths:
            hits = [s for s in whole if s.num_prompt > length]
            if hits:
                yield self._hits(f"prefix hit of {length}", hits, [length] * len(hits))
            elif self.settings.prefix_lengths is not None:
                yield Plan(f"prefix hit of {length}", impossible="no prompt is longer")
        longer = [s for s in whole if s.num_prompt > 1]
        if not longer:
            reason = "no prompt is longer than a token"
            yield Plan("prefix hit of all but one", impossible=reason)
        else:
            lengths = [s.num_prompt - 1 for s in longer]
            yield self._hits("prefix hit of all but one", longer, lengths)
            copies = [longer[0]] * 9 + longer[1:]
            lengths = [s.num_prompt - 1 for s in copies]
            plan = self._hits("9 requests over one prefix", copies, lengths)
            yield replace(plan, for_threads=True)
        written = [s.num_prompt + s.num_new - 1 for s in whole]
        second = [Span(s.prompt, s.num_prompt, 1, n) for s, n in zip(turn, written, strict=True)]
        yield Plan("second turn over what decode wrote", [whole, second], prefix_cache=True)
        plain = [replace(span, is_plain=True) for span in whole]
        yield Plan(
            "second turn after plain requests", [plain, second], prefix_cache=True, for_threads=True
        )

    def _plain(self) -> Iterator[Plan]:
        """Requests that ask for nothing but tokens, whose decode steps the engine runs apart.

        Alone, and then so that they come and go: half of them at a time, and half of them from
        within what was generated.
        """
        half = self.settings.new_tokens // 2
        plain = [replace(span, is_plain=True) for span in self.whole]
        spans = [
            replace(span, num_prompt=span.num_prompt + done, num_new=span.num_new - done)
            for span in plain
            for done in sorted({0, half})
        ]
        batches = [*([span] for span in plain), spans]
        running = max(2, len(spans) // 2)
        yield Plan("plain requests", batches, running=running, for_threads=True)

    @staticmethod
    def _hits(name: str, spans: Sequence[Span], lengths: Sequence[int]) -> Plan:
        """Requests after others that have put their first tokens into the cache."""
        pairs = list(zip(spans, lengths, strict=True))
        first = [Span(span.prompt, length, 1) for span, length in dict(pairs).items()]
        hits = [Span(span.prompt, span.num_prompt, span.num_new, n) for span, n in pairs]
        return Plan(name, [first, hits], prefix_cache=True)

    def _preempted(self) -> Iterator[Plan]:
        page, cached = self.config.page_size, self.config.prefix_cache
        if not self.growing:
            reason = "no prompt grows past a page; more new_tokens would do it"
            yield Plan("preemption", impossible=reason)
            return
        few = 2 * max(-(-(s.num_prompt + s.num_new - 1) // page) for s in self.growing)
        spans = [self.growing[i % len(self.growing)] for i in range(3 * few)]
        yield Plan("preemption", [spans], num_pages=few, prefix_cache=cached, preempts=True)
        yield self._plain_preempted()
        # Some that soon need another page, and then the longest prompt, which wants all that is
        # left: it loses pages while its chunks are computed, if that is done before they end.
        first = sorted(self.growing, key=lambda s: -s.num_prompt)[:3]
        longest = self.whole[0]
        pages = max(
            len(first) + -(-longest.num_prompt // page),
            -(-(longest.num_prompt + longest.num_new - 1) // page),
        )
        chunk = max(61, -(-longest.num_prompt // max(1, self.settings.new_tokens // 2)))
        yield Plan(
            "preemption in chunks",
            [[*first, longest, *self.growing]],
            chunk=chunk,
            num_pages=pages,
            prefix_cache=cached,
            preempts=True,
            for_threads=True,
        )

    def _plain_preempted(self) -> Plan:
        """Plain requests that have room for their prompts, and none to grow."""
        page, name = self.config.page_size, "preemption of plain requests"
        # Where a prompt fills its pages, none is admitted without room for the next token.
        ends_inside = (span for span in self.whole if span.num_prompt % page)
        growing = [replace(span, is_plain=True) for span in ends_inside if span.grows(page)]
        if not growing:
            return Plan(name, impossible="no prompt that ends inside of a page grows past it")
        spans = growing if len(growing) > 1 else 2 * growing
        pages = sum(-(-span.num_prompt // page) for span in spans)
        longest = max(-(-(span.num_prompt + span.num_new - 1) // page) for span in spans)
        return Plan(name, [spans], num_pages=max(pages, longest), preempts=True, for_threads=True)


def _place(span: Span) -> tuple[int, int]:
    return span.prompt, span.num_prompt
