"""How often drafts turn out right, by who made them and for whom."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.engine.speculation.drafts import Drafter

# Weight of one draft in its sequence's rate, and in that of all sequences, which a new one begins with. The first ones
# weigh more: what a rate begins with counts as so many drafts.
_NEWEST, _NEWEST_OF_ALL = 0.03, 0.01
_BEGINNING = 2
_UNKNOWN = 0.6
# Of second choices, of which fewer are seen: one where a draft is wrong.
_NEWEST_SECOND, _UNKNOWN_SECOND = 0.02, 0.2


@dataclass(slots=True)
class _Rate:
    """By so many drafts."""

    rate: float
    count: int = 0


@dataclass(slots=True)
class Rates:
    """The probability that a draft is right if those before it are: moving averages by drafter."""

    newest: float = _NEWEST
    start: Rates | None = None
    known: dict[Drafter, _Rate] = field(default_factory=dict)

    @classmethod
    def of_all(cls) -> Rates:
        """Of all sequences together."""
        return cls(_NEWEST_OF_ALL)

    def __getitem__(self, drafter: Drafter) -> float:
        known = self.known.get(drafter)
        if known is not None:
            return known.rate
        return self.start[drafter] if self.start is not None else _UNKNOWN

    def record(self, drafter: Drafter, num_right: int, wrong: bool) -> None:
        """So many drafts were right, one after another, and then one was wrong, or there was no other."""
        known = self.known.get(drafter)
        if known is None:
            known = self.known[drafter] = _Rate(self[drafter])
        known.count += num_right + wrong
        kept = 1.0 - max(self.newest, 1.0 / (_BEGINNING + known.count))
        rate = 1.0 - (1.0 - known.rate) * kept**num_right
        known.rate = rate * kept if wrong else rate


@dataclass(slots=True)
class SecondRate:
    """The probability that a drafter's second choice is right where its first is wrong: a moving average."""

    rate: float = _UNKNOWN_SECOND

    def record(self, right: bool) -> None:
        """A draft was wrong, and what it had as its second choice was `right` or not."""
        self.rate += _NEWEST_SECOND * (right - self.rate)
