"""Engines on trial beside the others: which share of the requests they get.

Discovery says which engines those are, `fleet` asks here before it chooses; `metrics` counts what became of requests by
revision, so that whoever began the trial can end it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar


@dataclass(frozen=True, slots=True)
class Canary:
    """All engines of `revision` together get `percent` of the requests, as long as there are others."""

    revision: str
    percent: int


class Engine(Protocol):
    """What is asked of an engine here."""

    canary: Canary | None


_Engine = TypeVar("_Engine", bound=Engine)


class Split:
    """Deals requests out between the engines on trial and the others: evenly, so that any number has its share."""

    def __init__(self) -> None:
        self._due = 0

    def side(self, engines: list[_Engine], *, moved: bool) -> list[_Engine]:
        """Those of `engines` that a request may go to. One that has `moved` goes to none that is on trial."""
        on_trial = [engine for engine in engines if engine.canary is not None]
        others = [engine for engine in engines if engine.canary is None]
        if not on_trial or not others:
            return engines
        if moved:
            return others
        self._due += next(engine.canary.percent for engine in on_trial if engine.canary is not None)
        if self._due < 100:
            return others
        self._due -= 100
        return on_trial
