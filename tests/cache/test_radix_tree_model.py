"""The radix tree against sets of tuples, and its own rules after every step."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglite import _C
from tests.cache.naive import CachedTexts, Memory, least_recently_used

SPACES = st.sampled_from(["", "adapter"])
TEXTS = st.lists(st.integers(0, 2), max_size=11)


def keys_of(text):
    return np.array(text, dtype=np.int64)


def check_structure(tree, pool):
    """The rules of csrc/radix_tree.h, read off the nodes."""
    page_size, nodes = tree.page_size, tree.nodes()
    children = [[] for _ in nodes]
    roots = Counter()
    for node in nodes:
        if node.parent >= 0:
            parent = nodes[node.parent]
            assert node.begin == parent.begin + len(parent.keys)
            assert node.last_access <= parent.last_access
            children[node.parent].append(node)
        else:
            assert node.begin == 0
            roots[node.namespace, node.keys[0]] += 1
    assert not roots or max(roots.values()) == 1
    for node, below in zip(nodes, children, strict=True):
        end = node.begin + len(node.keys)
        assert node.keys
        assert len({child.keys[0] for child in below}) == len(below)
        pages_before, pages_through = node.begin // page_size, end // page_size
        assert len(node.pages) == pages_through - pages_before + (not below and end % page_size > 0)
        assert node.locked == (node.num_locks > 0 or any(child.locked for child in below))
        assert node.num_locks == 0 or end % page_size == 0
    pages = Counter(page for node in nodes for page in node.pages)
    assert not pages or max(pages.values()) == 1
    assert tree.num_tokens == sum(len(node.keys) for node in nodes)
    assert tree.num_pages == len(pages)
    unlocked = Counter(page for node in nodes if not node.locked for page in node.pages)
    evictable = sum(pool.ref_count(page) == count for page, count in unlocked.items())
    assert tree.num_evictable_pages == pool.num_evictable == evictable


class TreeMachine(RuleBasedStateMachine):
    """Writers insert texts in pages of their own; some hold on to them, and some hold locks."""

    @initialize(page_size=st.integers(1, 4), num_pages=st.integers(6, 40))
    def start(self, page_size, num_pages):
        self.page_size = page_size
        self.pool = _C.PagePool(num_pages)
        self.tree = _C.RadixTree(self.pool, page_size)
        self.memory = Memory(page_size)
        self.cached = CachedTexts()
        self.locks = {}  # lock -> (namespace, text it covers)
        self.readers = []  # (namespace, text, its pages, lock), of what lock() gave
        self.kept = []  # page arrays that writers hold on to
        self.seen = set()

    def text_ticks(self):
        nodes, texts, ticks = self.tree.nodes(), [], {}
        for node in nodes:
            above = texts[node.parent] if node.parent >= 0 else ()
            texts.append(above + tuple(node.keys))
            for n in range(len(above) + 1, len(texts[-1]) + 1):
                ticks[node.namespace, texts[-1][:n]] = node.last_access
        return ticks

    def locked_texts(self):
        return {(s, text[:n]) for s, text in self.locks.values() for n in range(len(text) + 1)}

    def evict_from_model(self, wanted):
        nodes = self.tree.nodes()
        held = {page for node in nodes for page in node.pages}
        return least_recently_used(
            self.cached,
            self.memory,
            held,
            self.text_ticks(),
            self.locked_texts(),
            {page for page in held if self.pool.ref_count(page) > 1},
            wanted,
        )

    def write(self, space, text):
        """Pages with the text in them, or None where the pool has no room."""
        count = -(-len(text) // self.page_size)
        if count > self.pool.num_free:
            return None
        pages = self.pool.allocate(count)
        self.memory.forget(pages)
        self.memory.write(pages, space, text, 0, len(text))
        return pages

    @rule(space=SPACES, text=TEXTS, keep=st.booleans())
    def insert(self, space, text, keep):
        pages = self.write(space, text)
        if pages is None:
            return
        assert self.tree.insert(space, keys_of(text), pages) == self.cached.match_length(
            space, text
        )
        self.cached.add(space, text)
        self.seen.add((space, tuple(text)))
        if keep:
            self.kept.append(pages)
        else:
            self.pool.release(pages)

    @rule(space=SPACES, text=TEXTS)
    def lock(self, space, text):
        expected = self.cached.match_length(space, text)
        found = self.tree.lock(space, keys_of(text))
        assert found.num_tokens == expected
        whole = expected - expected % self.page_size
        assert len(found.pages) == whole // self.page_size
        pages = found.pages.tolist()
        if found.partial_page is not None:
            pages.append(found.partial_page)
        self.memory.check(pages, space, text, expected)
        ticks = self.text_ticks()
        assert all(ticks[space, tuple(text[:n])] == max(ticks.values()) for n in range(1, expected))
        self.locks[found.lock] = (space, tuple(text[:whole]))
        self.readers.append((space, tuple(text[:expected]), pages, found.lock))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def unlock(self, data):
        reader = data.draw(st.sampled_from(self.readers))
        self.readers.remove(reader)
        space, text, pages, lock = reader
        self.memory.check(pages, space, text, len(text))  # nobody wrote to it meanwhile
        self.pool.release(np.array(pages, dtype=np.int32))
        self.tree.unlock(lock)
        del self.locks[lock]
        with pytest.raises(ValueError, match=f"lock {lock} is not held"):
            self.tree.unlock(lock)

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), more=TEXTS, move_lock=st.booleans())
    def grow(self, data, more, move_lock):
        """A reader copies the partial page, goes on writing, and stores; its lock may move on."""
        reader = data.draw(st.sampled_from(self.readers))
        space, text, pages, lock = reader
        longer = (*text, *more)
        whole = len(self.locks[lock][1]) // self.page_size
        count = -(-len(longer) // self.page_size) - whole
        if count > self.pool.num_free:
            return
        own, replaced = self.pool.allocate(count).tolist(), pages[whole:]
        self.memory.forget(own)
        for number, page in enumerate(replaced):
            valid = len(text) - (whole + number) * self.page_size
            self.memory.copy(page, own[number], min(valid, self.page_size))
        self.pool.release(np.array(replaced, dtype=np.int32))
        pages = pages[:whole] + own
        self.memory.write(pages, space, longer, len(text), len(longer))
        known = self.cached.match_length(space, longer)
        page_array = np.array(pages, dtype=np.int32)
        given = lock if move_lock else None
        assert self.tree.insert(space, keys_of(longer), page_array, given) == known
        self.cached.add(space, longer)
        self.seen.add((space, longer))
        held = self.tree.match(space, keys_of(longer)).pages.tolist()
        same = next((i for i, page in enumerate(held) if page != pages[i]), len(held))
        if move_lock:
            self.locks[lock] = (space, longer[: same * self.page_size])
        self.readers[self.readers.index(reader)] = (space, longer, pages, lock)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def let_go(self, data):
        index = data.draw(st.integers(0, len(self.kept) - 1))
        self.pool.release(self.kept.pop(index))

    @rule(wanted=st.integers(0, 12))
    def evict(self, wanted):
        possible = self.tree.num_evictable_pages
        expected = self.evict_from_model(wanted)
        assert self.tree.evict(wanted) == expected == min(wanted, possible)

    @rule(space=st.none() | SPACES)
    def clear(self, space):
        locked = self.locked_texts()
        before = self.pool.num_free
        freed = self.tree.clear(space)
        assert self.pool.num_free == before + freed
        kept = {(s, text) for s, text in self.cached.texts if space is not None and s != space}
        # A node is locked whole or not at all, but locks end where nodes end.
        self.cached.texts = kept | (self.cached.texts & locked)

    @invariant()
    def same_as_the_model(self):
        if not hasattr(self, "tree"):
            return
        check_structure(self.tree, self.pool)
        assert self.tree.num_tokens == len(self.cached.texts)
        assert self.tree.num_locks == len(self.locks)
        spaces = {space for space, _ in (*self.cached.texts, *self.locks.values())}
        assert self.tree.num_namespaces == len(spaces)
        for space, text in self.seen:
            match = self.tree.match(space, keys_of(text))
            assert match.num_tokens == self.cached.match_length(space, text)
            assert (match.partial_page is not None) == (match.num_tokens % self.page_size > 0)
            pages = [*match.pages.tolist(), match.partial_page]
            self.memory.check(pages, space, text, match.num_tokens)
        for space, text in self.locks.values():
            assert self.tree.match(space, keys_of(text)).num_tokens == len(text)

    def teardown(self):
        if hasattr(self, "tree"):
            for *_, pages, lock in self.readers:
                self.pool.release(np.array(pages, dtype=np.int32))
                self.tree.unlock(lock)
            for pages in self.kept:
                self.pool.release(pages)
            self.tree.clear()
            assert (self.tree.num_tokens, self.tree.num_pages, self.tree.nodes()) == (0, 0, [])
            assert self.pool.num_free == self.pool.num_pages - 1


TestTreeMachine = TreeMachine.TestCase
TestTreeMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
