"""`quire top`: which engines it finds, its life in a terminal, and its one look for a pipe."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from certificate_files import CertificateFiles, new_ca
from engine_answers import answer_of, stats_of
from engine_process import engine, prompt_of, request
from session_client import SessionClient
from terminal import DEADLINE, Terminal
from tiny_models import tiny_llama

from quire.cli import runtime_dir as folders
from quire.cli import top
from quire.cli.main import main
from quire.cli.runtime_dir import Serving, announce, find_serving, runtime_dir
from quire.v1 import engine_pb2, engine_pb2_grpc

COMMAND = [sys.executable, "-m", "quire.cli.main", "top"]
ANOTHER_SCREEN, BACK = "\x1b[?1049h", "\x1b[?1049l"


def test_what_is_served_here_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody knows the path of a socket; and what a killed `quire serve` left behind must not be taken for one."""
    monkeypatch.setattr(folders, "_parents", lambda: (tmp_path,))
    left = tmp_path / "quire-left"
    left.mkdir()
    announce(left, Serving("http://x", "m", ("unix:/left",)))
    assert find_serving() == []
    first, second = Serving("http://1", "m", ("unix:/1", "unix:/2")), Serving("http://2", "m", ("unix:/3",))
    with runtime_dir() as one:
        assert find_serving() == []
        announce(one, first)
        # A file's time is not finer than some milliseconds.
        os.utime(one / "serve.json", (1, 1))
        fleet = top.Fleet(())
        fleet.update()
        kept = fleet.watches[0]
        with runtime_dir() as two:
            announce(two, second)
            assert find_serving() == [first, second] == find_serving()
            fleet.update()
            assert [(watch.address, watch.url) for watch in fleet.watches] == [
                ("unix:/1", "http://1"), ("unix:/2", "http://1"), ("unix:/3", "http://2"),
            ]  # fmt: skip
        fleet.update()
        assert len(fleet.watches) == 2 and fleet.watches[0] is kept
    assert find_serving() == []


