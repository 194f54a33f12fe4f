"""Requests that wait: for an engine, because none is ready, or for their turn to be moved. Used by the core alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from quire.router.flight import Flight


class WaitingRoom:
    """Whoever has waited for `hold` seconds, or until its deadline, is handed to `expire` with whether it was that.

    `wake` is called when a turn has come. Times are in seconds on the event loop's clock.
    """

    def __init__(self, hold: float, *, expire: Callable[[Flight, bool], None], wake: Callable[[], None]) -> None:
        self._hold = hold
        self._expire = expire
        self._wake = wake
        self._flights: dict[Flight, None] = {}
        self._turn: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._flights)

    def enter(self, flight: Flight) -> None:
        """It waits. One that has waited before without getting an engine goes on waiting: its time is not set back."""
        self._flights[flight] = None
        if flight.timer is None:
            until_deadline = float("inf")
            if flight.request.deadline_unix_ms is not None:
                until_deadline = max(0.0, flight.request.deadline_unix_ms / 1000 - time.time())
            loop = asyncio.get_running_loop()
            flight.held_at = loop.time()
            flight.timer = loop.call_later(
                min(self._hold, until_deadline), self._expire, flight, until_deadline <= self._hold
            )

    def leave(self, flight: Flight) -> None:
        """It waits no more, if it did."""
        self._flights.pop(flight, None)
        flight.held_at = None
        if flight.timer is not None:
            flight.timer.cancel()
            flight.timer = None

    def take_all(self) -> list[Flight]:
        """Everybody, longest wait first; those who get nothing enter again."""
        flights = list(self._flights)
        self._flights.clear()
        return flights

    def wake_at(self, when: float) -> None:
        """Calls `wake` then, if it is not to be called anyway."""
        if self._turn is None:
            self._turn = asyncio.get_running_loop().call_at(when, self._next_turn)

    def _next_turn(self) -> None:
        self._turn = None
        self._wake()
