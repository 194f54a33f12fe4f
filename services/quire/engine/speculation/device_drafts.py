"""For how many places the device is to make drafts. Called by the speculator, before each step that decides on drafts.

Where drafts are not worth their passes it still makes one now and then, to see whether they have become so.
"""

from __future__ import annotations

from collections.abc import Sequence

from quire.engine.speculation.budget import Base, choose_places
from quire.engine.speculation.cost import PassCost, StepCost
from quire.engine.speculation.step_watch import StepWatch

# In so many of as many steps. Several in a row: the drafter has forgotten the text by then, and remembers it a token a
# step. Of all sequences in the same steps: a pass takes nearly as long for few as for many.
_PROBES, _PROBED = 4, 40
# That is to cost this share of the time at most: where a device waits for the host, there are more steps in between.
_PROBE_SHARE = 0.01

# While nothing is worth it, that is thought over once in so many steps.
_REST = 16

# What the device is to draft for a prompt's end before it is known what that is worth.
_FIRST_PLACES = 3


class DeviceDrafts:
    """Of an engine whose device drafts up to `most` tokens of a sequence and step, 0: it has no drafter.

    `num_places` is how many were worth it last.
    """

    def __init__(self, most: int, cost: StepCost, passes: PassCost, watch: StepWatch) -> None:
        self.num_places = min(most, _FIRST_PLACES)
        self._most, self._cost, self._passes, self._watch = most, cost, passes, watch
        # Steps since drafts were last worth their passes, or were looked for, and those to look for them.
        self._num_idle = self._num_probes = 0

    def decide(self, rates: Sequence[float], second_rates: Sequence[float], base: Base) -> int:
        """How many drafts each of some sequences is to get behind its next token; arguments as for `choose_places`."""
        share = self._watch.believed_share
        places = choose_places(rates, second_rates, self._most, base, self._cost, self._passes, share)
        self.num_places = places
        looks = places > 0 and not base.num_prompt and self._watch.must_look(base.num_tokens)
        if places:
            self._num_idle = self._num_probes = 0
            return 0 if looks else places
        if self._num_probes:
            self._num_probes -= 1
        elif self._num_until_probes > 1:
            self._num_idle += 1
        else:
            self._num_idle, self._num_probes = 0, _PROBES
        return int(self._num_probes > 0)

    def rest(self, most: int) -> int:
        """For how many steps, up to `most`, `decide` need not be asked: it would say 0."""
        if not self._num_idle:
            return 0
        steps = max(0, min(_REST, self._num_until_probes, most) - 1)
        self._num_idle += steps
        self._watch.grow_older(steps)
        return steps

    @property
    def _num_until_probes(self) -> int:
        return max(1, self._watch.steps_between(_PROBES, _PROBED, _PROBE_SHARE) - _PROBES - self._num_idle)
