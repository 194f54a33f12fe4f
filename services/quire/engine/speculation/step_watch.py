"""What steps took, and of that what drafts cost the host. Called by the speculator.

Small models on fast GPUs wait for the host. A step with drafts takes longer there by what the host does for them,
however few they are, so what steps take without can't be read off theirs: now and then some are run without. And to
look whether drafts have become better costs more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from quire.engine.speculation.cost import Belief, PassCost, StepCost

# A device that the host waits for less than this share of a step waits for the host.
_WAITED = 0.1
# So many steps in a row are run without drafts, the first and last of which say nothing, after so many with.
_WITHOUT, _WITH = 6, 400
# Weight of the newest step in what looking for drafts costs. Of the first ones the least counts, since they may include
# what is done once, and a later one for so many times what was usual at most.
_NEWEST, _LONGEST = 0.1, 2.0


class StepTime(NamedTuple):
    """A step computed so many tokens, `num_drafts` of them drafts and siblings, of sequences with `context` tokens in
    all, in so long, None if that says nothing, of which the device spent `draft_seconds` on drafts for so many places,
    and the host waited for the device for `waited`, None if they take turns. `masked`: some tokens' choice was bound by
    grammars."""

    num_tokens: int
    context: int
    seconds: float | None
    num_places: int
    draft_seconds: float
    num_drafts: int = 0
    waited: float | None = None
    masked: bool = False

    @property
    def is_bound_by_host(self) -> bool:
        """Whether the device waited for the host."""
        return self.waited is not None and self.seconds is not None and self.waited < _WAITED * self.seconds

    def is_like(self, other: StepTime | None) -> bool:
        """Whether both make drafts, or none does, and both verify some, or none does."""
        return (
            other is not None
            and (self.num_places > 0) == (other.num_places > 0)
            and (self.num_drafts > 0) == (other.num_drafts > 0)
        )


class StepWatch:
    """Of one engine: tells `cost` and `passes` what steps took."""

    def __init__(self, cost: StepCost, passes: PassCost) -> None:
        self._cost, self._passes = cost, passes
        # Of the last step, until the next is read, and of the one before it.
        self._measured: StepTime | None = None
        self._earlier: StepTime | None = None
        self._is_bound = False
        self._num_without = self._num_with = 0  # steps to come without drafts, and those with some since the last ones
        self._step = 0
        self._share = 0.0
        self._belief: Belief | None = None  # in the share
        # The last step with drafts, until it is known what one without takes.
        self._latest: StepTime | None = None

    @property
    def share(self) -> float:
        """What a step with drafts takes longer than one without, as a share of that, if that is the host's doing."""
        return self._share if self._is_bound else 0.0

    @property
    def believed_share(self) -> float:
        """The same, unless it was measured so seldom that it is to be measured again."""
        has_ended = self._belief is None or self._belief.has_ended(self._step)
        return 0.0 if has_ended else self.share

    def observe(self, measured: StepTime | None) -> None:
        """A step was read; None: it compiled or captured something, which held up the one before it, too."""
        earlier, before = self._earlier, self._measured
        self._step += 1
        if measured is not None and before is not None:
            if before.num_places:
                self._passes.record(before.num_places, before.draft_seconds)
            # What the host does in a step that it holds up is for the steps before and after it, too.
            usual = not before.is_bound_by_host or (before.is_like(earlier) and before.is_like(measured))
            if before.seconds is not None and usual:
                self._learn(before, before.seconds)
        self._earlier, self._measured = before, measured

    def grow_older(self, num_steps: int) -> None:
        """So many steps will not be observed."""
        self._step += num_steps
        self._cost.grow_older(num_steps)

    def _learn(self, step: StepTime, seconds: float) -> None:
        # Of one that only makes drafts most is the host's, if it is bound by that.
        if not step.is_bound_by_host or step.num_drafts or not step.num_places:
            has_drafts = step.num_drafts + step.num_places > 0
            self._cost.record(step.num_tokens, seconds - step.draft_seconds, step.context, has_drafts=has_drafts)
        if step.num_places:
            self._is_bound, self._latest = step.is_bound_by_host, step
        latest = self._latest
        if latest is None or latest.seconds is None:
            return
        num_without = latest.num_tokens - latest.num_drafts
        if self._cost.was_measured(num_without):
            self._latest = None
            share = max(0.0, latest.seconds / self._cost.seconds_without(num_without, latest.context) - 1.0)
            self._take_share(share)

    def _take_share(self, share: float) -> None:
        if self._belief is None:
            self._belief, is_first = Belief(self._step), True
        else:
            is_first = self._belief.confirm(self._step)
        if self._belief.is_young:
            self._share = share if is_first else min(share, self._share)
            return
        # A pause of the machine says nothing.
        share = min(share, _LONGEST * (1.0 + self._share) - 1.0)
        self._share += _NEWEST * (share - self._share)

    def must_look(self, num_tokens: int) -> bool:
        """Whether the next step, of so many tokens without drafts, is to have none, to see how long that takes; to be
        asked before each step that is to have some."""
        if self._num_without:
            self._num_without -= 1
            return True
        self._num_with += 1
        if not self._is_bound or (self._num_with <= _WITH and self._cost.was_measured(num_tokens)):
            return False
        self._num_without, self._num_with = _WITHOUT - 1, 0
        return True

    def steps_between(self, num_probes: int, least: int, share: float) -> int:
        """In how many steps so many are to look for drafts; no fewer than `least`, and where the host holds up the
        device so many that this costs it `share` of the time."""
        return max(least, math.ceil(num_probes * self.share / share))
