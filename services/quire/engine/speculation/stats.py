"""What drafts did, counted for metrics, `quire top` and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.engine.speculation.drafts import Drafter


@dataclass(slots=True)
class SpeculationStats:
    """Counted since the start. `accepted_at[i]` of `verified_at[i]` drafts in place i of a step were right, or the
    sibling beside them: so were `accepted_siblings` of `verified_siblings`."""

    drafted: dict[str, int] = field(default_factory=lambda: dict.fromkeys((one.value for one in Drafter), 0))
    verified: dict[str, int] = field(default_factory=lambda: dict.fromkeys((one.value for one in Drafter), 0))
    accepted: dict[str, int] = field(default_factory=lambda: dict.fromkeys((one.value for one in Drafter), 0))
    verified_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    verified_siblings: int = 0
    accepted_siblings: int = 0

    def record(self, drafter: Drafter, verified: int, accepted: int, times: int = 1) -> None:
        """A step verified so many drafts of a sequence, and the first `accepted` were right; so often."""
        self.verified[drafter.value] += verified * times
        self.accepted[drafter.value] += accepted * times
        for counts, number in ((self.verified_at, verified), (self.accepted_at, accepted)):
            counts.extend([0] * (number - len(counts)))
            for place in range(number):
                counts[place] += times
