"""The supervisor with small programs under it: starts, deaths, restarts, and the end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable

import pytest
from fake_children import Said, alive, child
from hypothesis import given
from hypothesis import strategies as st

from quire.cli.output import OutputPipe
from quire.service.errors import ConfigError
from quire.service.supervisor import ChildDiedError, ChildSpec, Supervisor, Timing

DEADLINE = 20.0

QUICK = Timing(first_delay=0.01, last_delay=0.04, healthy=5.0, stop=10.0)

Make = Callable[..., Supervisor]


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
async def make(said: Said) -> AsyncIterator[Make]:
    """Makes a supervisor whose children are heard by `said`."""
    with OutputPipe(said) as pipe:

        def supervisor(*stages: list[ChildSpec], timing: Timing = QUICK) -> Supervisor:
            return Supervisor(stages, output=pipe.write_end, timing=timing)

        yield supervisor


async def test_stages_stop_in_order(said: Said, make: Make) -> None:
    """The gateway must have finished its answers before the router goes, and the router before the engines."""
    stages = [[child(said, "gateway")], [child(said, "engine-0"), child(said, "engine-1")], [child(said, "sidecar")]]
    async with make(*stages) as supervisor:
        await asyncio.wait_for(supervisor.until_ready(), DEADLINE)
        ran = {line.split()[0] for line in said.lines}
        assert ran == {"gateway", "engine-0", "engine-1", "sidecar"}
        del said.lines[:]
    await said.until(lambda lines: len(lines) == 8)
    names = [line.split()[0] for line in said.lines]
    assert said.lines[:2] == ["gateway stops", "gateway is gone"]
    assert sorted(names[2:6]) == ["engine-0", "engine-0", "engine-1", "engine-1"]
    assert said.lines[6:] == ["sidecar stops", "sidecar is gone"]


async def test_a_crashed_child_is_started_again_more_slowly_each_time(
    said: Said, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that can't live must not take a core with its starts, nor give up: the reason may pass."""
    async with make([child(said, "engine", "crashes")]) as supervisor:
        keeping = asyncio.create_task(supervisor.keep())
        await said.until(lambda lines: lines.count("engine crashes") >= 5)
        keeping.cancel()
        await asyncio.wait((keeping,))
    messages = [record.getMessage() for record in caplog.records]
    assert messages[:4] == [
        f"engine ended with status 3: it is started again in {delay} s" for delay in ("0.01", "0.02", "0.04", "0.04")
    ]


