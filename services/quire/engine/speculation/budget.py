"""How many drafts each sequence verifies in a step: as many as make the batch fastest, which may be none.

A draft that is kept saves its sequence a step and one that is not costs its share of one, so what counts is the tokens
that are expected of a step divided by the time it takes. Idea: Liu et al., "Optimizing Speculative Decoding for Serving
Large Language Models Using Goodput", arXiv 2406.14066.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from quire.engine.speculation.cost import PassCost, StepCost

# Drafts must be expected to win so much: less is within what can be measured.
_WORTH = 1.01


class Offer(NamedTuple):
    """`num_drafts` drafts, each kept with probability `rate` if those before it are."""

    num_drafts: int
    rate: float


def choose(offers: Sequence[Offer], num_decodes: int, num_tokens: int, cost: StepCost) -> list[int]:
    """How many of each offer's drafts to verify in a step that computes `num_tokens` tokens without any, of which
    `num_decodes` each draw the next one."""
    if not any(offer.num_drafts for offer in offers) or not cost.knows(num_tokens):
        return [0] * len(offers)
    counts = np.array([offer.num_drafts for offer in offers])
    rates = np.array([offer.rate for offer in offers])
    owners = np.repeat(np.arange(len(offers)), counts)
    nth = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
    # Falls along each offer, so that the best of all never takes one without those before it.
    gains = rates[owners] ** nth
    order = np.argsort(-gains, kind="stable")
    expected = num_decodes + np.concatenate(([0.0], np.cumsum(gains[order])))
    speed = expected / cost.seconds(num_tokens + np.arange(len(expected)))
    best = int(np.argmax(speed))
    if speed[best] < _WORTH * speed[0]:
        return [0] * len(offers)
    chosen: list[int] = np.bincount(owners[order[:best]], minlength=len(offers)).tolist()
    return chosen


def choose_places(
    rates: Sequence[float], most: int, num_decodes: int, num_tokens: int, cost: StepCost, passes: PassCost
) -> int:
    """For how many places the device is to make drafts, of all sequences with these rates together.

    `num_decodes` and `num_tokens` as in `choose`. A place costs a pass, whether or not its drafts are verified then.
    """
    if not rates or not most or not cost.knows(num_tokens):
        return 0
    gains = np.array(rates)[:, None] ** np.arange(1, most + 1)
    expected = num_decodes + np.concatenate(([0.0], np.cumsum(gains.sum(0))))
    places = np.arange(most + 1)
    speed = expected / (cost.seconds(num_tokens + len(rates) * places) + places * passes.seconds)
    best = int(np.argmax(speed))
    return best if speed[best] >= _WORTH * speed[0] else 0
