"""Whether a peer hangs, told apart from a standstill of this process or its whole machine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


async def until_stalled(idle_seconds: Callable[[], float], progressed: Callable[[], None], patience_s: float) -> None:
    """Returns when `idle_seconds()` is above `patience_s`, which is seen a quarter of it late at most.

    `progressed()` sets it to 0: called when this process stood still, since what the peer has said meanwhile is still
    to be read.
    """
    interval = patience_s / 4
    while True:
        looked_at = time.monotonic()
        # A clock, not a wait for something to happen.
        await asyncio.sleep(interval)
        if time.monotonic() - looked_at > 2 * interval:
            progressed()
        elif idle_seconds() > patience_s:
            return
