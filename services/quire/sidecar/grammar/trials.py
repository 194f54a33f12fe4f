"""The trial processes and who waits for them: at most `workers` constraints are tried at once."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from quire.service.errors import ConfigError, InternalError, InvalidRequestError, OverloadedError
from quire.service.request import Constraint
from quire.sidecar.config import GrammarLimits

# Beyond the constraint's own time: the fork and the answer, on a busy machine.
_GRACE_S = 5.0


class Trials:
    """Compiles constraints in processes that may be lost: see `trial`."""

    def __init__(self, model: Path, limits: GrammarLimits, workers: int, on_timeout: Callable[[], None]) -> None:
        self._limits = limits
        self._command = (
            *(sys.executable, "-m", "quire.sidecar.grammar.trial"),
            *(str(model), str(limits.compile_seconds), str(limits.compile_mib)),
        )
        self._workers = workers
        self._on_timeout = on_timeout
        self._processes: set[Process] = set()
        # None stands for a process that was not started yet or was lost: who draws it starts one. Running ones first.
        self._idle: asyncio.Queue[Process | None] = asyncio.LifoQueue()

    async def start(self) -> None:
        """Starts the first process and returns when it has read the tokenizer; others start when they are needed."""
        for _ in range(self._workers - 1):
            self._idle.put_nowait(None)
        self._idle.put_nowait(await self._start())

    async def run(self, constraint: Constraint, patience_s: float) -> int:
        """The bytes that compiling `constraint` takes.

        Raises InvalidRequestError if it fails or exceeds the limits, OverloadedError if no process becomes free
        within `patience_s`.
        """
        try:
            process = await asyncio.wait_for(self._idle.get(), patience_s)
        except TimeoutError as error:
            raise OverloadedError("too many grammars are being compiled: try again later") from error
        answered = False
        try:
            if process is None or process.returncode is not None:
                process = await self._start()
            reply = await self._ask(process, constraint)
            answered = True
        finally:
            # Without its answer it is of no use: that may still come, to the next question.
            if process is not None and not answered:
                self._kill(process)
            self._idle.put_nowait(process if answered else None)
        if "refused" in reply:
            if reply.get("timed_out"):
                self._on_timeout()
            raise InvalidRequestError(reply["refused"], field=f"constraint.{constraint.kind.value}")
        return int(reply["bytes"])

    async def close(self) -> None:
        """Ends the processes, whatever they do."""
        for process in list(self._processes):
            self._kill(process)
            await process.wait()

    async def _start(self) -> Process:
        self._processes = {process for process in self._processes if process.returncode is None}
        process = await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE)
        self._processes.add(process)
        if await self._read(process) is None:
            raise ConfigError("the process that tries grammars ended at its start: its message stands above")
        return process

    async def _ask(self, process: Process, constraint: Constraint) -> dict[str, Any]:
        question = json.dumps({"kind": constraint.kind.value, "source": constraint.source})
        if process.stdin is None:
            raise InternalError("the process that tries grammars has no standard input")
        process.stdin.write(question.encode() + b"\n")
        with suppress(BrokenPipeError, ConnectionResetError):
            await process.stdin.drain()
        reply = await asyncio.wait_for(self._read(process), self._limits.compile_seconds + _GRACE_S)
        if reply is None:
            raise InternalError("the process that tries grammars ended: send the request again")
        return reply

    async def _read(self, process: Process) -> dict[str, Any] | None:
        line = await process.stdout.readline() if process.stdout is not None else b""
        return dict(json.loads(line)) if line else None

    def _kill(self, process: Process) -> None:
        with suppress(ProcessLookupError):
            process.kill()
