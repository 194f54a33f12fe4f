"""Steps with masks, which they may wait for, and steps without: what one kind takes says nothing of the other.

Called by the speculator.
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.engine.speculation.cost import PassCost, StepCost
from quire.engine.speculation.device_drafts import DeviceDrafts
from quire.engine.speculation.step_watch import StepTime, StepWatch


@dataclass(frozen=True, slots=True)
class StepKind:
    """What its steps cost, and what is drafted for them."""

    cost: StepCost
    watch: StepWatch
    device: DeviceDrafts

    @classmethod
    def new(cls, cost: StepCost, passes: PassCost, most: int) -> StepKind:
        """The device, if it has a drafter, makes up to `most` drafts of a sequence."""
        watch = StepWatch(cost, passes)
        return cls(cost, watch, DeviceDrafts(most, cost, passes, watch))


class StepKinds:
    """Of one engine, whose device drafts up to `most` tokens of a sequence and step. `next` is the next step's."""

    def __init__(self, most: int, cost: StepCost | None) -> None:
        """`cost`: of both kinds, for tests; None: each has its own."""
        passes = PassCost()
        self._plain, self._masked = (StepKind.new(cost or StepCost(), passes, most) for _ in range(2))
        self.next = self._last = self._plain

    def expect(self, *, masked: bool) -> StepKind:
        """Whether some tokens' choice is bound by grammars in the next step."""
        self.next = self._masked if masked else self._plain
        return self.next

    def observe(self, measured: StepTime | None) -> None:
        """A step was read; None: it compiled or captured something, which held up the one before it, too."""
        kind = self._last if measured is None else self._masked if measured.masked else self._plain
        if kind is not self._last:
            # What comes before and after a step tells only with its like what it took.
            self._last.watch.observe(None)
            self._last = kind
        kind.watch.observe(measured)
