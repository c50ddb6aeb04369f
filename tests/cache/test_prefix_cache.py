"""PrefixCache driven by simulated requests, with every slot's content checked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglite.cache import PrefixCache
from tests.cache.naive import CachedTexts, Memory

SPACES = st.sampled_from(["", "adapter"])
TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


class Request:
    """What a scheduler knows of a request: its keys, how many are computed, and its pages."""

    def __init__(self, cache, memory, namespace, keys):
        self.cache, self.memory, self.namespace = cache, memory, namespace
        self.keys = list(keys)
        self.prefix = cache.acquire(self.keys, namespace, max_tokens=len(self.keys) - 1)
        self.pages = self.prefix.pages.tolist()
        self.computed = self.prefix.num_tokens
        self.partial = self.prefix.partial_page
        held = self.held_pages()
        memory.check(held, namespace, self.keys, self.computed)

    def held_pages(self):
        return self.pages + ([] if self.partial is None else [self.partial])

    def drop_partial(self):
        self.cache.release([self.partial])
        self.partial = None

    def make_room(self, target):
        """Pages for `target` tokens, the copy of the partial page among them; False if none."""
        missing = -(-target // self.cache.page_size) - len(self.pages)
        pages = self.cache.allocate(max(missing, 0))
        if pages is None:
            return False
        self.memory.forget(pages)
        if self.partial is not None:
            self.memory.copy(self.partial, int(pages[0]), self.prefix.partial_tokens)
            self.drop_partial()
        self.pages += pages.tolist()
        return True

    def compute(self, target):
        self.memory.write(self.pages, self.namespace, self.keys, self.computed, target)
        self.computed = target

    def store(self):
        return self.cache.store(
            self.keys[: self.computed], self.pages, self.namespace, lock=self.prefix.lock
        )

    def release(self):
        self.cache.release(self.held_pages(), self.prefix.lock)


class CacheMachine(RuleBasedStateMachine):
    @initialize(page_size=st.integers(1, 4), num_pages=st.integers(4, 24))
    def start(self, page_size, num_pages):
        self.cache = PrefixCache(num_pages, page_size)
        self.memory = Memory(page_size)
        self.cached = CachedTexts()
        self.running = []
        self.seen = set()

    def pick(self, data):
        return self.running[data.draw(st.integers(0, len(self.running) - 1), label="request")]

    def after_eviction(self):
        """Only the tree knows what it dropped; that it was allowed to is checked here."""
        left = {
            (space, text)
            for space, text in self.cached.texts
            if self.cache.match_length(text, space) == len(text)
        }
        for request in self.running:  # the whole pages it was given are still there
            whole = request.prefix.num_tokens - request.prefix.partial_tokens
            text = request.namespace, tuple(request.keys[:whole])
            assert whole == 0 or text in left
        self.cached.texts = left

    def store(self, request):
        expected = self.cached.match_length(request.namespace, request.keys[: request.computed])
        assert request.store() == expected
        self.cached.add(request.namespace, request.keys[: request.computed])
        self.seen.add((request.namespace, tuple(request.keys[: request.computed])))

    @rule(space=SPACES, keys=TEXTS)
    def arrive(self, space, keys):
        request = Request(self.cache, self.memory, space, keys)
        assert request.computed == self.cached.match_length(space, keys[:-1])
        assert len(request.pages) == request.computed // self.cache.page_size
        assert (request.partial is None) == (request.prefix.partial_tokens == 0)
        self.running.append(request)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 6), store=st.booleans(), more=st.integers(0, 2))
    def run_chunk(self, data, count, store, more):
        """A chunk of the prompt, or what was generated behind it."""
        request = self.pick(data)
        if request.computed == len(request.keys):
            request.keys.append(more)
        target = min(request.computed + count, len(request.keys))
        missing = max(-(-target // self.cache.page_size) - len(request.pages), 0)
        available = self.cache.num_available
        if request.make_room(target):
            assert missing <= available
            self.after_eviction()
            request.compute(target)
            if store:
                self.store(request)
        else:
            assert missing > available == self.cache.num_available  # and nothing was evicted
            if request.partial is not None:
                request.drop_partial()
                request.computed -= request.prefix.partial_tokens
            elif len(self.running) > 1:
                self.leave(self.running[-1], store=True)

    def leave(self, request, store):
        if store and request.partial is None:
            self.store(request)
        request.release()
        self.running.remove(request)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), store=st.booleans())
    def finish_or_abort(self, data, store):
        self.leave(self.pick(data), store)

    @rule(count=st.integers(0, 8))
    def evict(self, count):
        free, available = self.cache.num_free, self.cache.num_available
        assert self.cache.evict(count) == min(count, available - free)
        assert self.cache.num_available == available
        self.after_eviction()

    @rule(space=st.none() | SPACES)
    def clear(self, space):
        before = set(self.cached.texts)
        self.cache.clear(space)
        self.after_eviction()
        others = {(s, text) for s, text in before if space is not None and s != space}
        assert others <= self.cached.texts
        if not self.running:
            assert self.cached.texts == others

    @invariant()
    def books_and_contents(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check_invariant([request.held_pages() for request in self.running])
        assert self.cache.num_cached_tokens == len(self.cached.texts)
        for space, text in self.seen:
            length = self.cached.match_length(space, text)
            assert self.cache.match_length(text, space) == length
            match = self.cache._tree.match(space, np.array(text, dtype=np.int64))
            self.memory.check([*match.pages, match.partial_page], space, text, length)
        for request in self.running:
            self.memory.check(
                request.held_pages(), request.namespace, request.keys, request.computed
            )

    def teardown(self):
        if hasattr(self, "cache"):
            for request in self.running:
                request.release()
            self.cache.clear()
            assert self.cache.num_free == self.cache.num_pages
            self.cache.check_invariant()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


@settings(max_examples=150, deadline=None)
@given(
    page_size=st.integers(1, 4),
    texts=st.lists(TEXTS, min_size=1, max_size=8),
    chunk=st.integers(1, 6),
    spare=st.integers(0, 3),
)
def test_every_request_finishes_in_a_pool_that_just_holds_the_longest(
    page_size, texts, chunk, spare
):
    longest = max(-(-len(text) // page_size) for text in texts)
    cache = PrefixCache(1 + longest + spare, page_size)
    memory = Memory(page_size)
    waiting, running = list(texts), []
    for _ in range(100 * len(texts)):
        if waiting:
            running.append(Request(cache, memory, "", waiting.pop(0)))
        for request in list(running):
            if request not in running:
                continue
            target = min(request.computed + chunk, len(request.keys))
            while not request.make_room(target):
                if running[-1] is not request:  # the latest gives way
                    latest = running.pop()
                    if latest.partial is None:
                        latest.store()
                    latest.release()
                    waiting.insert(0, latest.keys)
                elif request.partial is not None:
                    request.drop_partial()
                    request.computed -= request.prefix.partial_tokens
                    target = min(request.computed + chunk, len(request.keys))
                else:
                    break
            else:
                request.compute(target)
                request.store()
                if request.computed == len(request.keys):
                    request.release()
                    running.remove(request)
                continue
            assert len(running) > 1, "a request that is alone has no room"
        cache.check_invariant([request.held_pages() for request in running])
        if not waiting and not running:
            break
    assert not waiting
    assert not running


def test_a_prefix_is_shared_by_page_and_its_end_is_for_copying():
    cache = PrefixCache(16, 4)
    pages = cache.allocate(3)
    assert cache.store(list(range(10)), pages) == 0
    cache.release(pages)
    prefix = cache.acquire([*range(7), 99, 99])
    assert prefix.num_tokens == 7
    assert prefix.pages.dtype == np.int32
    assert prefix.pages.tolist() == pages[:1].tolist()
    assert (prefix.partial_page, prefix.partial_tokens) == (pages[1], 3)
    # Eviction takes neither what is locked nor the source of a copy.
    assert cache.evict(16) == 1
    assert cache.num_cached_tokens == 4
    cache.check_invariant([prefix.pages, [prefix.partial_page]])
    cache.release([prefix.partial_page])
    assert cache.num_available == cache.num_pages - 1
    cache.release(prefix.pages, prefix.lock)
    assert cache.num_available == cache.num_pages


def test_max_tokens_limits_the_match():
    cache = PrefixCache(16, 4)
    pages = cache.allocate(2)
    cache.store(list(range(8)), pages)
    cache.release(pages)
    for limit, expected in ((None, 8), (100, 8), (8, 8), (7, 7), (4, 4), (0, 0)):
        prefix = cache.acquire(list(range(8)), max_tokens=limit)
        assert prefix.num_tokens == expected
        if prefix.partial_page is not None:
            cache.release([prefix.partial_page])
        cache.release(prefix.pages, prefix.lock)
    with pytest.raises(ValueError, match="acquire: max_tokens is -1; it must be 0 or more"):
        cache.acquire([1], max_tokens=-1)
    cache.check_invariant()


def test_allocate_evicts_just_enough_or_nothing_at_all():
    cache = PrefixCache(9, 4)
    pages = cache.allocate(6)
    cache.store(list(range(24)), pages)
    cache.release(pages)
    assert (cache.num_free, cache.num_available) == (2, 8)
    assert cache.allocate(9) is None
    assert cache.num_cached_tokens == 24
    taken = cache.allocate(5)
    assert len(set(taken.tolist())) == 5
    assert cache.num_cached_tokens == 12
    assert cache.match_length(range(24)) == 12
    cache.check_invariant([taken])


def test_switched_off_it_is_only_a_pool():
    cache = PrefixCache(8, 4, enabled=False)
    prefix = cache.acquire([1, 2, 3, 4, 5])
    assert (prefix.num_tokens, len(prefix.pages), prefix.partial_page, prefix.lock) == (
        0,
        0,
        None,
        None,
    )
    pages = cache.allocate(2)
    assert cache.store([1, 2, 3, 4, 5], pages, lock=prefix.lock) == 0
    assert cache.match_length([1, 2, 3, 4, 5]) == 0
    cache.check_invariant([pages])
    cache.release(pages, prefix.lock)
    assert cache.num_free == cache.num_available == cache.num_pages == 7


def test_store_ignores_pages_behind_the_last_key():
    cache = PrefixCache(8, 4)
    pages = cache.allocate(4)
    cache.store([1, 2, 3, 4, 5], pages)
    cache.release(pages)
    assert (cache.num_free, cache.num_available) == (5, 7)
    with pytest.raises(ValueError, match="pages has 1 entries; 5 keys take 2 pages of 4"):
        cache.store([9, 2, 3, 4, 5], cache.allocate(1))


def test_what_a_running_request_has_stored_is_locked():
    cache = PrefixCache(16, 4)
    prefix = cache.acquire(range(8))
    pages = cache.allocate(3)
    cache.store(range(8), pages, lock=prefix.lock)
    assert cache.evict(16) == 0
    assert cache.match_length(range(8)) == 8
    cache.store(range(10), pages, lock=prefix.lock)
    assert cache.evict(16) == 0
    assert cache.match_length(range(10)) == 8  # the lock ends with the last whole page
    cache.release(pages, prefix.lock)
    assert cache.evict(16) == 2
    assert cache.match_length(range(10)) == 0


def test_what_two_requests_compute_at_once_is_cached_once():
    cache = PrefixCache(16, 4)
    prefixes = [cache.acquire(range(8)) for _ in range(2)]
    pages = [cache.allocate(2) for _ in range(2)]
    assert [
        cache.store(range(8), own, lock=prefix.lock)
        for own, prefix in zip(pages, prefixes, strict=True)
    ] == [0, 8]
    cache.check_invariant(pages)
    cache.release(pages[0], prefixes[0].lock)
    cache.check_invariant(pages[1:])
    assert cache.evict(16) == 2  # the second one's lock is not on pages of the first
    cache.release(pages[1], prefixes[1].lock)
    cache.check_invariant()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda cache, pages: cache._pool.retain(pages), "has 3 references; 1 running"),
        (lambda cache, pages: cache._pool.allocate(1), "has 1 references; 0 running requests"),
        (lambda cache, pages: cache.release(pages), "has 1 references; 1 running"),
    ],
)
def test_the_invariant_notices_what_does_not_add_up(change, text):
    cache = PrefixCache(8, 4)
    prefix = cache.acquire(range(8))
    pages = cache.allocate(2)
    cache.store(range(8), pages, lock=prefix.lock)
    cache.check_invariant([pages])
    change(cache, pages)
    with pytest.raises(AssertionError, match=text):
        cache.check_invariant([pages])


def test_a_lock_without_its_pages_is_noticed():
    cache = PrefixCache(8, 4)
    pages = cache.allocate(2)
    cache.store(range(8), pages)
    cache.release(pages)
    prefix = cache.acquire(range(8))
    cache.release(prefix.pages)
    with pytest.raises(AssertionError, match="5 of 7 pages are available while 0 are held"):
        cache.check_invariant()
