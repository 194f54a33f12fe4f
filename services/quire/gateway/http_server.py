"""uvicorn, started and stopped by us: it listens, and leaves signals and logging to the process it is in."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import ssl
from collections.abc import Generator
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from quire.gateway.connection import Connection, ConnectionLimits
from quire.service.errors import ConfigError

_BACKLOG = 2048
# Longer than load balancers keep idle connections: the side that may send a request should be the one to close.
_KEEP_ALIVE_SECONDS = 75


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class HttpServer:
    """Serves `app` from `start` on. After `begin_stop` requests in flight have `stop_timeout` seconds to end."""

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        stop_timeout: float,
        limits: ConnectionLimits,
        tls: ssl.SSLContext | None = None,
        reuse_port: bool = False,
    ) -> None:
        self._host = host
        self._port = port
        self._scheme = "http" if tls is None else "https"
        self._reuse_port = reuse_port

        def connection(*args: Any, **kwargs: Any) -> Connection:
            return Connection(*args, limits=limits, **kwargs)

        config = uvicorn.Config(
            app,
            # uvicorn only calls it.
            http=cast("type[asyncio.Protocol]", connection),
            ssl_context_factory=None if tls is None else lambda config, default: tls,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(stop_timeout),
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Listens; returns the URL, with the port that was chosen if it was 0. Raises ConfigError."""
        listener = self._listen()
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name="http")
        host, port = listener.getsockname()[:2]
        return f"{self._scheme}://[{host}]:{port}" if ":" in host else f"{self._scheme}://{host}:{port}"

    def begin_stop(self) -> None:
        """Takes no more connections; those that are idle are closed."""
        self._server.should_exit = True

    async def ended(self) -> None:
        """Returns when the server has ended after `begin_stop`, or never ran; raises what made it fail."""
        if self._task is not None:
            await asyncio.shield(self._task)

    def _listen(self) -> socket.socket:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._reuse_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError as error:
            raise ConfigError(
                f"can't listen on --host {self._host} --port {self._port} ({error.strerror or error}): choose an "
                "address of this machine and a free port",
                field="port",
            ) from error
        listener.setblocking(False)
        return listener
