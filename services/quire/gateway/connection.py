"""uvicorn's HTTP connection with the limits that it lacks: on a head's size, on slow senders and on readers that stall.

`http_server` gives the class to uvicorn. What is too large or too slow is answered here, in OpenAI's shape, if nothing
of a request has come to the application yet.

A reader that stalls is cut off without an error event: what it has not read stands before anything that could be said,
in buffers that are full, and to wait until it reads is what the limit ends. It can tell the cut from an end: the body
lacks its last chunk, which HTTP clients report as an incomplete answer, and the stream its [DONE]. The application sees
a client that went away, so its requests are cancelled down to the engine.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from quire.gateway.errors import SlowRequestError
from quire.gateway.openai.errors import error_body
from quire.service.errors import InvalidRequestError, QuireError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Times in seconds. `read_timeout`: for a request to arrive. `write_timeout`: a reader that takes nothing for so
    long, while more is waiting than the buffers hold, is cut off. `stalled` is called then."""

    max_header_bytes: int
    read_timeout: float
    write_timeout: float
    stalled: Callable[[], None]


class Connection(HttpToolsProtocol):
    """One client's connection. Memory for what it has not read is bounded by the transport's buffer (64 KiB)."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._in_head = True
        self._head_bytes = 0
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limit_silence(transport)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_reading_timer()
        self._stop_writing_timer()
        # The kernel's word for a reader that did not read: see _limit_silence.
        if isinstance(exc, TimeoutError):
            self._report_stall()
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
        """The transport's buffer is full."""
        super().pause_writing()
        self._stop_writing_timer()
        self._writing = self.loop.call_later(self._limits.write_timeout, self._stalled)

    def resume_writing(self) -> None:
        """The client has read most of it."""
        super().resume_writing()
        self._stop_writing_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._in_head and self._reading is None:
            # It was answered before all of it was here: what is left must come in time.
            self._expect_request()
        # The rest must go out in time too, or a connection that is to be closed would wait for its reader for ever.
        if self._writing is None and (waiting := self.transport.get_write_buffer_size()):
            self._writing = self.loop.call_later(self._limits.write_timeout, self._check_progress, waiting)

    def timeout_keep_alive_handler(self) -> None:
        """No further request came."""
        if self.transport.get_write_buffer_size():
            self._await_next_request()
        else:
            super().timeout_keep_alive_handler()

    def _check_progress(self, before: int) -> None:
        self._writing = None
        waiting = self.transport.get_write_buffer_size()
        if waiting >= before:
            self._stalled()
        elif waiting:
            self._writing = self.loop.call_later(self._limits.write_timeout, self._check_progress, waiting)

    def _limit_silence(self, transport: asyncio.Transport) -> None:
        """Has the kernel end a connection that takes nothing for too long.

        What TLS has passed on waits out of our sight, and so does the end of an answer when the connection is closed.
        """
        connection: socket.socket | None = transport.get_extra_info("socket")
        if connection is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = int(self._limits.write_timeout * 1000)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def _stalled(self) -> None:
        self._writing = None
        self._report_stall()
        self.transport.abort()

    def _report_stall(self) -> None:
        self._limits.stalled()
        logger.warning(
            "a client has stopped reading: its connection is cut",
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