def test_nothing_to_show_says_what_to_type(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Who forgot to start a server must not stare at an empty screen."""
    monkeypatch.setattr(top, "find_serving", list)
    assert main(["top", "--once"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("quire: no `quire serve` of yours runs on this machine: start one with `quire serve`, or")
    assert "--engine HOST:PORT" in error


class ScriptedEngine(engine_pb2_grpc.EngineServiceServicer):
    """Answers Inspect with `answer`; may be stopped and started again at its address."""

    def __init__(self, socket: Path) -> None:
        self.address = f"unix:{socket}"
        self.answer = answer_of()
        self.requests: list[engine_pb2.InspectRequest] = []
        self.start()

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(2))
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.address)
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait(DEADLINE)

    def Inspect(  # type: ignore[override]  # noqa: N802
        self, request: engine_pb2.InspectRequest, context: grpc.ServicerContext
    ) -> engine_pb2.InspectResponse:
        self.requests.append(request)
        return self.answer


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[ScriptedEngine]:
    found = ScriptedEngine(tmp_path / "e.sock")
    yield found
    found.stop()


def live(*engines: ScriptedEngine, lines: int = 24, columns: int = 80) -> Terminal:
    flags = [word for one in engines for word in ("--engine", one.address)]
    return Terminal([*COMMAND, "--interval", "0.1", *flags], lines=lines, columns=columns)


def test_an_engine_that_loads_works_is_lost_and_comes_back(scripted: ScriptedEngine) -> None:
    """It is watched most closely when something is wrong: no state may end the watching or pass unseen."""
    scripted.answer = answer_of(engine_pb2.ENGINE_PHASE_LOADING)
    scripted.answer.status.activity, scripted.answer.status.progress = "loading weights", 0.5
    with live(scripted) as terminal:
        terminal.expect(ANOTHER_SCREEN)
        terminal.expect("50%  loading weights")
        stats = stats_of(1, 100, 0, 10, 3)
        scripted.answer = answer_of(running=3, waiting=1, pages="uuscff", stats=stats)
        terminal.expect("6 pages")
        terminal.expect("3 of 8")
        scripted.answer = answer_of(engine_pb2.ENGINE_PHASE_DRAINING, running=1, pages="u", stats=stats)
        terminal.expect("draining")
        scripted.stop()
        terminal.expect("(no answer): it is shown again when it is back")
        scripted.answer = answer_of(epoch=2, running=2, pages="ff")
        scripted.start()
        terminal.expect("2 of 8")
        scripted.answer = answer_of(engine_pb2.ENGINE_PHASE_FAILED)
        scripted.answer.status.failure = "a step failed"
        terminal.expect("it failed: ")
        terminal.type("q")
        assert terminal.wait() == 0
    assert "Traceback" not in terminal.output


@pytest.mark.parametrize(("how", "status"), [("q", 0), ("\x03", 130), ("SIGTERM", 128 + signal.SIGTERM)])
def test_the_terminal_is_as_it_was(scripted: ScriptedEngine, how: str, status: int) -> None:
    """A shell without an echo or a cursor, on a screen that is not its own, is a shell that people close."""
    with live(scripted) as terminal:
        before = terminal.modes
        terminal.expect(ANOTHER_SCREEN)
        terminal.expect("no requests")
        if how == "SIGTERM":
            terminal.process.terminate()
        else:
            # Ctrl-Z would leave the shell on that screen.
            terminal.type(f"\x1axyz{how}")
        assert terminal.wait() == status
        assert terminal.modes == before
    assert terminal.output.count(ANOTHER_SCREEN) == terminal.output.count(BACK) == 1
    assert terminal.output.rindex("\x1b[?25h") > terminal.output.rindex("\x1b[?25l")
    assert "Traceback" not in terminal.output and "xyz" not in terminal.output


def test_the_picture_follows_the_window(scripted: ScriptedEngine) -> None:
    """A picture of the old size is torn in a new one."""
    scripted.answer = answer_of(running=8, waiting=30, pages="uscf" * 500)
    with live(scripted) as terminal:
        terminal.expect("2,000 pages, 6 to a mark")
        terminal.resize(50, 160)
        terminal.expect("2,000 pages  ")
        terminal.expect("\x1b[H")
        assert len(terminal.frame) == 50 and {len(line) for line in terminal.frame} == {160}
        terminal.resize(12, 60)
        terminal.expect("to a mark")
        terminal.expect("\x1b[H")
        assert len(terminal.frame) == 12 and {len(line) for line in terminal.frame} == {60}
        terminal.type("q")
        assert terminal.wait() == 0


def test_arrows_choose_an_engine(scripted: ScriptedEngine, tmp_path: Path) -> None:
    """With several engines, one's batch and pages are shown at a time: all must be in reach."""
    other = ScriptedEngine(tmp_path / "other.sock")
    scripted.answer = answer_of(name="first", pages="f" * 11)
    other.answer = answer_of(name="second", pages="f" * 22)
    with live(scripted, other) as terminal:
        terminal.expect("11 pages")
        terminal.type("\x1b[B")
        terminal.expect("22 pages")
        terminal.type("\x1b[A")
        terminal.expect("11 pages")
        terminal.type("j")
        terminal.expect("22 pages")
        terminal.type("\t")
        terminal.expect("11 pages")
        terminal.type("q")
        assert terminal.wait() == 0
    other.stop()


def run_once(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, "--once", *flags], capture_output=True, text=True, timeout=DEADLINE, check=False)


def test_once_is_for_pipes(scripted: ScriptedEngine) -> None:
    """A script wants text without control characters, and a status that says whether there was an engine."""
    scripted.answer = answer_of(running=8, waiting=30, pages="uscf" * 500, stats=stats_of(1, 100, 25, 10, 3))
    done = run_once("--engine", scripted.address, "--interval", "0.1")
    assert done.returncode == 0 and done.stderr == ""
    assert "\x1b" not in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    assert "2,000 pages" in done.stdout and "25% of prompt tokens" in done.stdout
    # Nothing is cut off where there is no window: all that the engine tells of is there.
    assert sum("/200" in line for line in done.stdout.splitlines()) == 38
    assert len(scripted.requests) == 2
    done = run_once("--engine", "127.0.0.1:9")
    assert done.returncode == 1 and "no answer at 127.0.0.1:9" in done.stdout


