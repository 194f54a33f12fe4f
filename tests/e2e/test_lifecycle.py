"""How `quire serve` starts and how it ends."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from processes import until_ended
from served import descendants, serve
from sidecar_process import eventually

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_behind(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C must end every process, socket and shared-memory file; a second start must not trip over the first."""
    shared_memory = set(Path("/dev/shm").iterdir())
    with serve(tmp_path / "log") as served:
        pids = descendants(served.process.pid)
        assert len(pids) >= 5
        print(f"ready after {served.seconds_to_ready:.1f} s")
        assert served.seconds_to_ready < 30
        served.process.send_signal(number)
        assert served.process.wait(30) in (0, 128 + number, 130)
    until_ended(pids)
    # Another program's files come and go.
    eventually(lambda: set(Path("/dev/shm").iterdir()) <= shared_memory)
    assert "Traceback" not in served.log.read_text()


def test_children_do_not_outlive_a_killed_supervisor(tmp_path: Path) -> None:
    """Even kill -9 must not leave a model in memory and a port taken."""
    with serve(tmp_path / "log") as served:
        pids = descendants(served.process.pid)
        served.process.kill()
        until_ended(pids)
