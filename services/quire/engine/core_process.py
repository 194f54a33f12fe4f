"""The core process: loads the model, then steps while there is work.

Started by `core_client.CoreClient` as `python -m quire.engine.core_process FD`, FD being its end of a socket pair. It
ends when the other end is closed, so it never outlives the server.
"""

from __future__ import annotations

import logging
import os
import pickle
import select
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import NoReturn

from quire.engine.config import CoreConfig
from quire.engine.core import EngineCore
from quire.engine.inspection import inspect_core
from quire.engine.messages import (
    LENGTH,
    Cancel,
    Compiling,
    Failed,
    FromCore,
    Inspect,
    Inspected,
    Load,
    Loading,
    StartCore,
    Stepped,
    Submit,
    ToCore,
    encode,
)
from quire.service.errors import ConfigError, InternalError, QuireError
from quire.service.logs import setup_logging
from quire.service.request import Finished, FinishReason, Update

logger = logging.getLogger(__name__)


class ServerGoneError(InternalError):
    """The other end of the socket was closed."""


class ServerLink:
    """The core's end of the socket pair; blocking, or not when there is work to do."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()
        self._sending = threading.Lock()

    def send(self, message: FromCore) -> None:
        """Raises ServerGoneError if nobody listens any more. May be called from any thread."""
        try:
            with self._sending:
                self._socket.sendall(encode(message))
        except OSError as error:
            raise ServerGoneError("the engine's server process is gone") from error

    def receive(self, *, block: bool) -> list[ToCore]:
        """The messages that have arrived; waits for the first one if `block`. Raises ServerGoneError."""
        messages: list[ToCore] = []
        while True:
            while (message := self._next()) is not None:
                messages.append(message)
            ready, _, _ = select.select([self._socket], [], [], None if block and not messages else 0)
            if not ready:
                return messages
            self._buffer += self._receive_some()

    def _receive_some(self) -> bytes:
        try:
            data = self._socket.recv(1 << 20)
        except OSError as error:
            # It was killed with messages from here unread.
            raise ServerGoneError("the engine's server process is gone") from error
        if not data:
            raise ServerGoneError("the engine's server process is gone")
        return data

    def _next(self) -> ToCore | None:
        if len(self._buffer) < LENGTH.size:
            return None
        end = LENGTH.size + LENGTH.unpack_from(self._buffer)[0]
        if len(self._buffer) < end:
            return None
        message: ToCore = pickle.loads(bytes(self._buffer[LENGTH.size : end]))
        del self._buffer[:end]
        return message


class CoreLoop:
    """Feeds the core with what arrives and sends on what each step did."""

    def __init__(self, core: EngineCore, link: ServerLink) -> None:
        self._core = core
        self._link = link
        self._refused: list[Update] = []
        self._may_prepare = True

    def run(self) -> NoReturn:
        """Goes on until the server is gone, which raises ServerGoneError."""
        while True:
            idle = not (self._core.has_work or self._refused)
            messages = self._link.receive(block=idle and not self._may_prepare)
            for message in messages:
                self._handle(message)
            if idle and not messages:
                self._may_prepare = self._core.prepare()
                continue
            updates = self._core.step()
            self._link.send(self._report([*self._refused, *updates]))
            self._refused.clear()

    def _handle(self, message: ToCore) -> None:
        match message:
            case Submit(key, request):
                try:
                    self._core.submit(key, request)
                except QuireError as error:
                    self._refused.append(Update(key, finished=Finished(FinishReason.ERROR, error)))
            case Cancel(key):
                self._core.cancel(key)
            case Inspect(ticket, max_cells, max_sequences):
                inspection = inspect_core(self._core.scheduler, max_cells, max_sequences, time.perf_counter())
                self._link.send(Inspected(ticket, inspection, self._load()))
            case StartCore():
                raise InternalError("the core is running already")

    def _report(self, updates: list[Update]) -> Stepped:
        stored, removed = self._core.scheduler.pool.drain_events()
        return Stepped(tuple(updates), tuple(stored), tuple(removed), self._load())

    def _load(self) -> Load:
        scheduler = self._core.scheduler
        return Load(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            pending_prefill_tokens=scheduler.num_pending_prefill_tokens,
            pages_total=scheduler.pool.num_pages,
            pages_available=scheduler.pool.available,
            pages_cached=scheduler.pool.cached,
            preemptions=scheduler.num_preemptions,
            stats=self._core.stats,
        )


def main(fd: int) -> int:
    """Serves the socket `fd` until its other end closes; 1 if the model could not be loaded or a step failed."""
    link = ServerLink(socket.socket(fileno=fd))
    try:
        start, *early = link.receive(block=True)
        if not isinstance(start, StartCore) or early:
            raise InternalError("the first message to a core must be StartCore, and alone")
        setup_logging(start.name, level=start.log_level, style=start.log_format)
        core = _load(start.config, link)
    except ServerGoneError:
        return 0
    except ConfigError as error:
        link.send(Failed(error.message))
        return 1
    except Exception as error:
        # A driver that fails, a disk that can't be read: the server must say so, not only that this process is gone.
        logger.exception("loading failed")
        link.send(Failed(f"loading failed: {type(error).__name__}: {error}"))
        return 1
    try:
        CoreLoop(core, link).run()
    except ServerGoneError:
        return 0
    except Exception as error:
        # Whatever broke a step has left the batch in a state nobody knows: the server ends every request, this exits.
        logger.exception("a step failed")
        link.send(Failed(f"a step failed: {type(error).__name__}: {error}"))
        return 1
    finally:
        core.close()


def _end_at_once(link: ServerLink, reason: str) -> NoReturn:
    """From another thread: this process's first one may wait for what is lost, and never come back."""
    logger.error("%s", reason)
    with suppress(ServerGoneError):
        link.send(Failed(reason))
    os._exit(1)


def _load(config: CoreConfig, link: ServerLink) -> EngineCore:
    link.send(Loading("starting", 0.0))
    began = time.perf_counter()
    # Importing torch is most of a second's work: the server hears from this process before it.
    from quire.engine.loading import load_core
    from quire.kernels._triton import before_each_compilation

    imported = time.perf_counter() - began
    loaded = load_core(
        config,
        lambda progress, activity: link.send(Loading(activity, progress)),
        on_lost=lambda reason: _end_at_once(link, reason),
    )
    # Minutes, in the first steps of all kinds: each kernel shows that the core does not hang.
    before_each_compilation(lambda: link.send(Compiling()))
    link.send(replace(loaded.ready, start_seconds={"import": imported, **loaded.ready.start_seconds}))
    return loaded.core


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
