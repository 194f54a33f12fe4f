"""What a step of so many tokens costs, learned from the steps that run."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Up to so many tokens each number of them is measured for itself, above that eight per octave.
_EXACT = 16

# How far one measurement moves the estimate of its own size, and those of all sizes: machines slow down, which changes
# all of them alike.
_OWN, _COMMON = 0.2, 0.05
# What earlier measurements still count for when a step has told what reading a context costs, and how far contexts of
# one size must have been apart, in squares of tokens added up, to tell it: a few tokens more are less than the noise.
_KEPT, _APART = 0.998, 4e6

# The first measurements of a size may include what is done once: the least of so many is taken. Until there are so
# many, the last one counts for so many steps; then it has to be tried again.
_FIRST, _TRUSTED = 3, 128
# What was measured less than so often may still include what takes long in the beginning only, and nobody would try
# again what is believed to cost that much: it counts for so many steps, and then each time for twice as many.
_OFTEN, _BELIEVED = 16, 1024
# Sizes whose steps take about the same differ by at most this share.
_NEAR = 0.25
# A pause of the machine says nothing about a step.
_LONGEST = 2.0
# What a step takes at least without its context, of what one of its size took: however wrong the price is.
_LEAST = 0.1


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


class _Curve(NamedTuple):
    """Of the sizes whose measurements count: they, what they took, and with how much context."""

    sizes: npt.NDArray[np.float64]
    seconds: npt.NDArray[np.float64]
    contexts: npt.NDArray[np.float64]


@dataclass(slots=True)
class Belief:
    """In what was measured `count` times, the last time in step `seen_at`: it `lasts` for so many steps."""

    seen_at: int
    count: int = 1
    lasts: int = _BELIEVED

    def has_ended(self, step: int) -> bool:
        """Whether it is to be measured again before it counts."""
        return self.count < _OFTEN and step - self.seen_at >= self.lasts

    def confirm(self, step: int) -> bool:
        """It was measured again; returns whether for the first time, since what was known before has ended."""
        if self.has_ended(step):
            self.count, self.lasts = 0, 2 * self.lasts
        self.count += 1
        self.seen_at = step
        return self.count == 1

    @property
    def is_young(self) -> bool:
        """Whether the least of its measurements counts."""
        return self.count <= _FIRST


@dataclass(slots=True)
class _Measured:
    """Of one size: means that follow what was measured last."""

    seconds: float
    context: float
    belief: Belief


def _at(seconds: npt.ArrayLike, away: npt.ArrayLike, price: float) -> npt.NDArray[np.float64]:
    """What took so long with a context that is `away` tokens more, each of which costs `price`."""
    took = np.asarray(seconds)
    found: npt.NDArray[np.float64] = np.maximum(_LEAST * took, took + price * np.asarray(away))
    return found


class StepCost:
    """Seconds of a step, with drafts and without.

    What one takes without is learned from such steps where there were any: one of as many tokens, some of them drafts,
    is of fewer sequences, and the host's part of it another.
    """

    def __init__(self) -> None:
        self._any, self._without = _StepCurve(), _StepCurve()

    def record(self, num_tokens: int, seconds: float, context: int = 0, *, has_drafts: bool = False) -> None:
        """A step of so many tokens, `has_drafts` being made or verified, took so long; `context` as in `seconds`."""
        self._any.record(num_tokens, seconds, context)
        if has_drafts:
            self._without.grow_older(1)
        else:
            self._without.record(num_tokens, seconds, context)

    def grow_older(self, num_steps: int) -> None:
        """So many steps were of no interest."""
        self._any.grow_older(num_steps)
        self._without.grow_older(num_steps)

    @property
    def price(self) -> float:
        """Seconds for a token of context; 0 until it is known."""
        return self._any.price

    def knows(self, num_tokens: int) -> bool:
        """Whether what so few tokens take without drafts can be told."""
        return self._without.knows(num_tokens) or self._any.knows(num_tokens)

    def was_measured(self, num_tokens: int) -> bool:
        """Whether steps of about so many tokens were, without drafts, often enough."""
        return self._without.was_measured(num_tokens)

    def seconds_without(self, num_tokens: int, context: int = 0) -> float:
        """Of a step without drafts, as in `seconds`."""
        curve = self._without if self._without.knows(num_tokens) else self._any
        return float(curve.seconds(np.array([num_tokens]), context)[0])

    def seconds(self, num_tokens: npt.NDArray[np.int64], context: int = 0) -> npt.NDArray[np.float64]:
        """Of steps of so many tokens each, never less for more of them, whose sequences have `context` tokens in all,
        whether or not they have drafts."""
        return self._any.seconds(num_tokens, context)


class _StepCurve:
    """Seconds of a step: a curve by number of tokens, and a price for each token of context that it reads.

    The price is what the steps of one size tell by their different contexts: without it what a large batch took would
    be what many drafts cost a small one.
    """

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._measured: dict[int, _Measured] = {}
        self._step = 0
        self._curve: _Curve | None = None  # until another step is recorded
        # Of contexts and seconds around the means of their size: sums of squares and of products.
        self._squares = self._products = 0.0

    def record(self, num_tokens: int, seconds: float, context: int = 0) -> None:
        """A step of so many tokens took so long."""
        size = _size(num_tokens)
        known = self._measured.get(size)
        self._step += 1
        self._curve = None
        if known is None:
            insort(self._sizes, size)
            self._measured[size] = _Measured(seconds, context, Belief(self._step))
            return
        is_first = known.belief.confirm(self._step)
        away = context - known.context
        expected = float(_at(known.seconds, away, self.price))
        if known.belief.is_young:
            if is_first or seconds < expected:
                known.seconds, known.context = seconds, context
            return
        seconds = min(seconds, _LONGEST * expected)
        self._squares = _KEPT * self._squares + away * away
        self._products = _KEPT * self._products + away * (seconds - known.seconds)
        for other in self._measured.values():
            other.seconds *= 1.0 + _COMMON * (seconds / expected - 1.0)
        known.seconds += _OWN * (seconds - known.seconds)
        known.context += _OWN * away

    def grow_older(self, num_steps: int) -> None:
        """So many steps were ones of which nothing is recorded here."""
        self._step += num_steps
        self._curve = None

    @property
    def price(self) -> float:
        """Seconds for a token of context; 0 until it is known."""
        return max(0.0, self._products / (self._squares + _APART))

    def knows(self, num_tokens: int) -> bool:
        """Whether so few tokens were measured, or two larger sizes: what more of them cost can't be told without."""
        known = self._known.sizes
        return len(known) > 1 or (len(known) == 1 and bool(known[0] <= num_tokens))

    def was_measured(self, num_tokens: int) -> bool:
        """Whether steps of about so many were, often enough."""
        return any(
            one.belief.count >= _FIRST and abs(size - num_tokens) <= _NEAR * num_tokens
            for size, one in self._measured.items()
        )

    def seconds(self, num_tokens: npt.NDArray[np.int64], context: int = 0) -> npt.NDArray[np.float64]:
        """Of steps of so many tokens each, never less for more of them, whose sequences have `context` tokens in all.

        Those between two that are known are in proportion, and fewer than all of them go on as the two smallest do: the
        sequences of a batch that ends become fewer all the time. Larger ones than all of them count as the largest:
        they have to be tried to be known.
        """
        known, took, contexts = self._known
        curve = np.maximum.accumulate(_at(took, context - contexts, self.price))
        slope = curve[0] / known[0]
        if len(known) > 1:
            slope = min(slope, (curve[1] - curve[0]) / (known[1] - known[0]))
        below = slope * np.maximum(known[0] - num_tokens, 0)
        found: npt.NDArray[np.float64] = np.interp(num_tokens, known, curve) - below
        return found

    @property
    def _known(self) -> _Curve:
        if self._curve is None:
            known = [(size, one) for size in self._sizes if self._is_known((one := self._measured[size]).belief)]
            rows = [(size, one.seconds, one.context) for size, one in known]
            self._curve = _Curve(*np.array(rows, dtype=np.float64).reshape(-1, 3).T)
        return self._curve

    def _is_known(self, belief: Belief) -> bool:
        return not belief.has_ended(self._step) and (belief.count >= _FIRST or self._step - belief.seen_at < _TRUSTED)


def _size(num_tokens: int) -> int:
    if num_tokens <= _EXACT:
        return num_tokens
    step = 1 << (num_tokens.bit_length() - 4)
    return num_tokens // step * step
