"""Where the engine is in its life; health, status and sessions follow it."""

from __future__ import annotations

import asyncio
from enum import IntEnum


class Phase(IntEnum):
    """In the order that an engine goes through; FAILED can follow any."""

    LOADING = 1
    READY = 2
    DRAINING = 3
    FAILED = 4


class PhaseState:
    """The phase, what it is busy with, and a way to wait for the next one."""

    def __init__(self) -> None:
        self.phase = Phase.LOADING
        self.activity = "starting"
        self.progress = 0.0
        self.model = ""
        self.failure = ""
        self._changed = asyncio.Event()

    def advance(self, phase: Phase, *, failure: str = "") -> None:
        """Goes on to `phase`; there is no way back."""
        if phase > self.phase:
            self.phase = phase
            self.failure = failure
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    async def until(self, phase: Phase) -> None:
        """Returns once the engine is in `phase` or past it."""
        while self.phase < phase:
            await self._changed.wait()