def test_an_address_that_is_no_engines() -> None:
    """People give the address of what they know, which is the gateway."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    done = run_once("--engine", f"127.0.0.1:{port}")
    assert done.returncode == 1 and "what listens there is no engine" in done.stdout
    server.stop(0)


def test_an_engine_over_tls(tmp_path: Path) -> None:
    """Without it nobody could look at an engine that speaks TLS, or one would be shown that is not trusted."""
    files = CertificateFiles(tmp_path / "own").write(new_ca())
    pair = [(files.key.read_bytes(), files.certificate.read_bytes())]
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = ScriptedEngine(tmp_path / "plain.sock")
    engine_pb2_grpc.add_EngineServiceServicer_to_server(servicer, server)
    asking = grpc.ssl_server_credentials(pair, files.ca.read_bytes(), require_client_auth=True)
    address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', asking)}"
    server.start()
    flags = ("--engine", address, "--interval", "0.1")
    done = run_once(*flags, *files.flags("engine-tls"))
    assert done.returncode == 0 and "engine-0" in done.stdout
    # A socket stays plain beside it.
    done = run_once(*flags, "--engine", servicer.address, *files.flags("engine-tls"))
    assert done.returncode == 0 and "no answer" not in done.stdout
    done = run_once(*flags)
    assert done.returncode == 1 and "--engine-tls-ca" in done.stdout
    other = CertificateFiles(tmp_path / "other").write(new_ca())
    done = run_once(*flags, *other.flags("engine-tls"))
    assert done.returncode == 1 and "no certificate that" in done.stdout
    servicer.stop()
    server.stop(0)


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        (["--engine-tls-ca", "ca.crt"], "name one with --engine"),
        (["--engine", "a:1", "--engine-tls-cert", "tls.crt"], "give that too"),
        (["--engine", "a:1", "--engine-tls-ca", "/no/such/ca.crt"], "/no/such/ca.crt"),
    ],
)
def test_wrong_tls_flags_are_named(flags: list[str], fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it they would show as an engine that does not answer."""
    assert main(["top", "--once", *flags]) == 2
    assert fix in capsys.readouterr().err


def test_a_pipe_without_once_is_refused() -> None:
    """Screens full of control characters in a file help nobody."""
    done = subprocess.run(
        [*COMMAND, "--engine", "unix:/x"], capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert (
        done.returncode == 2
        and done.stderr == "quire: standard output is no terminal to draw on: add --once for one look\n"
    )


async def test_a_real_engine(tmp_path: Path) -> None:
    """What a real engine says must be what is drawn, down to the last page."""
    tiny_llama(tmp_path / "tiny", max_position_embeddings=4096)
    async with (
        engine(tmp_path / "tiny", tmp_path / "e", "--num-pages", "600") as pod,
        SessionClient(pod.address) as session,
    ):
        await session.submit(request(prompt_of(100), 5)).result()
        await session.submit(request(prompt_of(100), 5)).result()
        flags = ("--once", "--engine", pod.address, "--interval", "0.1")

        process = await asyncio.create_subprocess_exec(*COMMAND, *flags, stdout=asyncio.subprocess.PIPE)
        output, _ = await asyncio.wait_for(process.communicate(), DEADLINE)
    text = output.decode()
    assert process.returncode == 0 and "─ engine-0 ─ ready ─ cpu float32 ─" in text and "tiny" in text
    assert re.search(r"600 pages  █ 0 used  ▓ 0 shared  ░ 6 cached  · 594 free", text)
    # 96 of the second prompt's 100 tokens were there.
    assert "48% of prompt tokens" in text and "no requests" in text
