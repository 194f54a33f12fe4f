"""A batch's token masks, filled in parallel, in bounded time. The sidecar calls it for engines, the offline API in
process.

A thread that computes a mask can't be stopped. So threads compute in memory of their own and hand over what is done in
time; one that is late is given up with its sequence, and another takes its place until it is back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from quire.service.errors import InternalError, OverloadedError, QuireError
from quire.sidecar.config import MaskLimits
from quire.sidecar.grammar.compile import refusal
from quire.sidecar.grammar.cores import num_cores
from quire.sidecar.grammar.matcher import RowResult, SequenceMatcher

logger = logging.getLogger(__name__)

# As many threads for each that is wanted may be busy with what was given up.
_SPARE = 4
# Work for a thread, in seconds, and what a sequence's first mask is expected to take. llguidance lets go of the GIL for
# masks alone, which most often are the least of it: many threads take longer for cheap ones than one does.
_ENOUGH_S, _UNKNOWN_S = 0.002, 0.0005


class MaskRow(NamedTuple):
    """The mask after `accepted`, a sequence's output tokens since its last mask, goes into `row`; those after each of
    `drafts` into the rows after it. Up to `max_forced` forced tokens are reported."""

    sequence: int
    row: int
    matcher: SequenceMatcher
    accepted: Sequence[int]
    drafts: Sequence[int] = ()
    max_forced: int = 0


@dataclass(frozen=True, slots=True)
class Filled:
    """What became of a batch's rows, by sequence: one of the two. `seconds` is the CPU time of the slowest."""

    results: dict[int, RowResult]
    errors: dict[int, QuireError]
    num_late: int = 0
    seconds: float = 0.0


class MaskFiller:
    """The threads that compute masks; 0 is one for each core that this process may use."""

    def __init__(self, threads: int, limits: MaskLimits) -> None:
        self.limits = limits
        self._wanted = threads or num_cores()
        self._batches: SimpleQueue[_Batch | None] = SimpleQueue()
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
        # What was slow is likely to be so again: at the deadline, others have had their turn.
        batch = _Batch(sorted(rows, key=lambda row: row.matcher.seconds), bitmask)
        row_seconds, now = self.limits.row_seconds, time.monotonic()
        end = now + self.limits.step_seconds
        expected = sum(row.matcher.seconds or _UNKNOWN_S for row in rows)
        most = min(self._wanted, len(rows))
        num_awake = min(most, 1 + int(expected / _ENOUGH_S))
        self._wake(batch, num_awake)
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

    def _wake(self, batch: _Batch, num_threads: int) -> None:
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


class _Running(NamedTuple):
    row: MaskRow
    began: float


@dataclass(slots=True)
class _Batch:
    """The rows of one step, which several threads take one by one.

    Of a lexer's rows one is taken at a time: llguidance locks it for each, and waits for the lock with the GIL held.
    """

    rows: Sequence[MaskRow]
    bitmask: npt.NDArray[np.int32]
    done: threading.Event = field(default_factory=threading.Event)
    # Guards what follows.
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _waiting: list[MaskRow] = field(init=False)
    _running: dict[int, _Running] = field(default_factory=dict)
    _results: dict[int, RowResult] = field(default_factory=dict)
    _errors: dict[int, QuireError] = field(default_factory=dict)
    _seconds: float = 0.0
    _num_late: int = 0

    def __post_init__(self) -> None:
        self._waiting = list(self.rows)

    def work(self) -> bool:
        """Fills rows until none can be taken; False if this thread was given up meanwhile."""
        masks = np.empty((0, self.bitmask.shape[1]), np.int32)
        while (row := self._next()) is not None:
            if len(masks) < 1 + len(row.drafts):
                masks = np.empty((1 + len(row.drafts), self.bitmask.shape[1]), np.int32)
            try:
                result, error = row.matcher.fill(row.accepted, row.drafts, row.max_forced, masks), row.matcher.error
            except QuireError as raised:
                result, error = RowResult(), raised
            except Exception as raised:
                # A bug in there must not cost the batch the thread that others wait for.
                logger.exception("a mask failed")
                result, error = RowResult(), InternalError(f"a mask failed: {type(raised).__name__}: {raised}")
            if not self._hand_over(row, result, error, masks):
                return False
        return True

    def until_overdue(self, now: float, end: float, row_seconds: float) -> float:
        """In how many seconds the first row is overdue, all of them being so at `end`."""
        with self._lock:
            first = min((row.began for row in self._running.values()), default=now)
            return max(0.0, min(end, first + row_seconds) - now)

    def begin_again(self, now: float) -> None:
        """As if the rows had begun now."""
        with self._lock:
            self._running = {sequence: _Running(row, now) for sequence, (row, _) in self._running.items()}

    def give_up(self, now: float, end: float, row_seconds: float) -> int:
        """Ends rows that are overdue with errors; returns how many threads are still busy with some."""
        with self._lock:
            is_over = now >= end
            late = [row for row in self._running.values() if is_over or now >= row.began + row_seconds]
            for row, _ in late:
                del self._running[row.sequence]
                reason = f"a mask takes longer than {row_seconds:g} s: make it less ambiguous"
                self._errors[row.sequence] = refusal(row.matcher.kind, reason, "can't be followed any further")
            if is_over:
                for row in self._waiting:
                    self._errors[row.sequence] = OverloadedError("other requests' masks take too long: try again later")
                self._waiting.clear()
            self._num_late += len(late)
            self._check_done()
            return len(late)

    def filled(self) -> Filled:
        """What became of the rows; call it when they are done."""
        return Filled(self._results, self._errors, self._num_late, self._seconds)

    def _next(self) -> MaskRow | None:
        with self._lock:
            busy = {running.row.matcher.lexer for running in self._running.values()}
            for place, row in enumerate(self._waiting):
                if row.matcher.lexer not in busy:
                    del self._waiting[place]
                    self._running[row.sequence] = _Running(row, time.monotonic())
                    return row
            # Who has a lexer goes on with its rows.
            return None

    def _hand_over(
        self, row: MaskRow, result: RowResult, error: QuireError | None, masks: npt.NDArray[np.int32]
    ) -> bool:
        with self._lock:
            if self._running.pop(row.sequence, None) is None:
                return False
            self._seconds = max(self._seconds, row.matcher.seconds)
            if error is None:
                num_rows = 1 + result.num_drafts
                self.bitmask[row.row : row.row + num_rows] = masks[:num_rows]
                self._results[row.sequence] = result
            else:
                self._errors[row.sequence] = error
            self._check_done()
            return True

    def _check_done(self) -> None:
        if len(self._results) + len(self._errors) == len(self.rows):
            self.done.set()
