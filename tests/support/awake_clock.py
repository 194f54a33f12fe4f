"""A clock for what must not take long, on machines that are held up now and then."""

from __future__ import annotations

import threading
from types import TracebackType

_TICK_S = 0.01


class AwakeClock:
    """`now()` is in seconds during which this process could run: a standstill of the machine is one tick.

    A context manager, whose thread ends with its block. Beside a thread that computes, ticks are late: seconds of this
    clock are never shorter than real ones.
    """

    def __init__(self) -> None:
        self._ticks = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="awake-clock", daemon=True)

    def __enter__(self) -> AwakeClock:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def now(self) -> float:
        return self._ticks * _TICK_S

    def _run(self) -> None:
        while not self._end.wait(_TICK_S):
            self._ticks += 1
