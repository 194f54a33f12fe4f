"""Draft tokens from the sidecar, as far as they are there in time: a step is never worth waiting long for them.

The core's thread calls `begin` and `wait`; one thread beside it keeps a stream to the sidecar open and hears its
answers. What the sidecar was told is known per stream, so one that was started again is told everything once more.
While it is away or hangs there are no drafts, and nothing else. An answer that comes too late for its step is of use to
a later one, if the sequence went on as it says.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import grpc

from quire.engine.sidecar_connection import RETRY_REFUSED_S, RETRY_S, SidecarConnection
from quire.engine.speculation.drafts import DraftRequest, DraftTicket
from quire.v1 import drafting_pb2, drafting_pb2_grpc

logger = logging.getLogger(__name__)

_SERVICE = drafting_pb2.DESCRIPTOR.services_by_name["DraftingService"].full_name

# Who has not answered so many requests gets no more of them until it has.
_IN_FLIGHT = 8
# Weight of the newest answer in how long answers take, and how many times as long is waited for one.
_NEWEST = 0.2
_SLOWER = 3.0
# The service that this sidecar, or its version, does not have.
_REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND)


@dataclass(slots=True)
class _Ticket:
    """Drafts on their way: see quire.engine.speculation.drafts.DraftTicket."""

    requests: Sequence[DraftRequest]
    patience_s: float
    # Of each sequence the newest answer, shared with the others of a stream: what was drafted after how many tokens.
    newest: dict[int, tuple[int, tuple[int, ...]]]
    counts: dict[int, int] = field(init=False)
    asked_at: float = field(default_factory=time.perf_counter)
    done: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.counts = {request.sequence: len(request.token_ids) for request in self.requests}

    def wait(self) -> Mapping[int, tuple[int, ...]]:
        """Those that came in time, and what is left of older ones."""
        self.done.wait(self.patience_s)
        found = {}
        for request in self.requests:
            count, drafts = self.newest.get(request.sequence, (0, ()))
            new = tuple(request.token_ids[count:])
            if len(new) < len(drafts) and drafts[: len(new)] == new:
                found[request.sequence] = drafts[len(new) :]
        return found


class SidecarDrafts:
    """The engine core's DraftSource. An answer is waited for as long as answers usually take, and no longer than
    `patience_s`: if they take longer than that, not at all, until they are faster again."""

    def __init__(self, address: str, patience_s: float = 0.002) -> None:
        self._patience_s = patience_s
        # Guards what follows; the core's thread and the stream's share it.
        self._lock = threading.Lock()
        self._step = 0
        self._stream: _Stream | None = None
        self._usual_s = patience_s / _SLOWER
        self._refusal = ""
        self._connection = SidecarConnection(address, _SERVICE, "sidecar-drafts", self._talk, self._lost)
        self._connection.start()

    def begin(self, requests: Sequence[DraftRequest], released: Sequence[int]) -> DraftTicket:
        """Asks for drafts and returns at once; `released` sequences have ended."""
        with self._lock:
            self._step += 1
            patience_s = 0.0 if self._usual_s > self._patience_s else min(self._patience_s, _SLOWER * self._usual_s)
            ticket = _Ticket(requests, patience_s, {} if self._stream is None else self._stream.newest)
            if self._stream is None or not self._stream.ask(self._step, ticket, released):
                ticket.done.set()
        return ticket

    def close(self) -> None:
        """Ends the stream, which frees the sidecar's side too."""
        self._connection.close()

    def _talk(self, channel: grpc.Channel) -> None:
        """Opens a stream and hears its answers until it ends."""
        stream = _Stream()
        try:
            call = drafting_pb2_grpc.DraftingServiceStub(channel).Draft(stream.requests())
            self._connection.hold(call.cancel)
            with self._lock:
                self._stream, self._refusal = stream, ""
            for response in call:
                self._hear(stream, response)
        finally:
            with self._lock:
                self._stream = None
            stream.end()

    def _hear(self, stream: _Stream, response: drafting_pb2.DraftResponse) -> None:
        with self._lock:
            ticket = stream.answered(response)
            if ticket is None:
                return
            # A sidecar that stood still for seconds says nothing of how long answers take.
            took = min(time.perf_counter() - ticket.asked_at, _SLOWER * self._patience_s)
            self._usual_s += _NEWEST * (took - self._usual_s)
        ticket.done.set()

    def _lost(self, error: Exception) -> float:
        """Says what happened, once; returns how long to wait before the next try."""
        code = error.code() if isinstance(error, grpc.Call) else None
        reason = f"{code}: {error.details()}" if isinstance(error, grpc.Call) else str(error)
        if reason != self._refusal:
            logger.warning("no drafts from the sidecar", extra={"reason": reason})
            self._refusal = reason
        return RETRY_REFUSED_S if code in _REFUSED else RETRY_S


class _Stream:
    """One stream to the sidecar: what goes out, how much of each sequence was told on it, what is not answered yet."""

    def __init__(self) -> None:
        self.unanswered: dict[int, _Ticket] = {}
        self.newest: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._told: dict[int, int] = {}
        self._released: list[int] = []
        self._outgoing: queue.SimpleQueue[drafting_pb2.DraftRequest | None] = queue.SimpleQueue()

    def requests(self) -> Iterator[drafting_pb2.DraftRequest]:
        """What gRPC sends, until `end`."""
        return iter(self._outgoing.get, None)

    def ask(self, step: int, ticket: _Ticket, released: Sequence[int]) -> bool:
        """Asks, and tells what the sidecar does not know yet; False if it has enough to answer."""
        for sequence in released:
            self.newest.pop(sequence, None)
            if self._told.pop(sequence, None) is not None:
                self._released.append(sequence)
        if len(self.unanswered) >= _IN_FLIGHT:
            return False
        message = drafting_pb2.DraftRequest(step=step, released=self._released)
        self._released = []
        for request in ticket.requests:
            row = message.rows.add(sequence=request.sequence, num_tokens=request.num_tokens)
            told = self._told.get(request.sequence)
            if told is None:
                row.start.num_prompt_tokens = request.num_prompt_tokens
                row.start.cache_salt = request.tenant
                told = 0
            row.token_ids.extend(request.token_ids[told:])
            self._told[request.sequence] = len(request.token_ids)
        self.unanswered[step] = ticket
        self._outgoing.put(message)
        return True

    def answered(self, response: drafting_pb2.DraftResponse) -> _Ticket | None:
        """Takes an answer in; returns whose it is."""
        ticket = self.unanswered.pop(response.step, None)
        if ticket is not None:
            for draft in response.drafts:
                # Not those of one that has ended meanwhile: nobody would take them away.
                if draft.sequence in self._told and draft.sequence in ticket.counts:
                    self.newest[draft.sequence] = ticket.counts[draft.sequence], tuple(draft.token_ids)
        return ticket

    def end(self) -> None:
        """Ends the outgoing messages; nobody waits for answers any more."""
        self._outgoing.put(None)
        for ticket in self.unanswered.values():
            ticket.done.set()