async def test_a_killed_child_is_replaced_and_the_others_go_on(
    said: Said, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine that the kernel kills for its memory comes back alone."""
    async with make([child(said, "router")], [child(said, "engine")]) as supervisor:
        await asyncio.wait_for(supervisor.until_ready(), DEADLINE)
        keeping = asyncio.create_task(supervisor.keep())
        os.kill(said.pids("engine")[0], signal.SIGKILL)
        await said.until(lambda _: len(said.pids("engine")) == 2)
        assert "engine was ended by SIGKILL: it is started again in 0.01 s" in caplog.text
        assert len(said.pids("router")) == 1 and all(map(alive, (*said.pids("router"), said.pids("engine")[1])))
        keeping.cancel()
        await asyncio.wait((keeping,))
    assert not any(map(alive, (*said.pids("router"), *said.pids("engine"))))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_dead_childs_own_processes_go_with_it(said: Said, make: Make, number: signal.Signals) -> None:
    """What a dead engine leaves running would hold the memory that the next one needs."""
    async with make([child(said, "engine", "parent")]) as supervisor:
        await said.until(lambda _: len(said.pids("engine")) == 2)
        keeping = asyncio.create_task(supervisor.keep())
        grandchild = next(int(line.split()[2]) for line in said.lines if "child" in line)
        first = next(int(line.split()[2]) for line in said.lines if "runs" in line)
        watch = os.pidfd_open(grandchild)
        os.kill(first, number)
        await until_ended(watch)
        keeping.cancel()
        await asyncio.wait((keeping,))
    assert not any(map(alive, said.pids("engine")))


async def until_ended(watch: int) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(watch, ended.set)
    await asyncio.wait_for(ended.wait(), DEADLINE)
    loop.remove_reader(watch)
    os.close(watch)


async def test_a_child_that_dies_before_all_are_ready_ends_the_wait(said: Said, make: Make) -> None:
    """A wrong flag must end `quire serve` with its reason, not have it try for ever."""
    async with make([child(said, "gateway")], [child(said, "engine", "crashes")]) as supervisor:
        with pytest.raises(ChildDiedError, match="engine ended with status 3 before it was ready: the log above"):
            await asyncio.wait_for(supervisor.until_ready(), DEADLINE)
    assert "engine crashes" in said.lines
    assert not any(map(alive, said.pids("gateway")))


async def test_a_program_that_is_not_there(said: Said, make: Make) -> None:
    """The program is named, and what was started before it is gone."""
    missing = ChildSpec("engine", ("/no/such/program",), lambda: said.running("engine"))
    with pytest.raises(ConfigError, match=r"can't run /no/such/program for engine: No such file or directory"):
        async with make([child(said, "gateway")], [missing]):
            pytest.fail("the block is entered")
    assert not any(map(alive, said.pids("gateway")))


async def test_a_stubborn_child_is_killed_at_the_deadline(
    said: Said, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C must end everything in a known time, whatever a child is stuck in."""
    timing = Timing(stop=0.2)
    async with make([child(said, "engine", "stubborn")], [child(said, "sidecar")], timing=timing) as supervisor:
        await asyncio.wait_for(supervisor.until_ready(), DEADLINE)
        began = time.monotonic()
    assert 0.2 <= time.monotonic() - began < 5
    assert "engine does not stop: killed" in caplog.text and "sidecar" not in caplog.text
    assert said.lines[-2:] == ["sidecar stops", "sidecar is gone"]
    assert not any(map(alive, (*said.pids("engine"), *said.pids("sidecar"))))


async def test_kill_does_not_wait(said: Said, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """The second Ctrl-C: nobody is asked any more, and a child's own processes go too."""
    stages = [[child(said, "engine", "stubborn")], [child(said, "sidecar", "parent")]]
    async with make(*stages, timing=Timing(stop=3600.0)) as supervisor:
        await asyncio.wait_for(supervisor.until_ready(), DEADLINE)
        await said.until(lambda _: len(said.pids("sidecar")) == 2)
        watches = [os.pidfd_open(pid) for name in ("engine", "sidecar") for pid in said.pids(name)]
        asyncio.get_running_loop().call_later(0.1, supervisor.kill)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    for watch in watches:
        await until_ended(watch)
    assert "does not stop" not in caplog.text
    assert "sidecar stops" not in said.lines


async def test_nothing_is_left_when_the_caller_fails(said: Said, make: Make) -> None:
    """A bug in the supervisor's caller must not leave a model in memory."""
    with pytest.raises(ZeroDivisionError):
        async with make([child(said, "engine")]) as supervisor:
            await asyncio.wait_for(supervisor.until_ready(), DEADLINE)
            raise ZeroDivisionError
    assert said.pids("engine") and not any(map(alive, said.pids("engine")))


async def test_the_end_comes_between_a_death_and_the_next_start(said: Said, make: Make) -> None:
    """Ctrl-C while a child waits for its next start must neither hang nor start it."""
    async with make([child(said, "engine", "crashes")], timing=Timing(first_delay=3600.0)) as supervisor:
        keeping = asyncio.create_task(supervisor.keep())
        await said.until(lambda lines: bool(lines))
        keeping.cancel()
        await asyncio.wait((keeping,))
    assert said.lines == ["engine crashes"]


@given(
    st.lists(st.floats(0, 200), max_size=30),
    st.builds(Timing, st.floats(0.01, 1), st.floats(1, 60), st.floats(1, 100), st.just(1.0)),
)
def test_delays(lives: list[float], timing: Timing) -> None:
    """Delays double while a child dies young, never pass the longest, and begin anew after a healthy life."""
    delay = 0.0
    for lived in lives:
        before, delay = delay, timing.delay_after(delay, lived)
        assert timing.first_delay <= delay <= timing.last_delay
        if not before or lived >= timing.healthy:
            assert delay == timing.first_delay
        else:
            assert delay == min(2 * before, timing.last_delay)


async def test_lines_stay_whole(make: Make, said: Said) -> None:
    """Long lines of several processes, and one that is written in pieces, must not tear each other."""
    pieces = b"x" * 70_000 + b"\n" + "é\n".encode() + b"\xff\nlast"
    lines: list[str] = []
    with OutputPipe(lines.append) as pipe:
        writer = asyncio.create_task(asyncio.to_thread(write_all, pipe.write_end, pieces))
        await asyncio.wait_for(writer, DEADLINE)
    assert lines == ["x" * 70_000, "é", "\ufffd", "last"]


def write_all(descriptor: int, data: bytes) -> None:
    for start in range(0, len(data), 1001):
        os.write(descriptor, data[start : start + 1001])


async def test_what_dying_children_say_is_not_lost(said: Said, caplog: pytest.LogCaptureFixture) -> None:
    """The last line before a death is the one that says why."""
    caplog.set_level(logging.ERROR)
    with OutputPipe(said) as pipe:
        stages = [[child(said, f"engine-{index}", "crashes") for index in range(4)]]
        async with Supervisor(stages, output=pipe.write_end, timing=QUICK) as supervisor:
            with pytest.raises(ChildDiedError):
                await asyncio.wait_for(supervisor.until_ready(), DEADLINE)
    # At least the one that ended the wait has said its line; the others may have been stopped before.
    assert said.lines and all(line.endswith(" crashes") for line in said.lines)
