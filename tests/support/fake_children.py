"""Programs for a supervisor to keep, and what they said."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from quire.service.supervisor import ChildSpec

DEADLINE = 20.0

_PROGRAM = """
import os, signal, sys, threading

name, kind = sys.argv[1:]

def say(what):
    os.write(1, f"{name} {what}\\n".encode())

def stop(*_):
    say("stops")
    say("is gone")
    os._exit(0)

if kind == "crashes":
    say("crashes")
    os._exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN if kind == "stubborn" else stop)
if kind == "parent":
    if not os.fork():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say(f"child {os.getpid()}")
        threading.Event().wait()
say(f"runs {os.getpid()}")
# The end of standard input is the end of the supervisor.
sys.stdin.buffer.read()
"""


class Said:
    """The lines of all children, in the order in which they came."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._changed = asyncio.Event()

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        self._changed.set()

    async def until(self, enough: Callable[[list[str]], bool]) -> None:
        """Returns when `enough(lines)`. Raises TimeoutError."""
        async with asyncio.timeout(DEADLINE):
            while not enough(self.lines):
                self._changed.clear()
                await self._changed.wait()

    async def running(self, name: str) -> None:
        """Returns when the child has said that it runs."""
        await self.until(lambda lines: any(line.startswith(f"{name} runs") for line in lines))

    def pids(self, name: str) -> list[int]:
        """Of the processes that said so under this name, in order."""
        return [int(line.split()[2]) for line in self.lines if line.startswith((f"{name} runs", f"{name} child"))]


def child(said: Said, name: str, kind: str = "well-behaved") -> ChildSpec:
    """`kind`: well-behaved; crashes (at once, status 3); stubborn (ignores SIGTERM); parent (with a stubborn child)."""
    return ChildSpec(name, (sys.executable, "-S", "-E", "-c", _PROGRAM, name, kind), partial(said.running, name))


def alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has waited for yet does not."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
