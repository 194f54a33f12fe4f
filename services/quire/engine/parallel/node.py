"""A further host of an engine that spans several: the ranks that it has, until one of them ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from contextlib import suppress

from quire.engine.config import EngineConfig
from quire.engine.parallel.processes import CANT_JOIN, FollowerSpec, followers_of
from quire.service.errors import ConfigError, InternalError

logger = logging.getLogger(__name__)


class EngineNode:
    """Starts a process for each rank of this host. They find rank 0, which has their configuration."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config

    async def run(self, stop: asyncio.Event) -> None:
        """Returns when `stop` is set or rank 0 has ended regularly.

        Raises ConfigError if a rank can't join or load its part, InternalError if anything else ends one.
        """
        specs = followers_of(self._config.core)
        core = self._config.core
        where = {
            "ranks": ", ".join(str(spec.rank) for spec in specs),
            "leader": f"{core.master_addr}:{core.master_port}",
        }
        logger.info("this node has ranks of an engine on others", extra=where)
        processes: dict[int, asyncio.subprocess.Process] = {}
        try:
            for spec in specs:
                processes[spec.rank] = await self._start(spec)
            ends = [asyncio.create_task(process.wait()) for process in processes.values()]
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait((*ends, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not stopped.done():
                stopped.cancel()
                for rank, process in processes.items():
                    if process.returncode:
                        error = ConfigError if process.returncode == CANT_JOIN else InternalError
                        raise error(f"rank {rank} {_end_of(process)}: the log above, or node 0's, says why")
                await asyncio.wait(ends)
        finally:
            for process in processes.values():
                if process.returncode is None:
                    with suppress(ProcessLookupError):
                        process.kill()
                await process.wait()

    async def _start(self, spec: FollowerSpec) -> asyncio.subprocess.Process:
        config, core = self._config, self._config.core
        command = spec.command(
            f"--master-addr={core.master_addr}", f"--master-port={core.master_port}",
            f"--timeout={core.rendezvous_timeout_s}", f"--log-level={config.log_level}",
            f"--log-format={config.log_format.value}", "--watch-stdin",
        )  # fmt: skip
        # The pipe's end tells it that this process is gone, however it went.
        return await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE, env=dict(os.environ))


def _end_of(process: asyncio.subprocess.Process) -> str:
    status = process.returncode or 0
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
