"""`quire top`: what it makes of counts, what it draws in a window of any size, and its life in a terminal."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from engine_process import engine, prompt_of, request
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from session_client import SessionClient
from terminal import DEADLINE, Terminal
from tiny_models import tiny_llama

from quire.cli import runtime_dir as folders
from quire.cli import top
from quire.cli.engine_watch import EngineWatch
from quire.cli.figures import bar, count, duration, elapsed
from quire.cli.history import History, quantile
from quire.cli.main import main
from quire.cli.page_view import page_lines
from quire.cli.runtime_dir import Serving, announce, find_serving, runtime_dir
from quire.cli.top_view import Size, page, screen, sparkline
from quire.v1 import engine_pb2, engine_pb2_grpc

COMMAND = [sys.executable, "-m", "quire.cli.main", "top"]
BOUNDS = (0.01, 0.1, 1.0, 10.0)
ANOTHER_SCREEN, BACK = "\x1b[?1049h", "\x1b[?1049l"


def stats_of(
    steps: int = 0, prompt: int = 0, cached: int = 0, output: int = 0, firsts: int = 0, slow: int = 0
) -> engine_pb2.EngineStats:
    """Counts of an engine that drew `firsts` first tokens, and the rest of `output` after them, `slow` ones slowly."""
    gaps = output - firsts
    return engine_pb2.EngineStats(
        steps=steps, prompt_tokens=prompt, cached_prompt_tokens=cached, output_tokens=output,
        computed_tokens=prompt - cached + gaps,
        first_token_seconds=engine_pb2.Histogram(bounds=BOUNDS, counts=[0, firsts, 0, 0, 0]),
        inter_token_seconds=engine_pb2.Histogram(bounds=BOUNDS, counts=[gaps - slow, 0, slow, 0, 0]),
    )  # fmt: skip


def answer_of(
    phase: engine_pb2.EnginePhase.ValueType = engine_pb2.ENGINE_PHASE_READY,
    *,
    name: str = "engine-0",
    epoch: int = 1,
    running: int = 0,
    waiting: int = 0,
    pages: str = "",
    stats: engine_pb2.EngineStats | None = None,
) -> engine_pb2.InspectResponse:
    """What an engine says whose pages are u(sed), s(hared), c(ached) or free."""
    answer = engine_pb2.InspectResponse(stats=stats or stats_of())
    status = answer.status
    status.engine, status.phase, status.epoch, status.model, status.max_num_seqs = name, phase, epoch, "tiny", 8
    status.load.running, status.load.waiting, status.load.pages_total = running, waiting, len(pages)
    answer.pages.pages_per_cell = 1
    answer.pages.used.extend(int(page in "us") for page in pages)
    answer.pages.shared.extend(int(page == "s") for page in pages)
    answer.pages.cached.extend(int(page == "c") for page in pages)
    for index in range(running + waiting):
        answer.sequences.add(
            request_id=f"cmpl-{index:032}", prompt_tokens=1000, output_tokens=10 * index, max_output_tokens=200,
            state=engine_pb2.SEQUENCE_STATE_DECODING if index < running else engine_pb2.SEQUENCE_STATE_WAITING,
            pages=63, age_ms=1234,
        )  # fmt: skip
    return answer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def watch_of(*answers: engine_pb2.InspectResponse, url: str = "") -> EngineWatch:
    """An engine that gave these answers, a second apart."""
    clock = Clock()
    watch = EngineWatch("unix:/e.sock", url, clock)
    for answer in answers:
        clock.now += 1
        watch.take(answer)
    return watch


def plain(lines: object) -> list[str]:
    return str(lines).splitlines()


# What is made of counts


@given(st.lists(st.floats(0.001, 9.9), min_size=1, max_size=200), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_quantiles_lie_in_the_right_bucket(values: list[float], share: float) -> None:
    """A median that is read from the wrong bucket is off by a factor of ten and looks like any other."""
    counts = [0] * (len(BOUNDS) + 1)
    for value in values:
        counts[int(np.searchsorted(BOUNDS, value))] += 1
    true = float(np.quantile(values, share, method="inverted_cdf"))
    found = quantile(BOUNDS, counts, share)
    bucket = int(np.searchsorted(BOUNDS, true))
    assert found is not None and (BOUNDS[bucket - 1] if bucket else 0.0) <= found <= BOUNDS[bucket]


def test_quantiles_at_the_ends() -> None:
    """Nothing measured is not a time of zero, and what is above all bounds must not break the arithmetic."""
    assert quantile(BOUNDS, [0, 0, 0, 0, 0], 0.5) is None and quantile([], [], 0.5) is None
    assert quantile(BOUNDS, [0, 0, 0, 0, 3], 0.5) == 10.0
    assert quantile(BOUNDS, [0, 4, 0, 0, 0], 0.5) == pytest.approx(0.055)


def test_speeds_are_what_happened_between_two_looks() -> None:
    """A speed since the start would hide for hours that an engine has stopped."""
    history = History()
    history.add(10.0, 1, stats_of(5, prompt=1000, cached=200, output=50, firsts=10))
    assert not history.speeds
    history.add(12.0, 1, stats_of(9, prompt=1600, cached=400, output=90, firsts=14))
    (speed,) = history.speeds
    assert (speed.prefill, speed.decode) == ((600 - 200) / 2, 40 / 2)
    window = history.window()
    assert window.seconds == 2.0 and window.hit_rate == pytest.approx(200 / 600)
    assert window.tokens_per_step == (400 + 36) / 4
    assert window.first_token is not None and 0.01 < window.first_token.p50 <= 0.1


def test_the_last_minute_forgets_what_was_before() -> None:
    """A slow first request must not colour the numbers for the rest of the day."""
    history = History()
    history.add(0.0, 1, stats_of(1, prompt=100, output=20, firsts=1, slow=19))
    history.add(1.0, 1, stats_of(2, prompt=100, output=20, firsts=1, slow=19))
    # Nobody asks for anything: the numbers are those since the start, as `seconds` says.
    window = history.window()
    assert window.seconds is None and window.inter_token is not None and window.inter_token.p50 > 0.1
    history.add(30.0, 1, stats_of(9, prompt=100, output=60, firsts=1, slow=19))
    window = history.window()
    assert window.seconds == 30.0 and window.inter_token is not None and window.inter_token.p99 <= 0.01
    history.add(80.0, 1, stats_of(30, prompt=100, output=70, firsts=1, slow=29))
    window = history.window()
    assert window.seconds == 50.0 and window.inter_token is not None and window.inter_token.p50 > 0.1


def test_an_engine_that_was_started_again_counts_from_zero() -> None:
    """Its counts are smaller than before: speeds would be negative, and the last minute another engine's."""
    history = History()
    history.add(0.0, 1, stats_of(5, prompt=1000, output=500, firsts=9))
    history.add(1.0, 2, stats_of(1, prompt=10, output=1, firsts=1))
    assert not history.speeds and history.window().seconds is None
    history.add(2.0, 2, stats_of(2, prompt=10, output=2, firsts=1))
    assert [speed.decode for speed in history.speeds] == [1.0]


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (7.4, "7"), (1234, "1,234"), (9999, "9,999"), (12_345, "12.3k"), (2.5e6, "2.5M")]
)
def test_counts_fit_their_column(value: float, shown: str) -> None:
    """A number that is wider than its column shifts all others."""
    assert count(value) == shown and len(shown) <= 6


