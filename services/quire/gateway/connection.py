"""uvicorn's HTTP connection with the limits that it lacks: on a head's size, on slow senders and on readers that stall.

`http_server` gives the class to uvicorn. What is too large or too slow is answered here, in OpenAI's shape, if nothing
of a request has come to the application yet.

A stream whose reader stalls ends with an error event behind what waits for that reader. The application sees a client
that went away, so its requests are cancelled down to the engine, and what it had not written is dropped. The reader has
the same time once more to read what is there; then the connection is cut. A whole answer has no place for an event: it
is cut at once, which its length tells.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from quire.gateway.errors import SlowRequestError, stalled_reader
from quire.gateway.gathered import Gathered
from quire.gateway.openai.errors import error_body
from quire.gateway.openai.responses import error_event
from quire.service.errors import InvalidRequestError, QuireError

# What waits here for a reader before the writer waits too, and in the kernel without being on its way, in bytes. Small,
# so that a reader that stalls is noticed early: the kernel alone would take megabytes.
_HIGH_WATER = 4096
_UNSENT = 16384

# In write timeouts: until it is noticed here that a reader stalls, told, and given up.
_KERNEL_PATIENCE = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Times in seconds. `read_timeout`: for a request to arrive. `write_timeout`: for a reader to take what waits for
    it; `stalled` is called when one does not."""

    max_header_bytes: int
    read_timeout: float
    write_timeout: float
    stalled: Callable[[], None]


class Connection(HttpToolsProtocol):
    """One client's connection. What a stream's reader has not read takes the transport's buffer and one event more."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._in_head = True
        self._head_bytes = 0
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._lingering: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._gathered = Gathered(transport, self.loop)
        super().connection_made(cast("asyncio.Transport", self._gathered))
        self._limit_unread(transport)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_reading_timer()
        self._stop_writing_timer()
        # The kernel's word for a reader that did not read: see _limit_unread.
        if isinstance(exc, TimeoutError) and self._lingering is None:
            self._report_stall()
        if self._lingering is not None:
            self._lingering.cancel()
        super().connection_lost(exc)

    # Reading

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            if self._reading is None:
                self._expect_request()
            head = data[: self._limits.max_header_bytes - self._head_bytes]
            data = data[len(head) :]
            self._head_bytes += len(head)
            super().data_received(head)
            if self._in_head and data:
                self._refuse(
                    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                    InvalidRequestError(
                        f"the request's head is larger than {self._limits.max_header_bytes} bytes: send fewer or "
                        "shorter headers, or raise --max-header-bytes"
                    ),
                )
        if data and not self.transport.is_closing():
            super().data_received(data)

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_reading_timer()
        self._in_head = True
        self._head_bytes = 0
        super().on_message_complete()
        if self.cycle.response_complete:
            # It was answered before all of it was here: only now the wait for the next request begins.
            self._await_next_request()

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, InvalidRequestError("this is not HTTP/1.1: send a valid request"))

    def _await_next_request(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _expect_request(self) -> None:
        self._reading = self.loop.call_later(self._limits.read_timeout, self._read_timed_out)

    def _read_timed_out(self) -> None:
        self._reading = None
        if self._in_head and self._head_bytes and not self.transport.is_closing():
            seconds = self._limits.read_timeout
            error = SlowRequestError(f"the request's head took longer than {seconds:g} s to arrive: send it faster")
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, error)
        elif self._in_head or self.cycle.response_complete:
            self.transport.close()

    def _refuse(self, status: HTTPStatus, error: QuireError) -> None:
        if self.transport.is_closing():
            return
        body = error_body(error)
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _stop_reading_timer(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    # Writing

    def pause_writing(self) -> None:
        """The transport's buffer is full: nothing is written until the client has read it."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """The client has read it."""
        super().resume_writing()
        self._stop_writing_timer()

    def on_response_complete(self) -> None:
        self._gathered.flush()
        super().on_response_complete()
        if not self._in_head and self._reading is None:
            # It was answered before all of it was here: what is left must come in time.
            self._expect_request()
        # The rest must go out in time too, or a connection that is to be closed would wait for its reader for ever.
        if self._writing is None:
            self._expect_reading()

    def timeout_keep_alive_handler(self) -> None:
        """No further request came."""
        if self.transport.get_write_buffer_size():
            self._await_next_request()
        else:
            super().timeout_keep_alive_handler()

    def _expect_reading(self) -> None:
        self._stop_writing_timer()
        if waiting := self.transport.get_write_buffer_size():
            due, taken = self.loop.time() + self._limits.write_timeout, self._gathered.written - waiting
            self._writing = self.loop.call_at(due, self._check_progress, due, taken + min(waiting, _HIGH_WATER))

    def _check_progress(self, due: float, expected: int) -> None:
        self._writing = None
        # What waited at the beginning must be gone by now, and of a long answer more than drops.
        if self._gathered.written - self.transport.get_write_buffer_size() >= expected or self._stood_still(due):
            self._expect_reading()
        else:
            self._stalled()

    def _limit_unread(self, transport: asyncio.Transport) -> None:
        """Bounds what waits for the reader, and has the kernel end a connection that takes nothing for too long.

        What TLS has passed on waits out of our sight, and so does the end of an answer when the connection is closed.
        """
        transport.set_write_buffer_limits(high=_HIGH_WATER, low=0)
        connection: socket.socket | None = transport.get_extra_info("socket")
        if connection is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = int(_KERNEL_PATIENCE * self._limits.write_timeout * 1000)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)

    def _stalled(self) -> None:
        self._report_stall()
        if self.cycle.chunked_encoding and not self.cycle.response_complete:
            self._end_stream()
        else:
            self.transport.abort()

    def _end_stream(self) -> None:
        # What uvicorn itself does when a client has gone: the application's next write returns at once, unwritten.
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        self.flow.resume_writing()
        event = error_event(stalled_reader(self._limits.write_timeout))
        self.transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event))
        self.transport.close()
        self._linger()

    def _linger(self) -> None:
        due = self.loop.time() + self._limits.write_timeout
        self._lingering = self.loop.call_at(due, self._lingered, due)

    def _lingered(self, due: float) -> None:
        if self._stood_still(due):
            self._linger()
        else:
            self.transport.abort()

    def _stood_still(self, due: float) -> bool:
        """Whether this process did, since it comes so late to what was due: readers have had no time either."""
        return self.loop.time() - due > self._limits.write_timeout / 4

    def _report_stall(self) -> None:
        self._limits.stalled()
        logger.warning(
            "a client has stopped reading: its answer ends",
            extra={
                "request_id": (self.scope or {}).get("quire.request_id"),
                "seconds": self._limits.write_timeout,
                "unread_bytes": self.transport.get_write_buffer_size(),
            },
        )

    def _stop_writing_timer(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
