"""What the radix tree promises about pages, locks, eviction and speed, case by case."""

import threading
import time

import numpy as np
import pytest

from sglite import _C


def keys_of(text):
    return np.array(text, dtype=np.int64)


class Tree:
    """A tree with a pool, and texts written as strings."""

    def __init__(self, page_size=4, num_pages=64):
        self.pool = _C.PagePool(num_pages)
        self.tree = _C.RadixTree(self.pool, page_size)

    def insert(self, text, lock=None, start=(), keep=False):
        count = -(-len(text) // self.tree.page_size) - len(start)
        pages = np.array([*start, *self.pool.allocate(count)], dtype=np.int32)
        self.tree.insert("", self.keys(text), pages, lock)
        if not keep:
            self.pool.release(pages[len(start) :])
        return pages.tolist()

    def length(self, text):
        return self.tree.match("", self.keys(text)).num_tokens

    def texts(self):
        return sorted("".join(map(chr, node.keys)) for node in self.tree.nodes())

    @staticmethod
    def keys(text):
        return keys_of([ord(letter) for letter in text])


def test_the_example_of_the_header():
    t = Tree()
    seven, eight = t.insert("abcdef")
    assert t.texts() == ["abcdef"]
    own = t.insert("abcdegh", start=[seven])
    assert t.texts() == ["abcde", "f", "gh"]
    assert {tuple(node.pages) for node in t.tree.nodes()} == {(seven,), (eight,), (own[1],)}
    match = t.tree.match("", t.keys("abcde"))
    assert match.pages.tolist() == [seven]
    assert match.partial_page in (eight, own[1])


def test_what_the_tree_has_already_stays_as_it_is():
    t = Tree()
    first = t.insert("abcdefgh", keep=True)
    second = t.insert("abcdefgh", keep=True)
    assert set(first).isdisjoint(second)
    assert t.tree.match("", t.keys("abcdefgh")).pages.tolist() == first
    assert [t.pool.ref_count(page) for page in first + second] == [2, 2, 1, 1]


def test_a_leaf_that_grows_gives_its_last_page_for_the_one_that_goes_on():
    t = Tree()
    t.insert("abcdef")
    free = t.pool.num_free
    longer = t.insert("abcdefg")
    assert t.texts() == ["abcdefg"]
    assert t.tree.match("", t.keys("abcdefg")).partial_page == longer[1]
    assert t.pool.num_free == free


def test_a_request_that_grows_in_chunks_is_at_most_two_nodes():
    t = Tree()
    lock = t.tree.lock("", t.keys("")).lock
    text = "abcdefghijklmnopqrstuvwxyz"
    pages = t.pool.allocate(7)
    for end in (3, 5, 8, 9, 12, 17, 26):
        t.tree.insert("", t.keys(text[:end]), pages[: -(-end // 4)], lock)
        assert t.texts() == sorted(filter(None, [text[: end // 4 * 4], text[end // 4 * 4 : end]]))
        assert t.tree.num_evictable_pages == 0
    t.pool.release(pages)
    assert t.tree.num_evictable_pages == (end % 4 > 0)  # all the others are locked
    t.tree.unlock(lock)
    assert t.tree.num_evictable_pages == 7


def test_a_lock_stops_where_the_pages_are_not_the_requests_own():
    t = Tree()
    lock = t.tree.lock("", t.keys("abcdefgh")).lock
    t.insert("abcdefgh")  # somebody else was faster
    own = t.insert("abcdefghijklm", lock=lock, keep=True)
    # The request sits on 4 pages of its own; the 2 of the other are cached, below no lock.
    assert t.tree.num_evictable_pages == 2
    assert t.tree.evict(64) == 2
    assert t.tree.num_tokens == 0
    assert all(t.pool.ref_count(page) == 1 for page in own)


def test_locks_survive_a_split_above_and_below_their_end():
    t = Tree()
    t.insert("abcdefghijkl")
    locked = t.tree.lock("", t.keys("abcdefgh"))
    t.insert("abcxy")
    t.insert("abcdefghxyz")
    t.pool.release(locked.pages)
    t.tree.evict(64)
    assert (t.length("abcdefghijkl"), t.length("abcxy"), t.length("abcdefghxyz")) == (8, 3, 8)
    t.tree.unlock(locked.lock)
    t.tree.evict(64)
    assert t.tree.num_tokens == 0


@pytest.mark.parametrize("end", [8, 12])
def test_a_lock_that_moves_on_leaves_other_locks_where_they_are(end):
    t = Tree()
    text = "abcdefghijkl"
    first = t.tree.lock("", t.keys("")).lock
    pages = t.pool.allocate(3)
    t.tree.insert("", t.keys(text[:4]), pages[:1], first)
    t.tree.insert("", t.keys(text), pages)
    second = t.tree.lock("", t.keys(text[:8]))
    t.tree.insert("", t.keys(text[:end]), pages[: end // 4], first)
    t.pool.release(np.append(pages, second.pages))
    assert t.tree.num_evictable_pages == 3 - end // 4
    t.tree.unlock(first)
    assert t.tree.num_evictable_pages == 1
    t.tree.unlock(second.lock)
    assert t.tree.evict(3) == 3


def test_eviction_takes_what_was_used_longest_ago_and_tails_first():
    t = Tree()
    for text in ("aaaaaaaaaaaa", "bbbbbbbb", "cccccccc"):
        t.insert(text)
    found = t.tree.lock("", t.keys("aaaaaaaaaaaa"))  # makes it the latest
    t.pool.release(found.pages)
    t.tree.unlock(found.lock)
    assert t.tree.evict(1) == 1
    assert t.texts() == ["aaaaaaaaaaaa", "bbbb", "cccccccc"]
    assert t.tree.evict(2) == 2
    assert t.texts() == ["aaaaaaaaaaaa", "cccc"]
    t.tree.match("", t.keys("cccc"))  # only looks
    assert t.tree.evict(2) == 2
    assert t.texts() == ["aaaaaaaa"]


def test_eviction_goes_on_until_pages_are_really_free():
    t = Tree()
    t.insert("aaaaaaaa", keep=True)
    t.insert("bbbb")
    assert t.tree.num_evictable_pages == 1
    assert t.tree.evict(1) == 1
    assert t.tree.num_tokens == 0  # the first one's pages are held outside, and freed nothing


def test_a_parent_keeps_the_page_it_shares_with_its_last_child():
    t = Tree()
    t.insert("abcdefgh")
    t.insert("abcdexyz")
    t.insert("abcde")  # touches the common part only
    assert t.tree.evict(1) == 1
    assert t.tree.evict(0) == 0
    assert (t.length("abcdefgh"), t.length("abcdexyz")) == (5, 8)
    t.insert("abcde")
    t.insert("zzzz")
    assert t.tree.evict(1) == 1
    assert t.length("abcdexyz") == 4


def test_namespaces_are_apart_and_cleared_apart():
    t = Tree()
    keys, pages = t.keys("abcd"), t.pool.allocate(2)
    t.tree.insert("one", keys, pages[:1])
    t.tree.insert("two", keys, pages[1:])
    assert t.tree.match("one", keys).pages.tolist() == [pages[0]]
    assert t.tree.match("", keys).num_tokens == 0
    t.pool.release(pages)
    assert t.tree.clear("one") == 1
    assert t.tree.match("one", keys).num_tokens == 0
    assert t.tree.match("two", keys).num_tokens == 4
    assert t.tree.clear("three") == 0


def test_clear_keeps_what_is_locked():
    t = Tree()
    t.insert("abcdefghij")
    found = t.tree.lock("", t.keys("abcdefg"))
    assert found.num_tokens == 7
    t.pool.release(np.append(found.pages, np.int32(found.partial_page)))
    assert t.tree.clear() == 2
    assert t.length("abcdefghij") == 4


def test_negative_and_wide_keys():
    t = Tree(page_size=2)
    keys = keys_of([-(2**63), 2**63 - 1, -1])
    t.tree.insert("", keys, t.pool.allocate(2))
    assert t.tree.match("", keys).num_tokens == 3
    assert t.tree.match("", keys_of([-(2**63), 2**63 - 1, 2**32 - 1])).num_tokens == 2


def test_a_tree_gives_its_pages_back_when_it_goes():
    t = Tree()
    t.insert("abcdefgh")
    t.tree.lock("", t.keys("abcd"))
    pool, t.tree = t.pool, None
    assert pool.num_free == pool.num_pages - 1 - 1  # the page that lock() gave out


def test_names_what_is_wrong_and_changes_nothing():
    t = Tree()
    pages = t.pool.allocate(3)
    lock = t.tree.lock("", t.keys("")).lock
    t.tree.insert("", t.keys("abcdefgh"), pages[:2], lock)
    t.insert("stuvwxyz")
    with pytest.raises(ValueError, match="pages has 1 entries; 8 keys take 2 pages of 4"):
        t.tree.insert("", t.keys("abcdefgh"), pages[:1])
    with pytest.raises(ValueError, match="lock 77 is not held"):
        t.tree.insert("", t.keys("abcd"), pages[:1], 77)
    for keys, wrong in (
        ("xbcdefgh", pages[:2]),
        ("stuvwxyz", pages[:2]),
        ("abcd", pages[:1]),
        ("abcdefgh", pages[1:]),
    ):
        with pytest.raises(ValueError, match=f"the 8 tokens that lock {lock} covers"):
            t.tree.insert("", t.keys(keys), wrong, lock)
    with pytest.raises(ValueError, match="the 8 tokens that lock"):
        t.tree.insert("elsewhere", t.keys("abcdefgh"), pages[:2], lock)
    with pytest.raises(ValueError, match="retain: page 60 is free"):
        t.tree.insert("", t.keys("abcdefghi"), np.append(pages[:2], np.int32(60)))
    with pytest.raises(ValueError, match="num_pages is -1; it must be 0 or more"):
        t.tree.evict(-1)
    with pytest.raises(TypeError, match="keys: expected a contiguous numpy array of dtype int64"):
        t.tree.match("", np.zeros(4, dtype=np.int32))
    with pytest.raises(ValueError, match="page_size is 0; it must be 1 or more"):
        _C.RadixTree(t.pool, 0)
    assert t.texts() == ["abcdefgh", "stuvwxyz"]
    assert [t.pool.ref_count(page) for page in pages] == [2, 2, 1]


def test_a_page_that_only_the_cache_holds_cannot_be_released():
    t = Tree()
    pages = t.insert("abcd")
    with pytest.raises(ValueError, match=f"page {pages[0]} is only held by the prefix cache"):
        t.pool.release(np.array(pages, dtype=np.int32))


def test_a_path_of_very_many_nodes_is_dropped_on_a_small_stack():
    t = Tree(page_size=1, num_pages=10_000)
    keys, pages = np.arange(4_000), t.pool.allocate(4_000)
    t.tree.insert("", keys, pages)
    for end in range(3_999, 0, -1):
        t.tree.insert("", np.append(keys[:end], -1), np.append(pages[:end], t.pool.allocate(1)))
    assert len(t.tree.nodes()) == 7_999

    def drop():
        t.tree = None

    before = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=drop)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert t.pool.num_free == 10_000 - 1 - 7_999  # all pages have their writer left
    assert {t.pool.ref_count(page) for page in pages} == {1}


def processor_seconds(call, repeats=30):
    """The least that a call takes: what comes on top is somebody else's."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times)


@pytest.mark.parametrize("num_nodes", [1, 500])
def test_a_prefix_of_100000_tokens_is_matched_in_under_a_millisecond(num_nodes):
    pool = _C.PagePool(8000)
    tree = _C.RadixTree(pool, 16)
    keys = np.random.default_rng(0).integers(0, 150_000, 100_000)
    pages = pool.allocate(6250)
    tree.insert("", keys, pages)
    for end in np.linspace(0, 100_000, num_nodes, endpoint=False)[1:].astype(int):
        branch = np.append(keys[:end], -1)  # parts from the prefix here
        own = pool.allocate(1)
        tree.insert("", branch, np.append(pages[: end // 16], own))
    assert len(tree.nodes()) == 2 * num_nodes - 1

    def lock_and_unlock():
        found = tree.lock("", keys)
        assert found.num_tokens == 100_000
        pool.release(found.pages)
        tree.unlock(found.lock)

    assert tree.match("", keys).num_tokens == 100_000
    assert processor_seconds(lambda: tree.match("", keys)) < 1e-3
    assert processor_seconds(lock_and_unlock) < 1e-3
