"""What `quire serve` shows while the services load: one line that moves in a terminal, a few lines in a log."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

_BAR = 20


@dataclass(slots=True)
class LoadProgress:
    """How far `total` processes are. `stream` gets a line that rewrites itself if it is a terminal.

    Children write their log to the same terminal. So the line stays short and the cursor at its start: what a child
    logs covers the line instead of growing out of its middle.
    """

    total: int
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    _ready: set[str] = field(default_factory=set)
    _loading: dict[str, tuple[str, float]] = field(default_factory=dict)
    _shown: dict[str, str] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)

    def loading(self, name: str, activity: str, fraction: float) -> None:
        """`name` is busy with `activity`; `fraction` of its loading is done, 0 to 1."""
        self._loading[name] = (activity, fraction)
        self._show(name, activity)

    def ready(self, name: str) -> None:
        """`name` is ready."""
        self._ready.add(name)
        self._loading.pop(name, None)
        self._show(name, "ready")

    def clear(self) -> None:
        """Takes the line away."""
        if self.stream.isatty():
            self._write("\x1b[2K\r")

    def _show(self, name: str, activity: str) -> None:
        if self.stream.isatty():
            self._write(f"\x1b[2K{self._line()}\r")
        elif self._shown.get(name) != activity:
            self._shown[name] = activity
            self._write(f"{name}: {activity} ({time.monotonic() - self._began:.1f} s)\n")

    def _line(self) -> str:
        fractions = [fraction for _, fraction in self._loading.values()]
        done = (len(self._ready) + sum(fractions)) / self.total
        bar = "━" * round(done * _BAR)
        busy = next((f"{name}: {activity}" for name, (activity, _) in self._loading.items()), "starting")
        return f"{bar:─<{_BAR}} {done:4.0%}  {busy}"[:79]

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
