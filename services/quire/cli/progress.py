"""What `quire serve` shows while the services load: a bar in a terminal, lines in a log."""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TextIO

_CELLS = 20
_CLEAR_LINE = "\x1b[2K\r"

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class LoadProgress:
    """How far `total` processes are: on the last line of `stream`, a terminal, if `bar`, in the log if not.

    Whatever else goes to `stream` meanwhile has to go through `write`, which keeps the bar below it.
    """

    total: int
    stream: TextIO
    bar: bool
    _ready: set[str] = field(default_factory=set)
    _loading: dict[str, tuple[str, float]] = field(default_factory=dict)
    # What is on the screen now.
    _shown: str = ""

    def loading(self, name: str, activity: str, fraction: float) -> None:
        """`name` is busy with `activity`; `fraction` of its loading is done, 0 to 1."""
        before, _ = self._loading.get(name, ("", 0.0))
        self._loading[name] = (activity, fraction)
        if self.bar:
            self._draw(self._line())
        elif activity != before:
            logger.info("%s: %s", name, activity)

    def ready(self, name: str) -> None:
        """`name` is ready. Its own log says so, too."""
        self._ready.add(name)
        self._loading.pop(name, None)
        if self.bar:
            self._draw(self._line())

    def write(self, line: str) -> None:
        """Writes a line above the bar."""
        self._put(f"{_CLEAR_LINE}{line}\n{self._shown}" if self._shown else f"{line}\n")

    def clear(self) -> None:
        """Takes the bar away, and the ^C with which a terminal shows that it was pressed."""
        if self.bar:
            self._shown = ""
            self._put(_CLEAR_LINE)

    def _draw(self, line: str) -> None:
        if line != self._shown:
            self._shown = line
            self._put(f"{_CLEAR_LINE}{line}")

    def _line(self) -> str:
        fractions = [fraction for _, fraction in self._loading.values()]
        done = (len(self._ready) + sum(fractions)) / self.total
        busy = next((f"{name}: {activity}" for name, (activity, _) in self._loading.items()), "starting")
        line = f"{'━' * round(done * _CELLS):─<{_CELLS}} {done:4.0%}  {busy}"
        return line[: shutil.get_terminal_size().columns - 1]

    def _put(self, text: str) -> None:
        # A terminal that was closed takes nothing; that must not keep the services from being stopped.
        with suppress(OSError):
            self.stream.write(text)
            self.stream.flush()
