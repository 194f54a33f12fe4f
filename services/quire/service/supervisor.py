"""Keeps a set of processes alive: starts them together, starts again what dies, stops them in order.

`quire serve` runs the services under it, a gateway its workers. A child lives in a session of its own, so Ctrl-C in the
terminal reaches only the supervisor, and holds the end of a pipe as standard input: see quire.service.lifecycle.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

from quire.service.errors import ConfigError, QuireError
from quire.service.lifecycle import SUPERVISED

logger = logging.getLogger(__name__)


class ChildDiedError(QuireError):
    """A child ended before everything was ready."""


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A process to keep alive. `ready` returns once the process does its work; it may be called again."""

    name: str
    command: tuple[str, ...]
    ready: Callable[[], Coroutine[Any, Any, None]]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timing:
    """In seconds. A child that dies is started again after `first_delay`, which doubles up to `last_delay` while it
    dies within `healthy` of its start. A child that was told to stop is killed after `stop`."""

    first_delay: float = 0.5
    last_delay: float = 30.0
    healthy: float = 60.0
    stop: float = 8.0

    def delay_after(self, delay: float, lived: float) -> float:
        """The next delay after one of `delay` (0: none yet) and a life of `lived`."""
        return min(2 * delay, self.last_delay) if delay and lived < self.healthy else self.first_delay


class Supervisor:
    """Runs `stages` of children: all start at once, and stop stage by stage, the first stage first.

    `output` is the file descriptor that they write to; None: the supervisor's own standard output and error. Use it as
    an asynchronous context manager: however the block ends, no child is left.
    """

    def __init__(
        self, stages: Sequence[Sequence[ChildSpec]], *, output: int | None = None, timing: Timing | None = None
    ) -> None:
        timing = timing or Timing()
        self._stages = [[_Child(spec, output, timing) for spec in stage] for stage in stages]
        self._timing = timing
        self._kill = asyncio.Event()

    async def __aenter__(self) -> Supervisor:
        try:
            for child in self._children:
                await child.start()
        except BaseException:
            self.kill()
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        # A cancellation from outside must not leave children behind.
        await asyncio.shield(self._stop())

    async def until_ready(self) -> None:
        """Returns once every child is ready. Raises ChildDiedError if one ends before."""
        ready = [asyncio.create_task(child.spec.ready()) for child in self._children]
        deaths = [asyncio.create_task(child.died_early()) for child in self._children]
        pending: set[asyncio.Task[Any]] = {*ready, *deaths}
        try:
            while not all(task.done() for task in ready):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in (*ready, *deaths):
                task.cancel()
            await asyncio.gather(*ready, *deaths, return_exceptions=True)

    async def keep(self) -> NoReturn:
        """Starts again whatever dies, until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for child in self._children:
                group.create_task(child.keep())
        raise RuntimeError("children are kept for ever")

    def kill(self) -> None:
        """Makes the end, which may be under way, an end at once."""
        self._kill.set()
        for child in self._children:
            child.signal(signal.SIGKILL)

    @property
    def _children(self) -> list[_Child]:
        return [child for stage in self._stages for child in stage]

    async def _stop(self) -> None:
        for stage in self._stages:
            for child in stage:
                child.signal(signal.SIGTERM)
            ended = asyncio.gather(*(child.ended() for child in stage))
            killed = asyncio.create_task(self._kill.wait())
            await asyncio.wait((ended, killed), timeout=self._timing.stop, return_when=asyncio.FIRST_COMPLETED)
            killed.cancel()
            for child in stage:
                if child.alive:
                    if not self._kill.is_set():
                        logger.warning("%s does not stop: killed", child.spec.name)
                    child.signal(signal.SIGKILL)
            await ended


class _Child:
    """One process after the other under one name."""

    def __init__(self, spec: ChildSpec, output: int | None, timing: Timing) -> None:
        self.spec = spec
        self._output = output
        self._timing = timing
        self._process: asyncio.subprocess.Process | None = None
        # Whether nothing of the process's session is left.
        self._gone = True
        self._began = 0.0

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Raises ConfigError if the program can't be run."""
        self._began = time.monotonic()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.spec.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=self._output,
                stderr=self._output,
                env={**os.environ, **self.spec.environment, SUPERVISED: "1"},
                start_new_session=True,
            )
            self._gone = False
        except OSError as error:
            raise ConfigError(f"can't run {self.spec.command[0]} for {self.spec.name}: {error.strerror}") from error

    async def ended(self) -> None:
        """Returns once there is no process. What it started and left behind is killed."""
        if self._process is None:
            return
        await self._process.wait()
        # Once, and at once: later the number may be another's.
        if not self._gone:
            self._gone = True
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def died_early(self) -> None:
        """Raises ChildDiedError when the process ends."""
        await self.ended()
        raise ChildDiedError(f"{self.spec.name} {self._end()} before it was ready: the log above says why")

    async def keep(self) -> None:
        """Starts the process again each time that it has ended."""
        delay = 0.0
        while True:
            await self.ended()
            delay = self._timing.delay_after(delay, time.monotonic() - self._began)
            logger.warning("%s %s: it is started again in %g s", self.spec.name, self._end(), delay)
            await asyncio.sleep(delay)
            try:
                await self.start()
            except ConfigError as error:
                logger.error("%s", error.message)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process, or SIGKILL to all of its session."""
        if self._process is None or self._process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            if number is signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    def _end(self) -> str:
        code = self._process.returncode if self._process is not None else None
        if code is not None and code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with status {code}"