def test_times_are_short() -> None:
    """Milliseconds where they matter, hours where they add up."""
    assert [duration(value) for value in (0.0004, 0.0234, 0.9996, 9.96, 61)] == [
        "0.4 ms",
        "23 ms",
        "1.0 s",
        "10 s",
        "1:01",
    ]
    assert [elapsed(value) for value in (0.001, 3599.6, 7322)] == ["0.0 s", "1:00:00", "2:02:02"]


def test_a_sparkline_tells_little_from_nothing() -> None:
    """A trickle that is drawn as silence is not looked for."""
    assert sparkline([0, 1, 500, 1000], 10) == " ▁▅█" and sparkline([1, 2, 3], 2) == "▆█" and sparkline([], 5) == ""
    assert sparkline([5, 5], 0) == ""
    assert [bar(share, 4).plain for share in (0, 0.5, 0.53, 1, 7)] == ["────", "██──", "██▏─", "████", "████"]


# What is drawn


def test_pages_of_every_kind() -> None:
    """The map must be readable without colours, in a log or by someone who does not see them."""
    caption, row = page_lines(answer_of(pages="uusccff"), 20, 1)
    assert caption.plain == "7 pages  █ 2 used  ▓ 1 shared  ░ 2 cached  · 2 free"
    assert row.plain == "██▓░░··"
    caption, row = page_lines(answer_of(pages="uuuuuffusscccfffffffu"), 6, 1)
    assert caption.plain.startswith("21 pages, 4 to a mark  █ 7 used  ▓ 2 shared")
    assert row.plain == "█▄▄░·█"


