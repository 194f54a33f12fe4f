"""What may follow one sequence, by whom it was drafted, and how good that was so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.engine.speculation.acceptance import Rates
from quire.engine.speculation.drafts import Drafter

# After an offer of the source's that was wrong from its first token on, its sequence waits for twice as many tokens as
# the time before.
_LONGEST_PAUSE = 16


@dataclass(slots=True)
class Prospect:
    """What is known of one sequence: by drafter, the tokens that it offers. The source is to be left alone up to
    `paused_to` tokens; `last_pause` is for how many it was the last time. `siblings` are beside the tokens that the
    device offers, and may be verified if it `branches`."""

    rates: Rates
    branches: bool
    offers: dict[Drafter, tuple[int, ...]] = field(default_factory=dict)
    siblings: tuple[int, ...] = ()
    paused_to: int = 0
    last_pause: int = 0

    def best(self) -> Drafter | None:
        """Whose offer is most likely to be right."""
        if len(self.offers) < 2:
            return next(iter(self.offers), None)
        return max(self.offers, key=lambda drafter: self.rates[drafter])

    def best_offer(self) -> tuple[Drafter, tuple[int, ...]]:
        """That offer, which may be of nothing."""
        drafter = self.best()
        return (Drafter.EAGLE, ()) if drafter is None else (drafter, self.offers[drafter])

    def leave_alone(self, num_tokens: int) -> None:
        """The source had nothing, or nothing right, for a sequence of so many: twice as long as the last time."""
        self.last_pause = min(_LONGEST_PAUSE, max(1, 2 * self.last_pause))
        self.paused_to = num_tokens + self.last_pause
