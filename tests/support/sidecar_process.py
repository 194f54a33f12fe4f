"""A sidecar process, and a peer that steps through it as an engine core does."""

from __future__ import annotations

import json
import mmap
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import grpc
import numpy as np
import numpy.typing as npt
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire.service.errors import QuireError
from quire.service.request import Constraint, ConstraintKind
from quire.service.wire import constraint_to_proto, error_from_proto
from quire.v1 import grammar_pb2, grammar_pb2_grpc

DEADLINE = 60.0


def eventually(condition: Callable[[], bool]) -> None:
    """Waits until another process has done what no message tells of."""
    never, end = threading.Event(), time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        never.wait(0.01)


def children(pid: int) -> list[int]:
    """The processes that a process's main thread has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def json_schema(schema: object) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema))


def regex(source: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, source)


def lark(source: str) -> Constraint:
    return Constraint(ConstraintKind.LARK, source)


class SidecarProcess:
    """`python -m quire.sidecar` on a unix socket in `folder`; a context manager that leaves nothing behind."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.address = f"unix:{folder / 'sidecar.sock'}"
        self._flags = flags
        self.process = self._start()

    def __enter__(self) -> SidecarProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)

    @property
    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.address)

    def wait_until_serving(self) -> None:
        with self.channel as channel:
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="quire.v1.GrammarService")
            for answer in health.Watch(request, timeout=DEADLINE, wait_for_ready=True):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return

    def restart(self) -> None:
        """Kill -9, and another on the same address."""
        self.kill()
        self.process = self._start()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE)

    def compile(self, constraint: Constraint, tenant: str = "", **options: object) -> grammar_pb2.CompileResponse:
        with self.channel as channel:
            request = grammar_pb2.CompileRequest(constraint=constraint_to_proto(constraint), cache_salt=tenant)
            stub = grammar_pb2_grpc.GrammarServiceStub(channel)
            return stub.Compile(request, timeout=DEADLINE, wait_for_ready=True, **options)

    def children(self) -> list[int]:
        return children(self.process.pid)

    def maps(self, path: str) -> bool:
        """Whether the process maps the file that once was at `path`."""
        return path in self._proc("maps")

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self.process.pid}/{name}").read_text()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "quire.sidecar", "--listen", self.address, "--log-level", "warning"]
        return subprocess.Popen([*command, *self._flags])


@dataclass(frozen=True)
class Row:
    """Rows to be filled; the first one's number follows the last of those before it in the step."""

    sequence: int
    constraint: Constraint | None = None
    accepted: Sequence[int] = ()
    drafts: Sequence[int] = ()
    max_forced: int = 0


class StepClient:
    """One Step stream over shared memory, one request at a time."""

    def __init__(self, address: str, folder: Path, vocab_size: int, rows: int = 4) -> None:
        self.path = folder / f"masks-{os.urandom(4).hex()}"
        words = -(-vocab_size // 32)
        self.path.write_bytes(bytes(rows * words * 4))
        with self.path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        self.masks: npt.NDArray[np.uint32] = np.frombuffer(memory, dtype="<u4").reshape(rows, words)
        self._channel = grpc.insecure_channel(address)
        self._outgoing: queue.SimpleQueue[grammar_pb2.StepRequest | None] = queue.SimpleQueue()
        stub = grammar_pb2_grpc.GrammarServiceStub(self._channel)
        self._call = stub.Step(self._requests(), wait_for_ready=True, timeout=DEADLINE * 4)
        self._step = 0
        self.results: dict[int, tuple[int, list[int]]] = {}
        opening = grammar_pb2.OpenMasks(path=str(self.path), rows=rows, vocab_size=vocab_size)
        assert self.ask(grammar_pb2.StepRequest(open=opening)).HasField("opened")

    def ask(self, request: grammar_pb2.StepRequest) -> grammar_pb2.StepResponse:
        self._outgoing.put(request)
        return next(self._call)

    def fill(self, *rows: Row, released: Sequence[int] = ()) -> dict[int, QuireError]:
        self._step += 1
        fill, number = grammar_pb2.FillMasks(step=self._step, released=released), 0
        for row in rows:
            message = fill.rows.add(
                sequence=row.sequence, row=number, accepted=row.accepted, drafts=row.drafts, max_forced=row.max_forced
            )
            number += 1 + len(row.drafts)
            if row.constraint is not None:
                message.constraint.CopyFrom(constraint_to_proto(row.constraint))
        filled = self.ask(grammar_pb2.StepRequest(fill=fill)).filled
        assert filled.step == self._step
        self.results = {result.sequence: (result.num_drafts, list(result.forced)) for result in filled.results}
        return {error.sequence: error_from_proto(error.error) for error in filled.errors}

    def allowed(self, row: int = 0) -> npt.NDArray[np.int64]:
        """The tokens that a row allows, ascending."""
        return allowed_tokens(self.masks[row])

    def close(self) -> None:
        self._outgoing.put(None)
        self._call.cancel()
        self._channel.close()
        self.path.unlink(missing_ok=True)

    def _requests(self) -> Iterator[grammar_pb2.StepRequest]:
        while (request := self._outgoing.get()) is not None:
            yield request


def allowed_tokens(row: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
