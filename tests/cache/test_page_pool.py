"""The page pool against a plain list of reference counts."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sglite import _C


def array(*pages):
    return np.array(pages, dtype=np.int32)


class PoolMachine(RuleBasedStateMachine):
    @initialize(num_pages=st.integers(2, 9), num_reserved=st.integers(0, 1))
    def start(self, num_pages, num_reserved):
        self.pool = _C.PagePool(num_pages, num_reserved)
        self.counts = [0] * num_pages
        self.reserved = num_reserved

    @rule(count=st.integers(0, 10))
    def allocate(self, count):
        free = self.counts[self.reserved :].count(0)
        if count > free:
            with pytest.raises(_C.OutOfPages, match=f"{count} pages asked for, {free} of"):
                self.pool.allocate(count)
            return
        pages = self.pool.allocate(count)
        assert pages.dtype == np.int32
        assert len(set(pages.tolist())) == count
        for page in pages:
            assert page >= self.reserved
            assert self.counts[page] == 0
            self.counts[page] = 1

    @rule(pages=st.lists(st.integers(-1, 10), max_size=4))
    def retain(self, pages):
        if all(0 <= page < len(self.counts) and self.counts[page] for page in pages):
            self.pool.retain(array(*pages))
            for page in pages:
                self.counts[page] += 1
        else:
            with pytest.raises(ValueError, match="retain: page"):
                self.pool.retain(array(*pages))

    @rule(pages=st.lists(st.integers(-1, 10), max_size=4))
    def release(self, pages):
        if all(
            0 <= page < len(self.counts) and self.counts[page] >= pages.count(page)
            for page in pages
        ):
            for page in pages:
                self.counts[page] -= 1
            freed = sum(self.counts[page] == 0 for page in set(pages))
            assert self.pool.release(array(*pages)) == freed
        else:
            with pytest.raises(ValueError, match="release: page"):
                self.pool.release(array(*pages))

    @invariant()
    def same_books(self):
        if hasattr(self, "pool"):
            assert [self.pool.ref_count(page) for page in range(len(self.counts))] == self.counts
            assert self.pool.num_free == self.counts[self.reserved :].count(0)
            assert self.pool.num_evictable == 0


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_every_page_but_the_reserved_ones_is_given_out():
    pool = _C.PagePool(6, num_reserved=2)
    assert sorted(pool.allocate(4).tolist()) == [2, 3, 4, 5]
    assert (pool.num_pages, pool.num_reserved, pool.num_free) == (6, 2, 0)


def test_a_failed_release_leaves_everything_as_it_was():
    pool = _C.PagePool(8)
    first, second = pool.allocate(2)
    with pytest.raises(ValueError, match=f"release: page {second} is free already"):
        pool.release(array(first, second, second))
    assert (pool.ref_count(first), pool.ref_count(second), pool.num_free) == (1, 1, 5)
    assert set(pool.allocate(5).tolist()).isdisjoint({first, second})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1,), r"num_pages is 1; it must be more than num_reserved \(1\)"),
        ((0, 0), "num_pages is 0"),
        ((2**31,), "num_pages is 2147483648"),
        ((4, -1), "num_reserved is -1; it must be 0 or more"),
    ],
)
def test_refuses_impossible_sizes(arguments, text):
    with pytest.raises(ValueError, match=text):
        _C.PagePool(*arguments)


def test_names_what_is_wrong():
    pool = _C.PagePool(4)
    with pytest.raises(ValueError, match="allocate: count is -1; it must be 0 or more"):
        pool.allocate(-1)
    with pytest.raises(ValueError, match="release: page is 0; pages 1 to 3 are given out"):
        pool.release(array(0))
    with pytest.raises(IndexError, match="page is 4; there are 4 pages"):
        pool.ref_count(4)
    with pytest.raises(TypeError, match="pages: expected a contiguous numpy array of dtype int32"):
        pool.retain(np.array([1], dtype=np.int64))
    with pytest.raises(TypeError, match="not contiguous"):
        pool.retain(np.ones(4, dtype=np.int32)[::2])
