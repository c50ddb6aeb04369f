"""What the cache should do, written as naively as can be: sets of tuples and a dict of slots."""


class Memory:
    """Stands for the KV tensors: a slot holds the whole text up to and with its own token.

    That is what a key/value pair depends on, so a wrong page, a wrong slot, a missed copy or an
    overwritten page all show up as a wrong text.
    """

    def __init__(self, page_size):
        self.page_size = page_size
        self.slots = {}

    def forget(self, pages):
        """Pages just allocated: what is left in them belongs to nobody."""
        for page in map(int, pages):
            for offset in range(self.page_size):
                self.slots.pop((page, offset), None)

    def write(self, pages, namespace, keys, start, stop):
        for position in range(start, stop):
            slot = int(pages[position // self.page_size]), position % self.page_size
            self.slots[slot] = (namespace, tuple(keys[: position + 1]))

    def copy(self, source, destination, count):
        for offset in range(count):
            self.slots[destination, offset] = self.slots[source, offset]

    def check(self, pages, namespace, keys, count):
        for position in range(count):
            slot = int(pages[position // self.page_size]), position % self.page_size
            assert self.slots.get(slot) == (namespace, tuple(keys[: position + 1]))


class CachedTexts:
    """Every cached prefix, each as a tuple of its own."""

    def __init__(self):
        self.texts = set()

    def add(self, namespace, keys):
        self.texts |= {(namespace, tuple(keys[:n])) for n in range(1, len(keys) + 1)}

    def match_length(self, namespace, keys):
        return next(
            n
            for n in range(len(keys), -1, -1)
            if n == 0 or (namespace, tuple(keys[:n])) in self.texts
        )

    def extensions(self, namespace, text):
        return [
            (space, other)
            for space, other in self.texts
            if space == namespace and len(other) == len(text) + 1 and other[:-1] == text
        ]


def least_recently_used(texts, memory, held, ticks, locked, shared, wanted):
    """Which texts and pages are left after evicting `wanted` pages, and how many became free.

    Ends of texts go first, the one accessed longest ago before all others, a page's worth at a
    time. A page is dropped with the first of its tokens that no other text shares.

    Args:
        texts: CachedTexts, changed in place.
        memory: what the slots hold.
        held: the set of pages that the tree holds, changed in place.
        ticks: last access of each (namespace, text).
        locked: set of (namespace, text) that must stay.
        shared: pages that somebody else holds too, so that dropping them frees nothing.
        wanted: pages to free.
    """
    page_size = memory.page_size
    freed = 0
    while freed < wanted:
        ends = [
            (space, text)
            for space, text in texts.texts
            if not texts.extensions(space, text) and (space, text) not in locked
        ]
        if not ends:
            break
        space, text = end = min(ends, key=ticks.get)
        offset = (len(text) - 1) % page_size
        (page,) = (page for page in held if memory.slots.get((page, offset)) == end)
        while True:
            texts.texts.remove((space, text))
            text = text[:-1]
            if len(text) % page_size == 0 or texts.extensions(space, text):
                held.remove(page)
                freed += page not in shared
                break
            if ticks[space, text] != ticks[end]:
                break  # what is left of the page was used later, and keeps it
    return freed
