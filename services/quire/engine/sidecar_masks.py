"""Token masks from the sidecar: a stream of small messages, masks in memory that both sides map.

The core's thread calls `begin` and `wait`; one thread beside it keeps a stream to the sidecar open and hears its
answers. What the sidecar was told is known per stream, so when the sidecar is started again everything that is still
asked for is told again: the core never notices, unless the deadline passes first.
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import numpy.typing as npt

from quire.engine.masks import DraftResult, MaskBatch, MaskRequest, MaskTicket, first_rows
from quire.engine.sidecar_connection import RETRY_REFUSED_S, RETRY_S, SidecarConnection
from quire.service.errors import InternalError, QuireError, UnavailableError
from quire.service.wire import constraint_to_proto, error_from_proto
from quire.v1 import grammar_pb2, grammar_pb2_grpc

logger = logging.getLogger(__name__)

_Masks = npt.NDArray[np.uint32]

# The file holds a batch's rows twice: a second step may be asked for while the first one's masks are read.
_IN_FLIGHT = 2
# While nobody is there, who asks for masks waits so long for a new sidecar, and no longer.
_LOST_S = 0.01
# The step of a message that only releases.
_NOBODY_WAITS = 0
_SERVICE = grammar_pb2.DESCRIPTOR.services_by_name["GrammarService"].full_name
_SHARED_MEMORY = Path("/dev/shm")
# An errored row: its token is dropped, but it must still be possible to draw one.
_ALL_TOKENS = np.uint32(0xFFFFFFFF)


class _Row(NamedTuple):
    """Rows as they were asked for when there were so many outputs, the first of them in place `first` of the step's."""

    request: MaskRequest
    num_outputs: int
    first: int

    @property
    def places(self) -> slice:
        return slice(self.first, self.first + 1 + len(self.request.drafts))


@dataclass(slots=True)
class _Ticket:
    """Masks on their way: see quire.engine.masks.MaskTicket. `masks` stays None if they never came."""

    step: int
    rows: list[_Row]
    released: list[int]
    deadline: float
    words: int
    done: threading.Event = field(default_factory=threading.Event)
    # Nobody is there to fill them, or they are done: no use in waiting now.
    settled: threading.Event = field(default_factory=threading.Event)
    masks: _Masks | None = None
    errors: dict[int, QuireError] = field(default_factory=dict)
    results: dict[int, DraftResult] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return self.rows[-1].places.stop if self.rows else 0

    def arrives(self, seconds: float) -> bool:
        """See MaskTicket."""
        seconds = min(seconds, max(0.0, self.deadline - time.monotonic()))
        self.settled.wait(seconds)
        return self.done.wait(min(seconds, _LOST_S)) or time.monotonic() >= self.deadline

    def finish(self) -> None:
        """They are there, or never will be."""
        self.done.set()
        self.settled.set()

    def wait(self) -> MaskBatch:
        """Blocks until the rows are filled, or until the deadline; then all rows are errors."""
        in_time = self.done.wait(max(0.0, self.deadline - time.monotonic()))
        if in_time and self.masks is not None:
            for row in self.rows if self.errors else ():
                if row.request.sequence in self.errors:
                    self.masks[row.places] = _ALL_TOKENS
            return MaskBatch(self.masks, self.errors, self.results)
        errors = self.errors
        if not in_time:
            errors = self._all(UnavailableError("the grammar sidecar does not answer: send the request again"))
        # Memory of its own: an answer that comes too late must not change rows that are being read.
        return MaskBatch(np.full((self.num_rows, self.words), _ALL_TOKENS, np.uint32), errors)

    def fail(self, error: QuireError) -> None:
        """Ends the wait with `error` for every row."""
        self.errors = self._all(error)
        self.finish()

    def _all(self, error: QuireError) -> dict[int, QuireError]:
        return {row.request.sequence: error for row in self.rows}


