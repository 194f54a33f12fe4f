"""Processes that a test did not start itself, and their end."""

from __future__ import annotations

import os
import select
from collections.abc import Iterable

DEADLINE = 20.0


def until_ended(pids: Iterable[int]) -> None:
    """Returns when none of them runs: what is told to end, or killed, takes a moment to. Raises TimeoutError."""
    for pid in pids:
        try:
            watch = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended, _, _ = select.select([watch], [], [], DEADLINE)
        os.close(watch)
        if not ended:
            raise TimeoutError(f"process {pid} still runs")
