"""How many drafts each sequence verifies in a step: as many as make the batch fastest, which may be none.

A draft that is kept saves its sequence a step and one that is not costs its share of one, so what counts is the tokens
that are expected of a step divided by the time it takes. Siblings, second choices beside a sequence's first drafts,
compete with drafts for the same rows: a tree where it is worth more than a longer chain. Idea: Liu et al.,
"Optimizing Speculative Decoding for Serving Large Language Models Using Goodput", arXiv 2406.14066.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from quire.engine.speculation.cost import PassCost, StepCost

# Drafts must be expected to win so much: less is within what can be measured. To make them for a batch must win more:
# requests whose drafts are right end sooner, and leave the others in smaller batches.
_WORTH, _WORTH_IN_BATCHES = 1.01, 1.05


class Offer(NamedTuple):
    """`num_drafts` drafts, each kept with probability `rate` if those before it are, and beside the first of them
    `num_siblings`, each kept with probability `second_rate` if the draft beside it is the first that is not."""

    num_drafts: int
    rate: float
    num_siblings: int = 0
    second_rate: float = 0.0


class Choice(NamedTuple):
    """How much of an offer to verify."""

    num_drafts: int
    num_siblings: int


class Base(NamedTuple):
    """A step without drafts: its tokens, of which `num_decodes` each draw the next one and `num_prompt` are of prompts;
    its sequences have `context` tokens in all."""

    num_tokens: int
    num_decodes: int
    num_prompt: int = 0
    context: int = 0

    def seconds(self, cost: StepCost, extra: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """With `extra` tokens more, and without what the prompts' cost, which is to be paid in any case: as a part of
        what the decodes take it would make drafts look cheap while there are prompts. As many as `extra` has."""
        without = cost.seconds_without(self.num_tokens, self.context)
        seconds = np.maximum(without, cost.seconds(self.num_tokens + extra, self.context))
        seconds[extra == 0] = without
        if self.num_prompt:
            seconds -= without - cost.seconds_without(self.num_tokens - self.num_prompt, self.context)
        return seconds


def choose(offers: Sequence[Offer], base: Base, cost: StepCost) -> list[Choice]:
    """What of each offer to verify in a step that is `base` without any."""
    nothing = [Choice(0, 0)] * len(offers)
    if not any(offer.num_drafts for offer in offers) or not cost.knows(base.num_tokens):
        return nothing
    num_drafts, rates, num_siblings, second_rates = (np.array(column) for column in zip(*offers, strict=True))
    owners, nth = _places(num_drafts)
    # Falls along each offer, so that the best of all never takes one without those before it, nor a sibling without the
    # draft beside it.
    gains, beside = rates[owners] ** nth, owners[:0]
    if num_siblings.any():
        beside, depths = _places(num_siblings)
        seconds = rates[beside] ** (depths - 1) * (1.0 - rates[beside]) * second_rates[beside]
        gains = np.concatenate((gains, np.minimum(seconds, rates[beside] ** depths)))
    order = (-gains).argsort(kind="stable")
    expected = np.full(1 + len(order), float(base.num_decodes))
    expected[1:] += gains[order].cumsum()
    speed = expected / base.seconds(cost, np.arange(len(expected)))
    best = int(speed.argmax())
    if speed[best] < _WORTH * speed[0]:
        return nothing
    chosen = order[:best]
    drafts = np.bincount(owners[chosen[chosen < len(owners)]], minlength=len(offers))
    siblings = np.bincount(beside[chosen[chosen >= len(owners)] - len(owners)], minlength=len(offers))
    return list(map(Choice, drafts.tolist(), siblings.tolist()))


def _places(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """So many places of each offer, all of them in a row: whose each is, and which of its own, from 1."""
    owners = np.arange(len(counts)).repeat(counts)
    return owners, np.arange(len(owners)) - (counts.cumsum() - counts).repeat(counts) + 1


def choose_places(
    rates: Sequence[float],
    second_rates: Sequence[float],
    most: int,
    base: Base,
    cost: StepCost,
    passes: PassCost,
    share: float = 0.0,
) -> int:
    """For how many places the device is to make drafts, of all sequences with these rates together, as in `Offer`; the
    second rate of one whose drafts get no siblings is 0.

    A place costs a pass, whether or not its drafts are verified then, and all of them together this share of a step at
    least.
    """
    if not rates or not most:
        return 0
    worth = _WORTH_IN_BATCHES - (_WORTH_IN_BATCHES - _WORTH) / max(1, base.num_decodes)
    gained = len(rates) * _most_gained(max(rates), max(second_rates, default=0.0), most)
    # Even if passes and rows took no time; mostly nothing is worth it, and that is seen soonest.
    if base.num_decodes + gained < worth * (1.0 + share) * base.num_decodes or not cost.knows(base.num_tokens):
        return 0
    places, chances = np.arange(most + 1), np.array(rates)[:, None]
    right: npt.NDArray[np.float64] = chances ** places[1:]
    # As chains, or with siblings wherever there may be some, if that is faster.
    gains, rows = [right.sum(0)], [len(rates)]
    if any(second_rates):
        seconds = np.array(second_rates)[:, None]
        beside = chances ** places[:-1] * (1.0 - chances) * seconds
        gains.append((right + beside).sum(0))
        rows.append(len(rates) + int(np.count_nonzero(seconds)))
    expected = np.full((len(rows), most + 1), float(base.num_decodes))
    expected[:, 1:] += np.array(gains).cumsum(1)
    took = base.seconds(cost, np.array(rows)[:, None] * places) + places * passes.seconds
    if share:
        took[:, 1:] = np.maximum(took[:, 1:], (1.0 + share) * took[0, 0])
    speed = (expected / took).max(0)
    best = int(speed.argmax())
    return best if speed[best] >= worth * speed[0] else 0


def _most_gained(rate: float, second_rate: float, most: int) -> float:
    """Tokens that up to `most` places of a sequence with these rates are expected to win, each with a sibling."""
    first = rate + (1.0 - rate) * second_rate
    return first * sum([rate**place for place in range(most)])
