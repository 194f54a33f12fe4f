"""What becomes of a canary: whether its step goes on, the next one begins, or its engines are rolled back. Pure.

`scaler` counts, `rollout` asks. What failed is compared with the other engines, too: a fault that all have in common,
such as too much load, says nothing about the new ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from quire.operator.rollout_spec import Canary

# A router's counters: by revision and outcome.
Attempts: TypeAlias = Mapping[tuple[str, str], float]

_FAILED = "failed"


class Judgement(Enum):
    """What to do with a canary."""

    WAIT = "wait"
    ADVANCE = "advance"
    ROLL_BACK = "roll back"


@dataclass(frozen=True, slots=True)
class Tally:
    """Requests that some engines had, and how many of them failed."""

    requests: float = 0.0
    failed: float = 0.0

    @property
    def share(self) -> float:
        """Of those that failed."""
        return self.failed / self.requests if self.requests else 0.0

    def plus(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(self.requests + other.requests, self.failed + other.failed)


@dataclass(frozen=True, slots=True)
class Trial:
    """What has been counted since a step of a canary began: of the new engines, and of the others."""

    new: Tally = field(default_factory=Tally)
    others: Tally = field(default_factory=Tally)

    def plus(self, counted: Mapping[str, Tally], revision: str) -> Trial:
        """With what was counted by revision since."""
        nothing = Tally()
        return Trial(
            self.new.plus(counted.get(revision, nothing)),
            # Routers call none of the others' revisions by its name.
            self.others.plus(counted.get("", nothing)),
        )


def judge(policy: Canary, trial: Trial, seconds: float) -> Judgement:
    """What follows from a step that has lasted `seconds`.

    Failures count against at least `min_requests`: few of few may be chance, but as many as all of those could not
    make good are too many already.
    """
    share = trial.new.failed / max(trial.new.requests, policy.min_requests, 1)
    if share > policy.max_error_percent / 100:
        return Judgement.ROLL_BACK if share > trial.others.share else Judgement.WAIT
    has_enough = trial.new.requests >= policy.min_requests
    return Judgement.ADVANCE if has_enough and seconds >= policy.interval_seconds else Judgement.WAIT


def counted(before: Mapping[str, Attempts], now: Mapping[str, Attempts]) -> dict[str, Tally]:
    """By revision, what routers counted between the two. One that is new, or went back, counts from zero."""
    found: dict[str, Tally] = {}
    for router, counters in now.items():
        old = before.get(router, {})
        has_restarted = any(value < old.get(key, 0.0) for key, value in counters.items())
        for (revision, outcome), value in counters.items():
            more = value - (0.0 if has_restarted else old.get((revision, outcome), 0.0))
            tally = Tally(more, more if outcome == _FAILED else 0.0)
            found[revision] = found.get(revision, Tally()).plus(tally)
    return found