@given(st.text("uscf", min_size=1, max_size=300), st.integers(1, 40), st.integers(1, 10))
def test_no_page_is_lost_when_they_are_merged(pages: str, width: int, rows: int) -> None:
    """One page in use among thousands is what somebody looks for."""
    _, *drawn = page_lines(answer_of(pages=pages), width, rows)
    marks = "".join(line.plain for line in drawn)
    assert len(drawn) <= rows and max(len(line) for line in drawn) <= width
    size = -(-len(pages) // (width * rows))
    for index, mark in enumerate(marks):
        cell = pages[index * size : (index + 1) * size]
        assert (mark == "·") == (set(cell) == {"f"}) and (mark == "░") == (
            bool(set(cell) - {"f"}) and not set(cell) & {"u", "s"}
        )


def watches(num_engines: int, running: int, waiting: int) -> list[EngineWatch]:
    phases = [engine_pb2.ENGINE_PHASE_READY, engine_pb2.ENGINE_PHASE_LOADING, engine_pb2.ENGINE_PHASE_FAILED]
    found = []
    for index in range(num_engines):
        answer = answer_of(
            phases[index % 3], name=f"engine-{index}", running=running, waiting=waiting, pages="uuscf" * 200
        )
        answer.status.activity, answer.status.failure = "loading weights", "the engine's core process died: see the log"
        answer.stats.CopyFrom(stats_of(3, prompt=10**6, output=10**5, firsts=3))
        found.append(watch_of(answer_of(name=f"engine-{index}"), answer, url="http://127.0.0.1:8000"))
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 5),
    st.integers(0, 4),
    st.integers(20, 200),
    st.integers(4, 60),
    st.integers(0, 8),
    st.integers(0, 40),
)
def test_a_screen_fits_its_window(
    num_engines: int, selected: int, width: int, height: int, running: int, waiting: int
) -> None:
    """A line too long or too many scrolls the rest away, and the picture jumps."""
    drawn = screen(
        watches(num_engines, running, waiting), min(selected, max(0, num_engines - 1)), Size(width, height), "q quits "
    )
    lines = drawn.plain.splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_a_small_window_shows_what_matters() -> None:
    """80 columns by 24 lines is what a terminal opens with."""
    lines = plain(screen(watches(1, 8, 12), 0, Size(80, 24), "q quits "))
    assert lines[0].startswith(" quire top   tiny  http://127.0.0.1:8000") and lines[0].endswith("q quits ")
    text = "\n".join(lines)
    for word in ("prefill", "decode", "8 of 8", "queue", "hit rate", "time to first token", "inter-token time", "p50"):
        assert word in text, word
    assert "1,000 pages" in text and sum("decode" in line and "/200" in line for line in lines) == 8
    assert lines[-1].startswith(" and ") and lines[-1].endswith(" more")
    hidden = int(lines[-1].split()[1])
    assert hidden + sum("/200" in line for line in lines) == 20 and len(lines) == 24


def test_a_large_window_has_pages_beside_the_batch() -> None:
    """A page for each character, and every request."""
    lines = plain(screen(watches(1, 8, 12), 0, Size(160, 50), "q quits "))
    assert any("1,000 pages  █" in line and "request" in line for line in lines)
    assert sum("/200" in line for line in lines) == 20 and not any("more" in line for line in lines)


def test_what_is_old_is_said_to_be() -> None:
    """An engine in a long step does not answer: its numbers must not pass for those of this moment."""
    clock = Clock()
    watch = EngineWatch("unix:/e.sock", clock=clock)
    watch.take(answer_of())
    clock.now += 60  # between two looks nobody waits
    assert "in a step" not in screen([watch], 0, Size(80, 24), "").plain
    watch.ask()
    clock.now += 7
    assert "in a step for 7.0 s" in screen([watch], 0, Size(80, 24), "").plain
    watch.take(answer_of())
    assert "in a step" not in screen([watch], 0, Size(80, 24), "").plain


def test_several_engines_have_a_line_each() -> None:
    """One that fails among many must be seen without looking for it."""
    lines = plain(screen(watches(3, 2, 0), 1, Size(100, 30), "q quits "))
    assert [line.split()[0] for line in lines[2:5]] == ["engine-0", "▸", "engine-2"]
    assert "loading weights" in lines[3] and "it failed: the engine's core process died" in lines[4]
    assert lines[5].startswith("─ engine-1 ─ loading ─")
    text = page(watches(3, 2, 0), 100).plain
    assert all(f"─ engine-{index} ─" in text for index in range(3))


def test_a_request_id_is_only_text() -> None:
    """An id is its sender's: it must not clear the screen of whoever watches."""
    answer = answer_of(running=1)
    answer.sequences[0].request_id = "\x1b[2J[red]evil\n"
    console = Console(width=100, force_terminal=True)
    with console.capture() as capture:
        console.print(screen([watch_of(answer)], 0, Size(100, 30), ""))
    assert "\x1b[2J" not in capture.get() and "?[2J[red]evil?" in capture.get()


# Which engines


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


# In a terminal


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
