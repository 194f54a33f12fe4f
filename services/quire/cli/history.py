"""What `quire top` makes of an engine's counts: speeds between two looks, and the last minute's distributions.

An engine counts from its start on and keeps no history: whoever watches it subtracts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from quire.v1 import engine_pb2

# Distributions are of this long.
WINDOW_SECONDS = 60.0

# As many speeds as the widest terminal shows.
_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Speed:
    """Between two looks, in tokens per second: prompt tokens computed, and tokens drawn."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Window:
    """What happened in `seconds`, or since the engine's start if that is None. Times are in seconds.

    What never happened is None. `hit_rate`: the share of prompt tokens whose pages were there already.
    """

    seconds: float | None
    first_token: Quantiles | None
    inter_token: Quantiles | None
    queue: Quantiles | None
    step: Quantiles | None
    tokens_per_step: float | None
    hit_rate: float | None
    drafts: Drafts | None


@dataclass(frozen=True, slots=True)
class Drafts:
    """What became of drafted tokens. `drafters` are those whose drafts were verified, most of them first.

    `accepted`: the share of verified drafts that were right; `accepted_at`: that of each place in a step's drafts.
    `drawn_per_step`: the tokens that a step draws for a sequence, 1 without drafts.
    """

    drafters: tuple[str, ...]
    accepted: float
    accepted_at: tuple[float, ...]
    drawn_per_step: float


@dataclass(frozen=True, slots=True)
class Quantiles:
    """The median, and what 99 of 100 values don't exceed."""

    p50: float
    p99: float


class History:
    """Of one engine; begins anew when the engine does."""

    def __init__(self) -> None:
        self._epoch: int | None = None
        self._looks: deque[tuple[float, engine_pb2.EngineStats]] = deque()
        # Between each look and the next, the oldest first.
        self.speeds: deque[Speed] = deque(maxlen=_LENGTH)

    def add(self, now: float, epoch: int, stats: engine_pb2.EngineStats) -> None:
        """The engine's counts at `now`, in seconds of a monotonic clock."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._looks.clear()
            self.speeds.clear()
        if self._looks:
            self.speeds.append(_speed(*self._looks[-1], now, stats))
        self._looks.append((now, stats))
        while now - self._looks[0][0] > WINDOW_SECONDS:
            self._looks.popleft()

    @property
    def preemptions(self) -> int:
        """Since the engine's start."""
        return self._looks[-1][1].preemptions if self._looks else 0

    def window(self) -> Window:
        """The last minute, or as much of it as was watched; since the engine's start if no request came in it."""
        if not self._looks:
            return _window(None, engine_pb2.EngineStats(), engine_pb2.EngineStats())
        (began, first), (now, last) = self._looks[0], self._looks[-1]
        if last.computed_tokens == first.computed_tokens:
            return _window(None, engine_pb2.EngineStats(), last)
        return _window(now - began, first, last)


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """The value that a `share` of all values doesn't exceed; None if there are none.

    Within a bucket values are taken to lie evenly, as Prometheus' histogram_quantile does; those above all bounds are
    taken to be at the last one.
    """
    rank = share * sum(counts)
    if rank == 0:
        return None
    below, lower = 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if below + count >= rank:
            return lower + (bound - lower) * (rank - below) / count
        below += count
        lower = bound
    return lower


def _speed(began: float, before: engine_pb2.EngineStats, ended: float, after: engine_pb2.EngineStats) -> Speed:
    seconds = max(ended - began, 1e-3)
    return Speed(
        max(0, _prefilled(after) - _prefilled(before)) / seconds,
        (after.output_tokens - before.output_tokens) / seconds,
    )


def _prefilled(stats: engine_pb2.EngineStats) -> int:
    # Drawing a request's next token takes computing the one before it, and drafts that are verified with it. All other
    # computed tokens are of prompts, or those of a preempted request that are computed again.
    return stats.computed_tokens - sum(stats.inter_token_seconds.counts) - sum(stats.verified_at)


def _window(seconds: float | None, first: engine_pb2.EngineStats, last: engine_pb2.EngineStats) -> Window:
    steps = last.steps - first.steps
    prompt_tokens = last.prompt_tokens - first.prompt_tokens
    cached_tokens = last.cached_prompt_tokens - first.cached_prompt_tokens
    return Window(
        seconds,
        first_token=_quantiles(first.first_token_seconds, last.first_token_seconds),
        inter_token=_quantiles(first.inter_token_seconds, last.inter_token_seconds),
        queue=_quantiles(first.queue_seconds, last.queue_seconds),
        step=_quantiles(first.step_seconds, last.step_seconds),
        tokens_per_step=(last.computed_tokens - first.computed_tokens) / steps if steps else None,
        hit_rate=cached_tokens / prompt_tokens if prompt_tokens else None,
        drafts=_drafts(first, last),
    )


def _drafts(first: engine_pb2.EngineStats, last: engine_pb2.EngineStats) -> Drafts | None:
    verified = _since(first.verified_at, last.verified_at)
    accepted = _since(first.accepted_at, last.accepted_at)
    if not sum(verified):
        return None
    before = {drafter.name: drafter.verified_tokens for drafter in first.drafters}
    by_drafter = {drafter.name: drafter.verified_tokens - before.get(drafter.name, 0) for drafter in last.drafters}
    draws = [sum(stats.first_token_seconds.counts) + sum(stats.inter_token_seconds.counts) for stats in (first, last)]
    return Drafts(
        tuple(name for name in sorted(by_drafter, key=lambda name: -by_drafter[name]) if by_drafter[name]),
        sum(accepted) / sum(verified),
        tuple(right / count for right, count in zip_longest(accepted, verified, fillvalue=0) if count),
        (last.output_tokens - first.output_tokens) / max(1, draws[1] - draws[0]),
    )


def _since(before: Sequence[int], now: Sequence[int]) -> list[int]:
    return [later - earlier for earlier, later in zip_longest(before, now, fillvalue=0)]


def _quantiles(first: engine_pb2.Histogram, last: engine_pb2.Histogram) -> Quantiles | None:
    before = first.counts or [0] * len(last.counts)
    counts = [now - then for now, then in zip(last.counts, before, strict=True)]
    p50, p99 = (quantile(last.bounds, counts, share) for share in (0.5, 0.99))
    return None if p50 is None or p99 is None else Quantiles(p50, p99)
