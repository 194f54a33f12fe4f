"""What a step of so many tokens costs, learned from the steps that run."""

from __future__ import annotations

from bisect import insort

import numpy as np
import numpy.typing as npt

# Up to so many tokens each number of them is measured for itself, above that eight per octave.
_EXACT = 16

# How far one measurement moves the estimate of its own size, and those of all sizes: contexts grow and machines slow
# down, which changes all of them alike.
_OWN, _COMMON = 0.2, 0.05

# The first measurements of a size may include what is done once: the least of so many is taken. Until there are so
# many, the last one counts for so many steps; then it has to be tried again.
_FIRST, _TRUSTED = 3, 128
# A pause of the machine says nothing about a step.
_LONGEST = 2.0


class PassCost:
    """Seconds of one pass of a drafter on the device, which drafts one token for each sequence; 0 until it is known."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def record(self, num_passes: int, seconds: float) -> None:
        """So many passes took so long."""
        one = seconds / num_passes
        if self.seconds:
            one = self.seconds + _OWN * (min(one, _LONGEST * self.seconds) - self.seconds)
        self.seconds = one


class StepCost:
    """Seconds by number of tokens, a curve through what was measured."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._seconds: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._seen_at: dict[int, int] = {}
        self._step = 0

    def record(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        size = _size(num_tokens)
        known = self._seconds.get(size)
        self._step += 1
        self._seen_at[size] = self._step
        if known is None:
            insort(self._sizes, size)
            self._seconds[size], self._counts[size] = seconds, 1
            return
        self._counts[size] += 1
        if self._counts[size] <= _FIRST:
            self._seconds[size] = min(known, seconds)
            return
        change = min(seconds / known, _LONGEST) - 1.0
        for other in self._sizes:
            self._seconds[other] *= 1.0 + _COMMON * change
        self._seconds[size] = known * (1.0 + _OWN * change)

    def knows(self, num_tokens: int) -> bool:
        """Whether so few tokens were measured: what more of them cost can't be told without."""
        return any(size <= num_tokens and self._is_known(size) for size in self._sizes)

    def seconds(self, num_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Of steps of so many tokens each, never less for more of them.

        Those between two that are known are in proportion, and larger ones than all of them count as the largest: they
        have to be tried to be known.
        """
        known = [size for size in self._sizes if self._is_known(size)]
        curve = np.maximum.accumulate([self._seconds[size] for size in known])
        found: npt.NDArray[np.float64] = np.interp(num_tokens, known, curve)
        return found

    def _is_known(self, size: int) -> bool:
        return self._counts[size] >= _FIRST or self._step - self._seen_at[size] < _TRUSTED


def _size(num_tokens: int) -> int:
    if num_tokens <= _EXACT:
        return num_tokens
    step = 1 << (num_tokens.bit_length() - 4)
    return num_tokens // step * step
