"""`quire serve` as a process of its own, and a look at the processes behind it."""

from __future__ import annotations

import os
import random
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Served:
    process: subprocess.Popen[bytes]
    url: str
    grpc_address: str
    log: Path
    seconds_to_ready: float

    def pid_of(self, *words: str) -> int:
        """The one process behind this server whose command line holds all of `words`."""
        return self._find(words)[0]

    def command_of(self, *words: str) -> list[str]:
        """Its command line."""
        return self._find(words)[1]

    def _find(self, words: tuple[str, ...]) -> tuple[int, list[str]]:
        processes = descendants(self.process.pid).items()
        found = [(pid, command) for pid, command in processes if all(word in command for word in words)]
        assert len(found) == 1, f"{words}: {found}"
        return found[0]


def descendants(pid: int) -> dict[int, list[str]]:
    """All processes that `pid` started, directly or not, with their command lines."""
    found: dict[int, list[str]] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found[int(child)] = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            found |= descendants(int(child))
    return found


def free_port() -> int:
    """One of those that the kernel gives nobody by itself, so that it is still free when its service starts."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(first - 20_000, first)
        with suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port


@contextmanager
def serve(
    log: Path,
    *flags: str,
    environment: dict[str, str] | None = None,
    deadline: float = 90.0,
    folder: Path | None = None,
    ca: Path | None = None,
    venv: Path | None = None,
) -> Iterator[Served]:
    """Runs `quire serve` until the block ends, ready when it is entered.

    It runs in `folder`, and speaks TLS with a certificate that `ca` signed, if they are given. With `venv` it is
    `make serve` that runs it, from there.
    """
    port, grpc_port = free_port(), free_port()
    flags = ("--port", str(port), "--grpc-port", str(grpc_port), *flags)
    command = [sys.executable, "-m", "quire.cli.main", "serve", *flags]
    if venv is not None:
        command = ["make", "--no-print-directory", "serve", f"VENV={venv}", f"ARGS={shlex.join(flags)}"]
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}), start_new_session=True, cwd=folder,
        )  # fmt: skip
    try:
        url = f"{'http' if ca is None else 'https'}://127.0.0.1:{port}"
        until_ready(process, url, log, deadline, ca)
        yield Served(process, url, f"127.0.0.1:{grpc_port}", log, time.monotonic() - began)
    finally:
        if process.poll() is None and venv is None:
            process.send_signal(signal.SIGINT)
        elif process.poll() is None:
            # As a terminal does: make itself passes nothing on.
            os.killpg(process.pid, signal.SIGINT)
        process.wait(60)


def until_ready(process: subprocess.Popen[bytes], url: str, log: Path, deadline: float, ca: Path | None = None) -> None:
    """Asks /ready until it says yes."""
    verify = True if ca is None else ssl.create_default_context(cafile=ca)
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"quire serve ended with {process.returncode}:\n{log.read_text()}")
        try:
            if httpx.get(f"{url}/ready", timeout=2.0, verify=verify).status_code == 200:
                return
        except httpx.TransportError:
            pass
        # There is nothing to wait on before the port is open.
        time.sleep(0.05)
    raise TimeoutError(f"not ready within {deadline} s:\n{log.read_text()}")
