"""The rows of one step that masks are wanted for, and what became of them.

`quire.sidecar.grammar.fill` has the threads that take them from here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from quire.service.errors import InternalError, OverloadedError, QuireError
from quire.sidecar.grammar.compile import refusal
from quire.sidecar.grammar.matcher import RowResult, SequenceMatcher

logger = logging.getLogger(__name__)


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
    """What became of a batch's rows, by sequence: one of the two. `seconds` is the CPU time of the slowest that was not
    filled together with others."""

    results: dict[int, RowResult]
    errors: dict[int, QuireError]
    num_late: int = 0
    seconds: float = 0.0


class _Together(Enum):
    """Where the rows are that are filled together."""

    WAITING = auto()
    RUNNING = auto()
    DONE = auto()
    GIVEN_UP = auto()


class _Running(NamedTuple):
    row: MaskRow
    began: float


@dataclass(slots=True)
class Batch:
    """The rows of one step: those that one thread fills `together`, and then the others, which several take one by one.

    Of a lexer's rows one is taken at a time: llguidance locks it for each, and waits for the lock with the GIL held.
    """

    rows: Sequence[MaskRow]
    bitmask: npt.NDArray[np.int32]
    together: Sequence[MaskRow]
    fill_together: Callable[[Sequence[MaskRow], npt.NDArray[np.int32]], list[RowResult]]
    # Has other threads come for the batch. It is told which, as one that held itself would hold on to its memory.
    call_others: Callable[[Batch], None]
    # Memory of steps that are done: new memory would take its time to be mapped, page by page.
    buffers: list[npt.NDArray[np.int32]]
    done: threading.Event = field(default_factory=threading.Event)
    # Guards what follows.
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _waiting: list[MaskRow] = field(init=False)
    _stage: _Together = field(init=False)
    _running: dict[int, _Running] = field(default_factory=dict)
    _results: dict[int, RowResult] = field(default_factory=dict)
    _errors: dict[int, QuireError] = field(default_factory=dict)
    _seconds: float = 0.0
    _num_late: int = 0

    def __post_init__(self) -> None:
        self._waiting = list(self.rows)
        self._stage = _Together.WAITING if self.together else _Together.DONE

    def work(self) -> bool:
        """Fills rows until none can be taken; False if this thread was given up meanwhile."""
        if self._takes_together() and not self._work_together():
            return False
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

    def _takes_together(self) -> bool:
        with self._lock:
            takes = self._stage is _Together.WAITING
            if takes:
                self._stage = _Together.RUNNING
            return takes

    def _work_together(self) -> bool:
        rows, buffer = self.together, self.bitmask[:0]
        with suppress(IndexError):
            buffer = self.buffers.pop()
        if len(buffer) < len(rows) or buffer.shape[1] != self.bitmask.shape[1]:
            buffer = np.empty((len(rows), self.bitmask.shape[1]), np.int32)
        masks = buffer[: len(rows)]
        try:
            results = self.fill_together(rows, masks)
            errors = {row.sequence: row.matcher.error for row in rows if row.matcher.error is not None}
        except Exception as raised:
            logger.exception("masks failed")
            failed = InternalError(f"masks failed: {type(raised).__name__}: {raised}")
            results, errors = [], {row.sequence: failed for row in rows}
        with self._lock:
            if self._stage is _Together.GIVEN_UP:
                return False
            self._stage = _Together.DONE
            self._errors.update(errors)
            if errors:
                done = [index for index, row in enumerate(rows) if row.sequence not in errors]
                rows, results, masks = [rows[index] for index in done], [results[index] for index in done], masks[done]
            self.bitmask[[row.row for row in rows]] = masks
            self._results.update(zip([row.sequence for row in rows], results, strict=True))
            self._check_done()
        self.buffers.append(buffer)
        self.call_others(self)
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
            num_busy = len(late)
            self._num_late += num_busy
            for row, _ in late:
                del self._running[row.sequence]
                reason = f"a mask takes longer than {row_seconds:g} s: make it less ambiguous"
                self._errors[row.sequence] = refusal(row.matcher.kind, reason, "can't be followed any further")
            if is_over:
                for row in self._waiting:
                    self._errors[row.sequence] = OverloadedError("other requests' masks take too long: try again later")
                self._waiting.clear()
                if self._stage is not _Together.DONE:
                    # Nobody knows which of them it is.
                    num_busy += self._stage is _Together.RUNNING
                    self._num_late += len(self.together)
                    self._stage = _Together.GIVEN_UP
                    for row in self.together:
                        self._errors[row.sequence] = OverloadedError("masks take too long: try again later")
            self._check_done()
            return num_busy

    def filled(self) -> Filled:
        """What became of the rows; call it when they are done."""
        return Filled(self._results, self._errors, self._num_late, self._seconds)

    def _next(self) -> MaskRow | None:
        with self._lock:
            if self._stage is not _Together.DONE:
                return None
            busy = {running.row.matcher.lexer for running in self._running.values()}
            for place, row in enumerate(self._waiting):
                if row.matcher.lexer not in busy:
                    del self._waiting[place]
                    self._running[row.sequence] = _Running(row, time.monotonic())
                    return row
            # Who has a lexer goes on with its rows, and who fills some together with all.
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
        if len(self._results) + len(self._errors) == len(self.rows) + len(self.together):
            self.done.set()
