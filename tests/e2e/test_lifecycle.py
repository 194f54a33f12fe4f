"""How `quire serve` starts and how it ends."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest
from served import descendants, serve

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
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert set(Path("/dev/shm").iterdir()) <= shared_memory
    assert "Traceback" not in served.log.read_text()


def test_children_do_not_outlive_a_killed_supervisor(tmp_path: Path) -> None:
    """Even kill -9 must not leave a model in memory and a port taken."""
    with serve(tmp_path / "log") as served:
        watches = [os.pidfd_open(pid) for pid in descendants(served.process.pid)]
        served.process.kill()
        for watch in watches:
            ended, _, _ = select.select([watch], [], [], 30)
            assert ended
            os.close(watch)
