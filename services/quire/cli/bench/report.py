"""What was measured of the engine, as a table for people and JSON for programs, with all that it takes to compare."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shlex
import signal
import statistics
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quire.service.errors import ConfigError

STOPPED = 128 + signal.SIGINT

_PACKAGES = ("quire", "torch", "triton", "transformers", "numpy")


@dataclass(frozen=True, slots=True)
class Spread:
    """A number that was measured once a round."""

    rounds: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """At least one value."""
        return cls(tuple(values))

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.rounds)

    def __str__(self) -> str:
        if min(self.rounds) == max(self.rounds):
            return number(self.median)
        return f"{number(self.median)} ({number(min(self.rounds))} to {number(max(self.rounds))})"

    def to_json(self) -> dict[str, Any]:
        """With each round's, in their order."""
        return {
            "median": self.median,
            "min": min(self.rounds),
            "max": max(self.rounds),
            "rounds": list(self.rounds),
        }


Value = str | int | float | Spread | None


@dataclass(slots=True)
class Report:
    """One benchmark's rows. `columns`: their members and what they are called in the table; JSON has members besides.

    `stopped`: by Ctrl-C; the rows are those that were measured before.
    """

    benchmark: str
    command: str
    settings: Mapping[str, Any]
    columns: Mapping[str, str]
    model: str = ""
    device: Mapping[str, Any] = field(default_factory=dict)
    start_seconds: Mapping[str, float] = field(default_factory=dict)
    rows: list[dict[str, Value]] = field(default_factory=list)
    stopped: bool = False
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def add(self, **row: Value) -> None:
        """Adds a row."""
        self.rows.append(row)

    def table(self) -> str:
        """Title and table, for a terminal."""
        device = " ".join(str(self.device[name]) for name in ("name", "dtype") if name in self.device)
        lines = [f"{self.benchmark}: {self.model}, {device}"]
        if self.rows:
            lines += _aligned(
                [list(self.columns.values())] + [[_cell(row.get(name)) for name in self.columns] for row in self.rows]
            )
        if any(isinstance(value, Spread) and len(value.rounds) > 1 for row in self.rows for value in row.values()):
            lines.append("medians of the rounds (lowest to highest)")
        if self.stopped:
            lines.append("stopped: the rows are those that were measured before" if self.rows else "stopped")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """All of it; times are in seconds, rates per second."""
        return {
            "benchmark": self.benchmark,
            "command": self.command,
            "date": self.date,
            "model": self.model,
            "device": dict(self.device),
            "versions": versions(),
            "settings": dict(self.settings),
            "start_seconds": dict(self.start_seconds),
            "stopped": self.stopped,
            "rows": [{name: _plain(value) for name, value in row.items()} for row in self.rows],
        }


class JsonFile:
    """Where a flag has numbers written to. Whether it can be written is found out when this is made, not when all is
    measured: raises ConfigError."""

    def __init__(self, flag: str, path: str) -> None:
        self._flag = flag
        self._path = Path(path)
        with self._writing():
            self._path.open("a").close()

    def write(self, numbers: Mapping[str, Any]) -> None:
        """Raises ConfigError."""
        with self._writing():
            self._path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")

    @contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{self._flag} {self._path} can't be written ({error.strerror}): name another file"
            ) from error


def begin(
    benchmark: str, argv: Sequence[str], arguments: argparse.Namespace, columns: Mapping[str, str]
) -> tuple[Report, JsonFile | None]:
    """An empty report of `quire bench BENCHMARK ARGV…`, and where --out wants it. Raises ConfigError."""
    out = JsonFile("--out", arguments.out) if arguments.out else None
    command = shlex.join(["quire", "bench", benchmark, *argv])
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    return Report(benchmark, command, settings, columns), out


def finish(report: Report, out: JsonFile | None) -> int:
    """Prints the report, writes it, and returns the exit status."""
    print(report.table())
    if out is not None:
        out.write(report.to_json())
    return STOPPED if report.stopped else 0


def number(value: float) -> str:
    """With about four digits."""
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    places = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{places}f}"


def versions() -> dict[str, str]:
    """Of Python and the packages that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cell(value: Value) -> str:
    if value is None:
        return ""
    return number(value) if isinstance(value, int | float) else str(value)


def _plain(value: Value) -> Any:
    return value.to_json() if isinstance(value, Spread) else value


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column on the left, the others on the right. By hand, as rich is a terminal's package."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines
