"""Pages and the prefixes cached in them: the one thing that the scheduler asks for room.

Knows keys and page numbers only: no requests, no tensors. Prefix reuse through a radix tree is
RadixAttention (Zheng et al. 2024); the structures are `csrc/radix_tree.h` and `csrc/page_pool.h`.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sglite import _C

NO_PAGES = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """The part of a request's keys that needs no computing.

    The first `num_tokens // page_size` pages are shared and must not be written to. If the prefix
    ends inside a page, `partial_page` holds its last `partial_tokens` tokens in its first slots:
    they are to be copied into a page of the request's own, and the source is then given back with
    `release([partial_page])`. Whoever finds no room for the copy gives the source back at once and
    computes those tokens.
    """

    num_tokens: int  # whole pages and the partial one together
    pages: NDArray[np.int32]  # [num_tokens // page_size]
    partial_page: int | None
    partial_tokens: int  # below page_size; 0 where there is no partial page
    lock: int | None  # None when the cache is switched off


class PrefixCache:
    """A pool of pages, and a radix tree over those that hold prefixes of earlier requests.

    A request's life::

        prefix = cache.acquire(keys[:-1])        # what is there already
        pages = cache.allocate(n)                # room for the rest; None: there is none
        ... copy the partial page, cache.release([prefix.partial_page]), compute a chunk ...
        cache.store(keys[:computed], pages, lock=prefix.lock)      # others may reuse it now
        ... more chunks, each stored; then tokens are generated ...
        cache.store(keys[:computed], pages, lock=prefix.lock)      # finished or preempted
        cache.release(pages, prefix.lock)

    At any moment each page is free, or reserved, or held by a running request, or cached and
    evictable. So `num_available` is all that running requests have left over, and a request that
    fits into the pool can run when it is alone, whatever is cached. (A partial page counts as held
    until it is released.)

    Keys are one 64-bit integer per token; an int64 array is used as it is, anything else is
    converted first. Keys in different namespaces (an adapter, a version of the weights) never
    match.

    Args:
        num_pages: pages in all, the reserved ones included.
        page_size: tokens in a page.
        enabled: when False nothing is ever matched or stored, and only the pool is left.
        num_reserved: pages 0 .. num_reserved - 1 are never given out. Padded rows of a batch write
            to page 0.

    Raises:
        ValueError: sizes below 1, or no page that is not reserved.
    """

    def __init__(
        self, num_pages: int, page_size: int, *, enabled: bool = True, num_reserved: int = 1
    ):
        self.enabled = enabled
        self.page_size = page_size
        self._sizes = num_pages, num_reserved
        self.reset()

    def reset(self) -> None:
        """Forgets everything, locks and pages in use too, whatever state it was left in."""
        self._pool = _C.PagePool(*self._sizes)
        self._tree = _C.RadixTree(self._pool, self.page_size)

    @property
    def num_pages(self) -> int:
        """Pages that can be given out."""
        return self._pool.num_pages - self._pool.num_reserved

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return self._pool.num_free

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give now: the free ones and those that eviction would free."""
        return self._pool.num_free + self._pool.num_evictable

    @property
    def num_cached_tokens(self) -> int:
        """Tokens in the tree, those in use by running requests included."""
        return self._tree.num_tokens

    def match_length(self, keys: ArrayLike, namespace: str = "") -> int:
        """How many of `keys`, from the first on, are cached. Looks only."""
        return self._tree.match(namespace, _keys(keys)).num_tokens if self.enabled else 0

    def acquire(
        self, keys: ArrayLike, namespace: str = "", max_tokens: int | None = None
    ) -> CachedPrefix:
        """The longest cached prefix of `keys`, for a request that is about to run.

        Its pages get a reference for the request, and its whole pages are locked against eviction.
        The lock is to be given to `store`, which moves it on, and to `release`, which ends it.

        Args:
            keys: [n] int64.
            namespace: where to look.
            max_tokens: match no more than this (a request must compute at least its last token).

        Raises:
            ValueError: max_tokens below 0.
        """
        if max_tokens is not None and max_tokens < 0:
            raise ValueError(f"acquire: max_tokens is {max_tokens}; it must be 0 or more")
        if not self.enabled:
            return CachedPrefix(0, NO_PAGES, None, 0, None)
        match = self._tree.lock(namespace, _keys(keys)[:max_tokens])
        return CachedPrefix(
            num_tokens=match.num_tokens,
            pages=match.pages,
            partial_page=match.partial_page,
            partial_tokens=match.num_tokens % self.page_size,
            lock=match.lock,
        )

    def allocate(self, count: int) -> NDArray[np.int32] | None:
        """`count` pages for a request to write to, evicting what was used longest ago if need be.

        None, with nothing evicted, when even eviction cannot make that much room.

        Raises:
            ValueError: count below 0.
        """
        missing = count - self._pool.num_free
        if missing > 0:
            if missing > self._pool.num_evictable:
                return None
            self._tree.evict(missing)
        return self._pool.allocate(count)

    def store(
        self, keys: ArrayLike, pages: ArrayLike, namespace: str = "", *, lock: int | None = None
    ) -> int:
        """Cache what a request has computed so far; it keeps its own pages.

        What is cached already stays as it is. From now on the request may only write behind `keys`.

        Args:
            keys: [n] int64, whose keys and values have all been written.
            pages: int32, the request's pages in order; those behind the last of `keys` are ignored.
            namespace: where to store.
            lock: the request's lock; it moves down to the last whole page of its own.

        Returns:
            How many of `keys` were cached before.

        Raises:
            ValueError: too few pages; pages that are free or reserved; a lock that is not held or
                that covers another prefix.
        """
        if not self.enabled:
            return 0
        keys = _keys(keys)
        needed = -(-len(keys) // self.page_size)
        return self._tree.insert(namespace, keys, _pages(pages)[:needed], lock)

    def release(self, pages: ArrayLike, lock: int | None = None) -> None:
        """Give back a request's references to pages, and its lock.

        Raises:
            ValueError: a page that nobody holds, or a lock that is not held.
        """
        self._pool.release(_pages(pages))
        if lock is not None:
            self._tree.unlock(lock)

    def evict(self, num_pages: int) -> int:
        """Free up to `num_pages` cached pages, least recently used first; returns how many."""
        return self._tree.evict(num_pages)

    def clear(self, namespace: str | None = None) -> int:
        """Forget what no running request uses, in one namespace or in all; returns pages freed."""
        return self._tree.clear(namespace)

    def check_invariant(self, running_pages: Iterable[ArrayLike] = ()) -> None:
        """Hold the books to account: every page and every reference is explained. For tests.

        free + cached + running + reserved = all pages, where a page that is both cached and running
        counts once; a page has as many references as the tree and the requests hold; and what is
        neither free nor reserved nor running can be evicted.

        Args:
            running_pages: for each running request the pages it holds, its partial page included.

        Raises:
            AssertionError: saying what does not add up.
        """
        running = Counter(int(page) for pages in running_pages for page in _pages(pages))
        cached = Counter(page for node in self._tree.nodes() for page in node.pages)
        pool = self._pool
        for page in range(pool.num_pages):
            actual, expected = pool.ref_count(page), running[page] + cached[page]
            assert actual == expected, (
                f"page {page} has {actual} references; {running[page]} running requests and "
                f"{cached[page]} nodes of the tree hold it"
            )
        held = len(running | cached)
        assert pool.num_free + held + pool.num_reserved == pool.num_pages, (
            f"{pool.num_free} free + {held} held + {pool.num_reserved} reserved pages are not "
            f"{pool.num_pages}"
        )
        assert self.num_available == self.num_pages - len(running), (
            f"{self.num_available} of {self.num_pages} pages are available while {len(running)} "
            "are held by running requests"
        )
        assert cached.total() == self._tree.num_pages


def _keys(keys: ArrayLike) -> NDArray[np.int64]:
    return np.ascontiguousarray(keys, dtype=np.int64)


def _pages(pages: ArrayLike) -> NDArray[np.int32]:
    return np.ascontiguousarray(pages, dtype=np.int32)
