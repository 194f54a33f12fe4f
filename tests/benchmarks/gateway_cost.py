"""What the gateway costs, with an engine that answers at once, beside a bare uvicorn and a bare grpc.aio.

    python tests/benchmarks/gateway_cost.py
    python tests/benchmarks/gateway_cost.py --only tokens,workers --seconds 10
    python tests/benchmarks/gateway_cost.py --only ttft --rate 100

Real processes on loopback: client, gateway, router, engine (see gateway_load.py, gateway_peers.py). Tokens a second are
those of one core: what was streamed, divided by the seconds of processor time that the server's process used, so that
what else runs on the machine counts little. Latencies are by the clock, and need an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = "smollm"
HERE = Path(__file__).parent
SHARES = (0.1, 0.5, 0.9, 0.99)
PARTS = ("tokens", "grpc", "ttft", "workers", "memory")


@dataclass(frozen=True)
class Server:
    """A process under load; `pids` are all that count as the server."""

    url: str
    pids: tuple[int, ...]
    grpc: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each figure (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second (default: %(default)s)")
    parser.add_argument("--max-workers", type=int, default=2, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--open", type=int, default=1000, metavar="N", help="streams held open (default: %(default)s)")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only names {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(prefix="quire-cost-") as folder:
        bench = Bench(Path(folder), arguments.streams, arguments.seconds)
        if "tokens" in parts:
            bench.tokens()
        if "grpc" in parts:
            bench.grpc()
        if "ttft" in parts:
            bench.ttft(arguments.rate)
        if "workers" in parts:
            bench.workers(arguments.max_workers)
        if "memory" in parts:
            bench.memory(arguments.open)


class Bench:
    """Runs each part and prints its rows."""

    def __init__(self, folder: Path, streams: int, seconds: float) -> None:
        self._folder = folder
        self._streams = str(streams)
        self._seconds = str(seconds)

    def tokens(self) -> None:
        """SSE over HTTP: all that the gateway does for a token, and what uvicorn alone needs for a chunk."""
        _title(f"streamed tokens per second of a core, HTTP, {self._streams} streams")
        with _uvicorn() as echo:
            bare, _ = self._rate_of(echo, "--path", "/4000")
        _row("bare uvicorn, a chunk per token", bare, "chunks/s")
        with self._engine() as engine, self._gateway(engine) as gateway:
            rate, figures = self._rate_of(gateway)
        _row("gateway (templates, detokenizer, 3 stop strings)", rate, "tokens/s", rate / bare)
        each = figures["tokens"] / figures["events"]
        print(f"    {each:.2f} tokens an event, {figures['wall_rate']:,.0f} tokens/s by the clock")

    def grpc(self) -> None:
        """The public gRPC service and a bare one."""
        _title(f"streamed tokens per second of a core, gRPC, {self._streams} streams")
        with _peer("grpc", address := f"unix:{self._folder}/echo.sock") as pid:
            bare, _ = self._rate_of(Server(address, (pid,)), kind="grpc")
        _row("bare grpc.aio, a message per token", bare, "messages/s")
        with self._engine() as engine, self._gateway(engine) as gateway:
            rate, _ = self._rate_of(Server(gateway.grpc, gateway.pids), kind="grpc")
        _row("gateway", rate, "tokens/s", rate / bare)

    def ttft(self, rate: float) -> None:
        """Through gateway and router, at a fixed rate of requests."""
        _title(f"time to the first token at {rate:g} requests a second, milliseconds")
        load = ("--rate", str(rate), "--max-tokens", "2", "--seconds", self._seconds)
        with _uvicorn() as echo:
            self._latencies("bare uvicorn", echo, *load, "--path", "/2", uvicorn=echo.pids)
        with self._engine() as engine, self._gateway(engine) as gateway:
            self._latencies("gateway, engine", gateway, *load, gateway=gateway.pids)
        with self._fake_engine() as (engine, engine_pid):
            alone = self._latencies("engine", Server(engine, ()), *load, kind="session", engine=(engine_pid,))
        with (
            self._fake_engine() as (engine, engine_pid),
            self._router(engine) as (router, router_pid),
            self._gateway(router) as gateway,
        ):
            pids = {"gateway": gateway.pids, "router": (router_pid,), "engine": (engine_pid,)}
            all_of_it = self._latencies("gateway, router, engine", gateway, *load, **pids)
        added = "  ".join(
            f"p{share * 100:g} {1000 * (_percentile(all_of_it, share) - _percentile(alone, share)):6.2f}"
            for share in SHARES
        )
        print(f"  {'added by gateway and router':<28} {added}", flush=True)

    def workers(self, most: int) -> None:
        """The same load on more processes."""
        _title(f"workers, {self._streams} streams")
        first = 0.0
        for count in range(1, most + 1):
            with self._engine() as engine, self._gateway(engine, workers=count) as gateway:
                rate, figures = self._rate_of(gateway)
            first = first or rate
            _row(f"{count} workers, tokens per second of a core", rate, "tokens/s", rate / first)
            print(f"    {figures['wall_rate']:,.0f} tokens/s by the clock, {figures['cores']:.2f} cores in use")

    def memory(self, streams: int) -> None:
        """What a stream that is open and waits takes."""
        _title(f"memory of an open stream, {streams} of them")
        with self._engine() as engine, self._gateway(engine) as gateway:
            # Once before, for what is allocated once.
            self._held(gateway, 100)
            before = _resident(gateway.pids)
            grown = self._held(gateway, streams) - before
        print(f"  {'gateway':<50} {grown / streams / 1024:>10.1f} KiB")

    def _held(self, server: Server, streams: int) -> int:
        with _load("hold", server.url, "--streams", str(streams), model=MODEL) as process:
            _until(process, "begin")
            resident = _resident(server.pids)
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            _until(process, "end")
        return resident

    def _rate_of(self, server: Server, *flags: str, kind: str = "streams") -> tuple[float, dict[str, Any]]:
        flags = ("--streams", self._streams, "--seconds", self._seconds, *flags)
        with _load(kind, server.url, *flags, model=MODEL) as process:
            _until(process, "begin")
            before = _cpu_seconds(server.pids)
            _until(process, "end")
            used = _cpu_seconds(server.pids) - before
            figures = _figures(process)
        figures["wall_rate"] = figures["tokens"] / figures["wall"]
        figures["cores"] = used / figures["wall"]
        return figures["tokens"] / used, figures

    def _latencies(
        self, name: str, server: Server, *flags: str, kind: str = "rate", **pids: Sequence[int]
    ) -> list[float]:
        """Prints and returns the times to the first token, in order."""
        with _load(kind, server.url, *flags, model=MODEL) as process:
            _until(process, "begin")
            before = {part: _cpu_seconds(ids) for part, ids in pids.items()}
            figures = _figures(process)
            used = {part: _cpu_seconds(ids) - before[part] for part, ids in pids.items()}
        first, whole = figures["first"], figures["whole"]
        if figures["errors"] or not first:
            raise SystemExit(f"{name}: {figures['errors']} answers without a token")
        shown = "  ".join(f"p{share * 100:g} {_percentile(first, share) * 1000:6.2f}" for share in SHARES)
        print(f"  {name:<28} {shown}   whole answer p50 {_percentile(whole, 0.5) * 1000:6.2f}")
        # The clock's figures are of an idle machine; these hold on any.
        spent = ", ".join(f"{part} {1000 * seconds / figures['asked']:.2f}" for part, seconds in used.items())
        print(f"    processor time per request: {spent}", flush=True)
        return list(first)

    @contextmanager
    def _engine(self) -> Iterator[str]:
        address = f"unix:{self._folder}/engine.sock"
        with _peer("engine", address, MODEL):
            yield address

    @contextmanager
    def _fake_engine(self) -> Iterator[tuple[str, int]]:
        address = f"unix:{self._folder}/fake.sock"
        with _peer("fake", address, MODEL) as pid:
            yield address, pid

    @contextmanager
    def _router(self, engine: str) -> Iterator[tuple[str, int]]:
        address = f"unix:{self._folder}/router.sock"
        with _service("quire.router", "--listen", address, "--engines", engine, "--grace", "0") as process:
            _logged(process, r"(router listens)")
            yield address, process.pid

    @contextmanager
    def _gateway(self, router: str, *, workers: int = 1) -> Iterator[Server]:
        flags = ["--routers", router, "--served-model-name", MODEL, "--port", "0", "--grpc-listen", "127.0.0.1:0"]
        # One line for each request would be the log's cost, not the gateway's; production has it, and it is one line.
        flags += ["--grace", "0", "--workers", str(workers), "--max-requests", "100000"]
        with _service("quire.gateway", *flags) as process:
            url, grpc = _logged(process, r"gateway listens url=(\S+) grpc=(\S+)")
            pids = tuple(_children(process.pid)) if workers > 1 else (process.pid,)
            _until_ready(url)
            yield Server(url, pids, grpc)


@contextmanager
def _uvicorn() -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with _peer("uvicorn", str(port)) as pid:
        yield Server(f"http://127.0.0.1:{port}", (pid,))


@contextmanager
def _peer(*arguments: str) -> Iterator[int]:
    with _python(HERE / "gateway_peers.py", *arguments) as process:
        _until(process, "ready")
        yield process.pid


@contextmanager
def _load(*arguments: str, model: str) -> Iterator[subprocess.Popen[str]]:
    with _python(HERE / "gateway_load.py", *arguments, "--model", model) as process:
        yield process


@contextmanager
def _python(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def _service(module: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", module, *flags]
    with ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        try:
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=20)


def _logged(process: subprocess.Popen[str], pattern: str) -> Sequence[str]:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if found := re.search(pattern, line):
            _drain(process)
            return found.groups()
    raise SystemExit(f"{process.args} ended:\n{''.join(seen)}")


def _drain(process: subprocess.Popen[str]) -> None:
    """Lets the log go on into nothing, so that it never blocks its writer."""
    assert process.stderr is not None
    subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)


def _until(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == word:
            return
    raise SystemExit(f"{process.args} ended before {word!r}")


def _figures(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            figures: dict[str, Any] = json.loads(line)
            return figures
    raise SystemExit(f"{process.args} ended without figures")


def _until_ready(url: str) -> None:
    import httpx

    with httpx.Client(base_url=url, timeout=10) as http:
        while http.get("/ready").status_code != 200:
            pass


def _cpu_seconds(pids: Sequence[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _resident(pids: Sequence[int]) -> int:
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _title(text: str) -> None:
    print(f"\n{text}")


def _row(name: str, figure: float, unit: str, ratio: float | None = None) -> None:
    print(f"  {name:<50} {figure:>10,.0f} {unit:<10}" + (f" {ratio:6.2f}×" if ratio is not None else ""), flush=True)


if __name__ == "__main__":
    main()
