"""The pool of KV pages: reference counts, prefix hashes and LRU eviction, each operation O(1) per page.

Called by the scheduler only. A page is in one of three states:

- referenced: at least one running sequence's block table holds it;
- cached: nobody references it, but it has a hash, so a new prompt with the same prefix can take it over;
- free: neither.

New pages come from the free ones first, then from the cached ones, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from quire.service.errors import InternalError


class PagePool:
    """Which of `num_pages` pages are whose, and which prefix each holds. Keeps no tensor: pages are numbers here."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._hashes: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._stored: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    @property
    def available(self) -> int:
        """Pages that `allocate` can give out: free or cached."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Pages that nobody references but whose prefix is kept."""
        return len(self._cached)

    def references(self, page: int) -> int:
        """How many block tables hold `page`."""
        return self._references[page]

    @property
    def all_references(self) -> Sequence[int]:
        """`references` of every page, as it is now: not to be kept."""
        return self._references

    @property
    def cached_pages(self) -> Iterable[int]:
        """The pages that `cached` counts, the one to be evicted next first."""
        return self._cached.keys()

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The pages that hold the longest known prefix of `hashes`. Takes no reference: follow with `share`."""
        pages = []
        for page_hash in hashes:
            page = self._page_of.get(page_hash)
            if page is None:
                break
            pages.append(page)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Adds a reference to each page that `match` found."""
        for page in pages:
            if self._references[page] == 0:
                del self._cached[page]
            self._references[page] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one reference each and no hash; raises InternalError if fewer are available."""
        if count > self.available:
            raise InternalError(f"{count} pages were asked for and {self.available} are available")
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def publish(self, page: int, page_hash: bytes) -> None:
        """Makes a full, computed, referenced page findable. If its prefix is known already, the older page stays it."""
        if page_hash in self._page_of:
            return
        self._page_of[page_hash] = page
        self._hashes[page] = page_hash
        self._note(page_hash, self._stored, self._removed)

    def release(self, pages: Sequence[int]) -> None:
        """Drops one reference to each page of a block table.

        Goes from the last page to the first: a prefix is worth more than what follows it, so it is evicted later.
        """
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if self._hashes[page] is None:
                    self._free.append(page)
                else:
                    self._cached[page] = None

    def drain_events(self) -> tuple[list[bytes], list[bytes]]:
        """Hashes that became findable and that no longer are, since the last call."""
        stored, removed = list(self._stored), list(self._removed)
        self._stored.clear()
        self._removed.clear()
        return stored, removed

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        page_hash = self._hashes[page]
        if page_hash is None:
            raise InternalError(f"page {page} is cached without a hash")
        self._hashes[page] = None
        del self._page_of[page_hash]
        self._note(page_hash, self._removed, self._stored)
        return page

    @staticmethod
    def _note(page_hash: bytes, into: dict[bytes, None], opposite: dict[bytes, None]) -> None:
        # Stored and removed again within one report cancel out, so an observer never sees an order to get wrong.
        if page_hash in opposite:
            del opposite[page_hash]
        else:
            into[page_hash] = None
