"""A batch's token masks, filled in parallel, in bounded time. The sidecar calls it for engines, the offline API in
process.

Masks of matchers that were quick the last time are computed together, by llguidance's own threads, the others one by
one by threads of ours. A thread that computes a mask can't be stopped. So threads compute in memory of their own and
hand over what is done in time; one that is late is given up with its sequence, and another takes its place until it is
back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor

from quire.sidecar.config import MaskLimits
from quire.sidecar.grammar.batch import Batch, Filled, MaskRow
from quire.sidecar.grammar.cores import num_cores
from quire.sidecar.grammar.matcher import RowResult, SequenceMatcher

# As many threads for each that is wanted may be busy with what was given up.
_SPARE = 4
# Work for a thread, in seconds, and what a sequence's first mask is expected to take. llguidance lets go of the GIL for
# masks alone, which most often are the least of it: many threads take longer for cheap ones than one does.
_ENOUGH_S, _UNKNOWN_S = 0.002, 0.0005
# Fewer are not worth a call for all of them.
_TOGETHER = 2
# What takes so many times as long as usual has a slow mask in it. Usual is at most what is expected of a first mask:
# one may become slower little by little.
_UNUSUAL, _NEWEST = 4.0, 0.1


class MaskFiller:
    """The threads that compute masks; 0 is one for each core that this process may use."""

    def __init__(self, threads: int, limits: MaskLimits) -> None:
        self.limits = limits
        self._wanted = threads or num_cores()
        self._executor = LLExecutor(self._wanted)
        self._usual = _UNKNOWN_S  # what one of those takes that are computed together
        self._buffers: list[npt.NDArray[np.int32]] = []
        self._batches: SimpleQueue[Batch | None] = SimpleQueue()
        # Guards the counts of threads: those that exist, and those of them that compute what was given up.
        self._lock = threading.Lock()
        self._alive = 0
        self._given_up = 0
        self._closed = False
        self._replace(0)

    def fill(self, rows: Sequence[MaskRow], bitmask: npt.NDArray[np.int32]) -> Filled:
        """Fills rows of `bitmask`, int32 [R, ceil(vocab_size / 32)], within the limits' time."""
        if not rows:
            return Filled({}, {})
        quick, alone = _parted(rows)
        seconds_alone = sum(row.matcher.seconds or _UNKNOWN_S for row in alone)
        num_alone = min(self._wanted, len(alone), 1 + int(seconds_alone / _ENOUGH_S))
        batch = Batch(
            alone, bitmask, quick, self._fill_together, partial(self._wake, num_threads=num_alone - 1), self._buffers
        )
        row_seconds, now = self.limits.row_seconds, time.monotonic()
        end = now + self.limits.step_seconds
        expected = seconds_alone + len(quick) * self._usual
        most, num_awake = min(self._wanted, max(1, len(alone))), max(1, num_alone)
        self._wake(batch, 1 if quick else num_awake)
        while True:
            seconds = batch.until_overdue(now, end, row_seconds)
            if num_awake < most:
                seconds = min(seconds, 2 * expected + _ENOUGH_S)
            is_done = batch.done.wait(seconds)
            # One reading a turn: time that passes between any two of these lines counts as overslept.
            before, now = now, time.monotonic()
            if is_done:
                break
            overslept = now - before - seconds
            if overslept > row_seconds:
                # This process stood still, and so did the masks, for an unknown part of their time.
                batch.begin_again(now)
                end = max(end + overslept, now + row_seconds)
                continue
            # It takes longer than expected: nobody is to wait behind a slow mask.
            self._wake(batch, most - num_awake)
            num_awake = most
            num_late = batch.give_up(now, end, row_seconds)
            self._replace(num_late)
            self._wake(batch, num_late)
        return batch.filled()

    def _fill_together(self, rows: Sequence[MaskRow], masks: npt.NDArray[np.int32]) -> list[RowResult]:
        """Fills a mask for each of `rows`."""
        began = time.monotonic()
        matchers = [row.matcher for row in rows]
        accepted, max_forced = [row.accepted for row in rows], [row.max_forced for row in rows]
        results = SequenceMatcher.fill_together(self._executor, matchers, accepted, max_forced, masks)
        took = time.monotonic() - began
        if took > _ENOUGH_S + _UNUSUAL * self._usual * len(rows):
            # Which of them it was shows when each has a thread of its own.
            for matcher in matchers:
                matcher.seconds = max(matcher.seconds, took)
        self._usual += _NEWEST * (min(took / len(rows), _UNKNOWN_S) - self._usual)
        return results

    def _wake(self, batch: Batch, num_threads: int) -> None:
        for _ in range(num_threads):
            self._batches.put(batch)

    def close(self) -> None:
        """Ends the threads, those that are given up when they are done."""
        with self._lock:
            self._closed = True
            for _ in range(self._alive):
                self._batches.put(None)

    def _replace(self, num_given_up: int) -> None:
        """Starts threads in the place of those that are busy with what was given up, up to a limit."""
        with self._lock:
            self._given_up += num_given_up
            while self._alive - self._given_up < self._wanted and self._alive < self._wanted * (1 + _SPARE):
                self._alive += 1
                threading.Thread(target=self._run, name="mask", daemon=True).start()

    def _run(self) -> None:
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        """A function of its own, so that a thread which waits holds on to no batch and its memory."""
        batch = self._batches.get()
        return batch is not None and (batch.work() or not self._is_surplus())

    def _is_surplus(self) -> bool:
        """Called by a thread that comes back from what was given up: whether its place was taken."""
        with self._lock:
            self._given_up -= 1
            surplus = self._alive > self._wanted and not self._closed
            self._alive -= surplus
            return surplus


def _parted(rows: Sequence[MaskRow]) -> tuple[list[MaskRow], list[MaskRow]]:
    """Those that are filled together, and the others, in the order in which they are to be filled."""
    quick: list[MaskRow] = []
    alone: list[MaskRow] = []
    for row in rows:
        (quick if not row.drafts and row.matcher.is_quick else alone).append(row)
    if len(quick) < _TOGETHER:
        quick, alone = [], list(rows)
    # What shares a lexer is next to each other, and so for one thread.
    quick.sort(key=lambda row: id(row.matcher.lexer))
    # What was slow is likely to be so again: at the deadline, others have had their turn.
    alone.sort(key=lambda row: row.matcher.seconds)
    return quick, alone
