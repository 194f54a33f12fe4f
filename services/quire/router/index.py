"""Which engine holds which pages: the router's copy of every engine's prefix cache.

The links feed it with the engines' cache events; the core asks it how much of a prompt each engine holds.

A page is a number here: the first 60 bits of its hash. Two of a million pages share them with a probability of one in
two million, and what is at stake is one misjudged expectation. Python stores numbers of up to 60 bits in 32 bytes, a
16-byte hash in 64; that and one dict for all engines keep a page at about 74 bytes, however many engines hold it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from quire.service.pages import HASH_BYTES

_KEY_BITS = (1 << 60) - 1

# Pages handled between two chances for the event loop to do something else: about a millisecond.
SLICE = 4096

# Of a prompt's pages every so many-th is looked up; the reason stands at `PrefixIndex.match`.
STRIDE = 4

# The distinct sets of holders that are kept as shared objects; beyond it sharing starts anew.
_MAX_INTERNED = 1 << 16


def page_keys(hashes: bytes) -> list[int]:
    """The index's keys of concatenated page hashes (16 bytes each), in order."""
    words = np.frombuffer(hashes, dtype="<u8").reshape(-1, HASH_BYTES // 8)[:, 0] & _KEY_BITS
    keys: list[int] = words.tolist()
    return keys


class PrefixIndex:
    """A map from page to the set of its holders, as bits of a number.

    A holder is one engine's cache in one life. It is not emptied page by page when that life ends, which would hold
    up every token in flight: `retire` hides it at once and `sweep` cleans up after it, a slice at a time.

    With a `stride` of 1 `match` is exact.
    """

    def __init__(self, stride: int = STRIDE) -> None:
        self._stride = stride
        self._holders_of: dict[int, int] = {}
        # Equal numbers above 256 are separate objects in Python; one object per set of holders saves 32 bytes a page.
        self._interned: dict[int, int] = {}
        self._live = 0
        self._retired = 0
        self._sweeping = 0
        self._to_sweep: Iterator[int] = iter(())

    def __len__(self) -> int:
        return len(self._holders_of)

    def open(self) -> int:
        """A new holder without pages: a number with one bit set."""
        used = self._live | self._retired | self._sweeping
        holder = ~used & (used + 1)
        self._live |= holder
        return holder

    def store(self, holder: int, keys: Iterable[int]) -> None:
        """`holder` has these pages now."""
        holders_of, interned = self._holders_of, self._interned
        if len(interned) > _MAX_INTERNED:
            interned.clear()
        for key in keys:
            holders = holders_of.get(key, 0) | holder
            holders_of[key] = interned.setdefault(holders, holders)

    def remove(self, holder: int, keys: Iterable[int]) -> None:
        """`holder` has these pages no more; those that it never had are no error."""
        self._clear(keys, holder)

    def retire(self, holder: int) -> None:
        """`holder` is gone, with all its pages."""
        self._live &= ~holder
        self._retired |= holder

    def sweep(self, limit: int = SLICE) -> Iterator[None]:
        """Cleans up after retired holders; a generator, so that the caller can do other things between two slices.

        Two sweeps at once share the work.
        """
        while self._sweep_slice(limit):
            yield

    def match(self, keys: Sequence[int]) -> dict[int, int]:
        """How many pages from the first on each holder has without a gap; holders that lack the first are left out.

        Nearly all of a lookup's time goes by waiting for memory, so not every page is looked up: if two that are
        `stride` apart have the same holders, so have those between them, for engines evict a prompt's pages from the
        last to the first. A gap that is shorter can go unseen where that was not so (two sequences computed the same
        pages at once, and the one whose copy was kept has ended); then one expectation is too good.
        """
        if not keys:
            return {}
        holders_of = self._holders_of.get
        lengths: dict[int, int] = {}
        holding = self._live
        before: int | None = None
        begin = 0
        for end in (*range(0, len(keys) - 1, self._stride), len(keys) - 1):
            # Mostly the very object of the page before: sets of holders are shared.
            if end and holders_of(keys[end]) is before:
                begin = end + 1
                continue
            for length in range(begin, end + 1):
                before = holders_of(keys[length])
                still = holding & (before or 0)
                if still != holding:
                    if length:
                        lengths.update(dict.fromkeys(_bits(holding ^ still), length))
                    if not still:
                        return lengths
                    holding = still
            begin = end + 1
        lengths.update(dict.fromkeys(_bits(holding), len(keys)))
        return lengths

    def _sweep_slice(self, limit: int) -> bool:
        if not self._sweeping and self._retired:
            self._sweeping, self._retired = self._retired, 0
            self._to_sweep = iter(list(self._holders_of))
        keys = list(islice(self._to_sweep, limit))
        self._clear(keys, self._sweeping)
        if len(keys) == limit:
            return True
        self._sweeping = 0
        return bool(self._retired)

    def _clear(self, keys: Iterable[int], bits: int) -> None:
        holders_of, interned = self._holders_of, self._interned
        for key in keys:
            holders = holders_of.get(key, 0)
            if holders & bits:
                if left := holders & ~bits:
                    holders_of[key] = interned.setdefault(left, left)
                else:
                    del holders_of[key]


class CacheReplica:
    """One engine's part of the index, kept equal to the engine's cache by its events.

    `epoch` and `sequence` are those of the last event; None before the first snapshot and after `forget`.
    """

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self.holder = index.open()
        self.epoch: int | None = None
        self.sequence = 0

    def snapshot(self, epoch: int, sequence: int, stored: bytes, limit: int = SLICE) -> Iterator[None]:
        """Replaces everything; a generator, so that the caller can do other things between two slices.

        Pages known before stay in use until the last slice, unless they are of another epoch.
        """
        if epoch != self.epoch:
            self.forget()
        holder = self._index.open()
        step = limit * HASH_BYTES
        try:
            for start in range(0, len(stored), step):
                self._index.store(holder, page_keys(stored[start : start + step]))
                yield
        except GeneratorExit:
            self._index.retire(holder)
            raise
        self._index.retire(self.holder)
        self.holder, self.epoch, self.sequence = holder, epoch, sequence

    def delta(self, epoch: int, sequence: int, stored: bytes, removed: bytes) -> bool:
        """Applies one event, what it removes first; False if events before it are missing: a snapshot is needed."""
        if epoch != self.epoch:
            self.forget()
            return False
        if sequence != self.sequence + 1:
            return False
        self._index.remove(self.holder, page_keys(removed))
        self._index.store(self.holder, page_keys(stored))
        self.sequence = sequence
        return True

    def close(self) -> None:
        """The engine is no longer of interest."""
        self._index.retire(self.holder)

    def forget(self) -> None:
        """Nothing is known of the engine's cache any more."""
        if self.epoch is not None:
            self._index.retire(self.holder)
            self.holder = self._index.open()
            self.epoch = None


class PagesInProgress:
    """The pages of the prompts that an engine is computing: they will be there before a request sent now needs them.

    They count until the request that computes them ends; by then the engine has reported those it keeps.
    """

    def __init__(self) -> None:
        self._requests_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._requests_of)

    def add(self, keys: Iterable[int]) -> None:
        """A prompt with these pages was sent to the engine."""
        requests_of = self._requests_of
        for key in keys:
            requests_of[key] = requests_of.get(key, 0) + 1

    def remove(self, keys: Iterable[int]) -> None:
        """That request has ended."""
        requests_of = self._requests_of
        for key in keys:
            if requests_of[key] == 1:
                del requests_of[key]
            else:
                requests_of[key] -= 1

    def match(self, keys: Sequence[int]) -> int:
        """How many of `keys` from the first on are in progress. Prompts are whole, so a binary search finds it."""
        low, high = 0, len(keys)
        while low < high:
            middle = (low + high) // 2
            if keys[middle] in self._requests_of:
                low = middle + 1
            else:
                high = middle
        return low


def _bits(number: int) -> Iterator[int]:
    while number:
        lowest = number & -number
        yield lowest
        number ^= lowest