class SidecarMasks:
    """The engine core's MaskSource. Up to two steps may be asked for before the first is waited for.

    A batch's rows stay valid until the second `begin` after its own. `deadline_s` counts from `begin`. The shared
    file is made in `folder`, which the sidecar must see under the same path; by default the machine's shared memory.
    """

    def __init__(
        self, address: str, vocab_size: int, max_rows: int, deadline_s: float, folder: Path | None = None
    ) -> None:
        self._vocab_size = vocab_size
        self._max_rows = max_rows
        self._deadline_s = deadline_s
        self._folder = folder or (_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir()))
        # Guards what follows; the core's thread and the stream's share it.
        self._lock = threading.Lock()
        self._step = 0
        self._pending: list[_Ticket] = []
        self._stream: _Stream | None = None
        self._connection = SidecarConnection(address, _SERVICE, "sidecar-masks", self._talk, self._lost)
        self._connection.start()

    def begin(self, requests: Sequence[MaskRequest], released: Sequence[int]) -> MaskTicket:
        """Asks for the requests' rows to be filled and returns at once. Raises InternalError on misuse."""
        now = time.monotonic()
        rows = [
            _Row(request, request.num_outputs, first)
            for request, first in zip(requests, first_rows(requests), strict=True)
        ]
        if rows and rows[-1].places.stop > self._max_rows:
            raise InternalError(
                f"{rows[-1].places.stop} mask rows were asked for: the shared file has {self._max_rows}"
            )
        with self._lock:
            ticket = _Ticket(
                self._step + 1 if rows else _NOBODY_WAITS,
                rows,
                list(released),
                now + self._deadline_s,
                -(-self._vocab_size // 32),
            )
            self._pending = [pending for pending in self._pending if pending.deadline > now]
            if rows:
                if len(self._pending) == _IN_FLIGHT:
                    raise InternalError(f"the masks of {_IN_FLIGHT} steps are in flight: wait for the first one's")
                self._step += 1
                self._pending.append(ticket)
            else:
                ticket.masks = np.empty((0, ticket.words), np.uint32)
                ticket.finish()
            if self._stream is not None:
                self._stream.ask(ticket)
            else:
                ticket.settled.set()
        return ticket

    def close(self) -> None:
        """Ends the stream, which frees the sidecar's side too; what is still waited for ends in an error."""
        self._connection.close()
        self._fail_all(UnavailableError("the engine is shutting down: send the request again"))

    def _talk(self, channel: grpc.Channel) -> None:
        """Opens a stream and hears its answers until it ends."""
        stream = _Stream(self._folder, self._max_rows, self._vocab_size)
        try:
            call = grammar_pb2_grpc.GrammarServiceStub(channel).Step(stream.requests())
            self._connection.hold(call.cancel)
            for response in call:
                self._hear(stream, response)
        finally:
            with self._lock:
                self._stream = None
                for ticket in self._pending:
                    ticket.settled.set()
            stream.end()

    def _hear(self, stream: _Stream, response: grammar_pb2.StepResponse) -> None:
        if response.WhichOneof("response") == "opened":
            stream.unlink()
            with self._lock:
                self._stream = stream
                for ticket in self._pending:
                    stream.ask(ticket)
            return
        filled = response.filled
        errors = {row.sequence: error_from_proto(row.error) for row in filled.errors}
        with self._lock:
            stream.forget(errors)
            answered = [ticket for ticket in self._pending if ticket.step == filled.step]
            self._pending = [ticket for ticket in self._pending if ticket.step != filled.step]
        results = {row.sequence: DraftResult(row.num_drafts, tuple(row.forced)) for row in filled.results}
        for ticket in answered:
            ticket.masks, ticket.errors, ticket.results = stream.rows_of(ticket), errors, results
            ticket.finish()

    def _lost(self, error: Exception) -> float:
        """Says what happened; returns how long to wait before the next try."""
        if isinstance(error, grpc.Call) and error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
            logger.warning("lost the sidecar", extra={"code": str(error.code()), "details": error.details()})
            return RETRY_S
        reason = error.details() if isinstance(error, grpc.Call) else str(error)
        logger.error("can't share masks with the sidecar", extra={"reason": reason})
        self._fail_all(InternalError(f"the engine can't share masks with its grammar sidecar: {reason}"))
        return RETRY_REFUSED_S

    def _fail_all(self, error: QuireError) -> None:
        with self._lock:
            pending, self._pending = self._pending, []
        for ticket in pending:
            ticket.fail(error)


class _Stream:
    """One stream to the sidecar: its shared file, what goes out, and how much of each sequence was told on it."""

    def __init__(self, folder: Path, max_rows: int, vocab_size: int) -> None:
        self._max_rows = max_rows
        rows, words = _IN_FLIGHT * max_rows, -(-vocab_size // 32)
        descriptor, name = tempfile.mkstemp(prefix="quire-masks-", dir=folder)
        self._path = Path(name)
        try:
            # Reserves the memory: a full file system is an error here instead of a signal later.
            os.posix_fallocate(descriptor, 0, rows * words * 4)
            memory = mmap.mmap(descriptor, rows * words * 4)
        except OSError:
            self.unlink()
            raise
        finally:
            os.close(descriptor)
        self._masks: _Masks = np.frombuffer(memory, dtype="<u4").reshape(rows, words)
        self._told: dict[int, int] = {}
        self._outgoing: queue.SimpleQueue[grammar_pb2.StepRequest | None] = queue.SimpleQueue()
        opening = grammar_pb2.OpenMasks(path=name, rows=rows, vocab_size=vocab_size)
        self._outgoing.put(grammar_pb2.StepRequest(open=opening))

    def requests(self) -> Iterator[grammar_pb2.StepRequest]:
        """What gRPC sends, until `end`."""
        while (request := self._outgoing.get()) is not None:
            yield request

    def ask(self, ticket: _Ticket) -> None:
        """Asks for a ticket's rows, and tells what the sidecar does not know yet."""
        fill, told = grammar_pb2.FillMasks(step=ticket.step), self._told
        fill.released.extend(sequence for sequence in ticket.released if told.pop(sequence, None) is not None)
        first, places, sequences, tokens = self._first_row(ticket), [], [], []
        for row in ticket.rows:
            request, sequence = row.request, row.request.sequence
            if told.get(sequence) == row.num_outputs - 1 and not (request.drafts or request.max_forced):
                sequences.append(sequence)
                places.append(first + row.first)
                tokens.append(request.outputs(row.num_outputs - 1)[0])
            else:
                self._ask_row(fill, row, first + row.first)
            told[sequence] = row.num_outputs
        if sequences:
            fill.next.MergeFrom(grammar_pb2.NextMasks(sequences=sequences, rows=places, accepted=tokens))
        if ticket.rows or fill.released:
            self._outgoing.put(grammar_pb2.StepRequest(fill=fill))

    def _ask_row(self, fill: grammar_pb2.FillMasks, row: _Row, place: int) -> None:
        request = row.request
        message = fill.rows.add(
            sequence=request.sequence, row=place, drafts=request.drafts, max_forced=request.max_forced
        )
        told = self._told.get(request.sequence)
        if told is None or told > row.num_outputs:
            message.constraint.CopyFrom(constraint_to_proto(request.constraint))
            message.cache_salt = request.tenant
            told = 0
        message.accepted.extend(request.outputs(told, row.num_outputs))

    def rows_of(self, ticket: _Ticket) -> _Masks:
        """The shared rows that `ticket` asked for."""
        first = self._first_row(ticket)
        return self._masks[first : first + ticket.num_rows]

    def forget(self, sequences: Iterable[int]) -> None:
        """The sidecar dropped these: asked for again, they start over."""
        for sequence in sequences:
            self._told.pop(sequence, None)

    def unlink(self) -> None:
        """Takes the file's name away; the memory lasts until both sides let go of it."""
        self._path.unlink(missing_ok=True)

    def end(self) -> None:
        """Ends the outgoing messages."""
        self._outgoing.put(None)
        self.unlink()

    def _first_row(self, ticket: _Ticket) -> int:
        return ticket.step % _IN_FLIGHT * self._max_rows
