"""A draft source that knows what will be drawn, and is wrong as often as it is told to be."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from quire.engine.speculation.cost import StepCost
from quire.engine.speculation.drafts import DraftRequest


class FreeSteps(StepCost):
    """As if tokens cost nothing, so that whatever may be right is verified."""

    def knows(self, num_tokens: int) -> bool:
        return True

    def seconds_without(self, num_tokens: int, context: int = 0) -> float:
        return 1.0

    def seconds(self, num_tokens: npt.NDArray[np.int64], context: int = 0) -> npt.NDArray[np.float64]:
        return np.ones(np.shape(num_tokens))


@dataclass(frozen=True)
class Drafted:
    """`quire.engine.speculation.drafts.DraftTicket`: they are there at once."""

    found: Mapping[int, tuple[int, ...]]

    def wait(self) -> Mapping[int, tuple[int, ...]]:
        return self.found


@dataclass
class Oracle:
    """`quire.engine.speculation.drafts.DraftSource`. `whole(key)` are all tokens that a request will have in the end.

    Each token that it proposes is right with probability `quality`; with 0 all are wrong. It proposes beyond the end
    of outputs, too: a real one knows as little about where they end.
    """

    whole: Callable[[int], Sequence[int]]
    quality: float
    vocab_size: int
    random: random.Random = field(default_factory=lambda: random.Random(0))
    told: dict[int, list[int]] = field(default_factory=dict)
    num_proposed: int = 0

    def begin(self, requests: Sequence[DraftRequest], released: Sequence[int]) -> Drafted:
        for key in released:
            self.told.pop(key, None)
        found = {}
        for request in requests:
            told, now = self.told.setdefault(request.sequence, []), list(request.token_ids)
            assert now[: len(told)] == told, "a drafter can't take tokens back"
            told[:] = now
            found[request.sequence] = self._propose(request, now)
        return Drafted(found)

    def close(self) -> None:
        """Holds nothing."""

    def _propose(self, request: DraftRequest, now: list[int]) -> tuple[int, ...]:
        truth = [*self.whole(request.sequence)][len(now) :][: request.num_tokens]
        truth += [0] * (request.num_tokens - len(truth))
        wrong = [self.random.random() >= self.quality for _ in truth]
        self.num_proposed += len(truth)
        return tuple((token + 1) % self.vocab_size if bad else token for token, bad in zip(truth, wrong, strict=True))
