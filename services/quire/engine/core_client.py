"""The server's end of the core process: starts it, talks to it, notices when it is gone."""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import suppress

from quire.engine.config import CoreConfig
from quire.engine.messages import LENGTH, FromCore, StartCore, ToCore, encode

# A step of the largest prompt chunk on a slow CPU.
_END_SECONDS = 5.0


class CoreClient:
    """One core process. Iterate over `messages()` until it ends, which it does when the process does."""

    def __init__(self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, start: StartCore) -> CoreClient:
        """Starts the process; it begins to load at once."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "quire.engine.core_process",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                env=_environment(start.config),
                # Ctrl-C goes to the whole foreground group; this process is to end when its server does.
                start_new_session=True,
            )
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 24)
        client = cls(process, reader, writer)
        client.send(start)
        return client

    def send(self, message: ToCore) -> None:
        """Queues a message; one to a core that is gone is dropped, `messages()` tells of its end."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def messages(self) -> AsyncIterator[FromCore]:
        """What the core says, until it ends."""
        try:
            while True:
                length = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))[0]
                message: FromCore = pickle.loads(await self._reader.readexactly(length))
                yield message
        except (asyncio.IncompleteReadError, ConnectionError):
            return

    def kill(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._process.returncode is None:
            self._process.kill()

    async def close(self) -> None:
        """Closes the socket, which ends the process after its step; kills it if that takes too long.

        One that hangs in the kernel, as in a broken driver, does not even end by that and is left behind.
        """
        self._writer.close()
        try:
            await asyncio.wait_for(self._process.wait(), _END_SECONDS)
        except TimeoutError:
            self.kill()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _END_SECONDS)


def _environment(config: CoreConfig) -> dict[str, str]:
    environment = dict(os.environ)
    if config.threads:
        # OpenMP reads this once, when torch is imported.
        environment["OMP_NUM_THREADS"] = str(config.threads)
    if config.interpreted:
        # So does Triton.
        environment["TRITON_INTERPRET"] = "1"
    return environment
