"""One HTTP request and its answer, on bare ASGI: a bounded body in, chunks out, and notice when the client is gone.

Starlette's responses notice a disconnect only while they stream; a generation must stop in every phase.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from quire.gateway.access.deadline import Deadline
from quire.gateway.errors import BodyTooLargeError, SlowRequestError
from quire.service.errors import CancelledRequestError


class Exchange:
    """`started` and `complete` say how much of the answer is out. `headers` makes some that every answer has."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, headers: Callable[[], Mapping[str, str]] = dict
    ) -> None:
        self.request = Request(scope, receive)
        self.started = False
        self.complete = False
        self._headers = headers
        self._receive = receive
        self._send = send

    async def body(self, limit: int, seconds: float) -> bytes:
        """The request's body, whole within `seconds`.

        Raises BodyTooLargeError beyond `limit` bytes, SlowRequestError, CancelledRequestError at a disconnect.
        """
        too_large = BodyTooLargeError(f"the body is larger than {limit} bytes: shorten it, or raise --max-body-bytes")
        if int(self.request.headers.get("content-length", "0")) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                async for chunk in self.request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError as error:
            raise SlowRequestError(f"the body took longer than {seconds:g} s to arrive: send it faster") from error
        except ClientDisconnect as error:
            raise CancelledRequestError("the client went away") from error
        return bytes(body)

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Sends the answer's head."""
        self.started = True
        items = {**headers, **self._headers()}.items()
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in items]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, chunk: bytes) -> None:
        """Sends a part of the answer's body; waits while the client reads more slowly than we write."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def finish(self, chunk: bytes = b"") -> None:
        """Sends the last part."""
        self.complete = True
        await self._send({"type": "http.response.body", "body": chunk, "more_body": False})

    async def while_connected(self, work: Coroutine[None, None, None], deadline: Deadline) -> None:
        """Runs `work`; if the client goes away first, cancels it and raises CancelledRequestError.

        Raises DeadlineExceededError if `deadline` comes first.
        """
        watching = asyncio.ensure_future(self._disconnected())
        working = asyncio.current_task()
        gone = over = False

        def leave(_: asyncio.Task[None]) -> None:
            nonlocal gone
            # The answer's end is told like the connection's.
            if not (over or self.complete) and working is not None:
                gone = working.cancel()

        watching.add_done_callback(leave)
        try:
            async with asyncio.timeout(deadline.left) as limit:
                await work
        except asyncio.CancelledError:
            if not gone or working is None or working.uncancel():
                raise
            raise CancelledRequestError("the client went away") from None
        except TimeoutError:
            if not limit.expired():
                raise
            raise deadline.passed() from None
        finally:
            over = True
            watching.cancel()

    async def _disconnected(self) -> None:
        message: Message = {"type": ""}
        while message["type"] != "http.disconnect":
            message = await self._receive()
