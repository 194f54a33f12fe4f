"""Messages between two ranks, over a socket: frames of a length (uint32, little-endian) and a body."""

from __future__ import annotations

import json
import pickle
import select
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from quire.engine.messages import LENGTH
from quire.engine.parallel.messages import Failed, FromFollower, Hello, Loaded, Measured, ToFollower
from quire.service.errors import InternalError, UnavailableError

LOOPBACK = "127.0.0.1"

_KINDS = {kind.__name__: kind for kind in (Hello, Loaded, Measured, Failed)}
# No follower has so much to say: whoever sends more is none.
_MOST_BYTES = 1 << 20
# A host that lost its power says nothing: after so many seconds of silence it is asked, and so many later it is gone.
_SILENT_S, _GONE_S = 10, 20


class LinkLostError(UnavailableError):
    """The other rank closed the connection, or is no rank."""


class Link:
    """One end. Blocking; one thread may send while another receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (("TCP_KEEPIDLE", _SILENT_S), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", _GONE_S // 5)):
                if hasattr(socket, option):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    @property
    def addresses(self) -> tuple[str, str]:
        """This end's host and the other's; both are this one over a socket pair."""
        if self._socket.family == socket.AF_UNIX:
            return LOOPBACK, LOOPBACK
        return _plain(self._socket.getsockname()[0]), _plain(self._socket.getpeername()[0])

    def send(self, frame: bytes) -> None:
        """Raises LinkLostError."""
        try:
            self._socket.sendall(frame)
        except OSError as error:
            raise LinkLostError(f"the connection to another rank is gone ({error})") from error

    def receive_pickle(self) -> ToFollower:
        """Of rank 0. Raises LinkLostError."""
        message: ToFollower = pickle.loads(self._receive(None))
        return message

    def receive_json(self) -> FromFollower:
        """Of a follower. Raises LinkLostError."""
        body = self._receive(_MOST_BYTES)
        try:
            fields: dict[str, Any] = json.loads(body)
            message: FromFollower = _KINDS[fields.pop("kind")](**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LinkLostError("what connected is no rank of this engine") from error
        return message

    def on_hang_up(self, act: Callable[[], None]) -> None:
        """Calls `act` in a thread of its own when the other end is closed, whatever this process waits for."""
        threading.Thread(target=self._watch, args=(act,), daemon=True).start()

    def close(self) -> None:
        """The other end hears of it; so does who receives on this one."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is gone already
        finally:
            self._socket.close()

    def set_timeout(self, seconds: float | None) -> None:
        """How long sending and receiving may take; None: for ever."""
        self._socket.settimeout(seconds)

    def _watch(self, act: Callable[[], None]) -> None:
        # Says nothing of what is there to be read. Linux; elsewhere receiving has to notice.
        hang_up = getattr(select, "POLLRDHUP", 0)
        poll = select.poll()
        poll.register(self._socket, hang_up)
        poll.poll()
        act()

    def _receive(self, most: int | None) -> bytes:
        length = LENGTH.unpack(self._read(LENGTH.size))[0]
        if most is not None and length > most:
            raise LinkLostError("what connected is no rank of this engine")
        return self._read(length)

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                part = self._socket.recv(min(count - len(data), 1 << 20))
            except OSError as error:
                raise LinkLostError(f"the connection to another rank is gone ({error})") from error
            if not part:
                raise LinkLostError("another rank closed the connection")
            data += part
        return bytes(data)


def _plain(address: str) -> str:
    """An IPv4 address as such, where a socket for both kinds has it in IPv6's words."""
    return address.removeprefix("::ffff:")


def pickled(message: ToFollower) -> bytes:
    """The frame of what rank 0 says."""
    return _frame(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def as_json(message: FromFollower) -> bytes:
    """The frame of what a follower says."""
    return _frame(json.dumps({"kind": type(message).__name__, **asdict(message)}).encode())


def _frame(body: bytes) -> bytes:
    if len(body) >= 1 << 32:
        raise InternalError(f"a message of {len(body)} bytes to another rank is too long")
    return LENGTH.pack(len(body)) + body
