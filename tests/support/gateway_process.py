"""`python -m quire.gateway` as a process of its own, its log and its address."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys


class GatewayProcess:
    """In front of one router, which is said to serve the model `tiny`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""
        self._grown = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, router: str, *flags: str) -> GatewayProcess:
        """It listens when this returns."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "quire.gateway", "--routers", router, "--served-model-name", "tiny"),
            *("--port", "0", "--grpc-listen", "127.0.0.1:0", "--grace", "5", *flags),
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        started = cls(process)
        (started.url,) = await started.until_logged(r"gateway listens url=(\S+)")
        return started

    async def until_logged(self, pattern: str, times: int = 1) -> list[str]:
        """What the pattern's group was in the lines that match, once there are as many."""
        async with asyncio.timeout(30):
            while len(found := [m[1] for line in self.lines if (m := re.search(pattern, line))]) < times:
                self._grown.clear()
                await self._grown.wait()
        return found

    async def stop(self) -> int:
        """Its exit status after SIGTERM."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        status = await asyncio.wait_for(self.process.wait(), 20)
        await self._reading
        return status

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.lines.append(line.decode())
            self._grown.set()
