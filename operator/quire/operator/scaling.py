"""How many engines a service should have, from its load and what was tried before. Pure: no clock, no cluster.

`scaler` measures and calls `decide` at each interval. Pages in use tell how many engines there must be; waiting
prompts and the time to first token only tell that there are too few, since with enough of them nothing waits. How far
a service can shrink is therefore found by trying. Each try that was wrong doubles the time to the next one at that
number of engines, as congestion control backs off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil

from quire.operator.autoscaling_spec import Autoscaling, ScalingTargets

# Load this much over its target is noise.
_TOLERANCE = 0.1
# Waiting below this share of its target says that fewer engines might do, too.
_CALM = 0.5
# At one decision engines at most double, or go by a quarter; while new ones load, more load changes nothing.
_GROWTH, _SHRINKING = 2.0, 0.75
# What is waiting shrinks when it loses this share from one sample to the next: then there are enough engines already.
_DRAINING = 0.1
# A try with fewer engines was wrong if more were needed within so many windows; the wait doubles at most so often.
_TRIAL_WINDOWS, _MAX_DOUBLINGS = 12, 6
_KEPT_CHANGES = 64


@dataclass(frozen=True, slots=True)
class Sample:
    """The load of a service at one time. `at` is in seconds on any steady clock.

    `engines` is how many of them told their load; `is_complete` says that all did, and the routers too.
    `first_token_seconds` is of nine requests in ten since the sample before, None if there were none. `requests` are in
    flight or held by a router; `had_requests` says whether any came or went since the sample before.
    """

    at: float
    engines: int
    is_complete: bool
    queued_prefill_tokens: float = 0
    page_use: float = 0
    first_token_seconds: float | None = None
    requests: int = 0
    had_requests: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether nobody asks anything; what is not known is not idle."""
        return self.is_complete and not self.requests and not self.had_requests


@dataclass(frozen=True, slots=True)
class Change:
    """The number of engines was changed."""

    at: float
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class History:
    """Samples and changes, oldest first. `since` is when it began: an operator that has just started knows nothing."""

    since: float
    samples: tuple[Sample, ...] = ()
    changes: tuple[Change, ...] = ()


def observe(policy: Autoscaling, history: History, sample: Sample) -> History:
    """`history` with one more sample, without those that no decision looks at any more."""
    kept = max(policy.scale_in_seconds, policy.scale_out_seconds, policy.idle_seconds)
    recent = [each for each in history.samples if each.at > sample.at - kept]
    # Two are always kept: one alone may be noise.
    if not recent and history.samples:
        recent = [history.samples[-1]]
    return replace(history, samples=(*recent, sample))


def changed(history: History, now: float, before: int, after: int) -> History:
    """`history` with one more change."""
    return replace(history, changes=(*history.changes, Change(now, before, after))[-_KEPT_CHANGES:])


def decide(policy: Autoscaling, history: History, current: int, now: float) -> int:
    """How many engines there should be now; `current` is how many were wanted until now."""
    samples = history.samples
    if not samples:
        return _bounded(policy, current)
    if current == 0:
        # Somebody waits, and noise it is not.
        return _bounded(policy, 1 if samples[-1].requests else 0)
    out = _since(samples, now - policy.scale_out_seconds)
    if len(out) < 2:
        out = samples[-2:]
    if len(out) >= 2 and not _is_draining(policy.targets, *samples[-2:]):
        wanted = min(_needed(policy.targets, each) for each in out)
        if wanted > current:
            return _bounded(policy, wanted)
    return _bounded(policy, _shrunk(policy, history, current, now))


def load_percent(targets: ScalingTargets, sample: Sample) -> int | None:
    """How near the engines are to the nearest of their targets, 100 being there; None if nobody tells."""
    if not sample.engines:
        return None
    return round(100 * max(sample.page_use * 100 / targets.page_use_percent, _waiting(targets, sample)))


def _bounded(policy: Autoscaling, wanted: int) -> int:
    return max(policy.min_replicas, min(wanted, policy.max_replicas))


def _since(samples: Sequence[Sample], begin: float) -> Sequence[Sample]:
    return [each for each in samples if each.at >= begin]


def _waiting(targets: ScalingTargets, sample: Sample) -> float:
    """How long the engines let requests wait, as a share of the target."""
    shares = [sample.queued_prefill_tokens / sample.engines / targets.queued_prefill_tokens]
    if targets.first_token_milliseconds is not None and sample.first_token_seconds is not None:
        shares.append(1000 * sample.first_token_seconds / targets.first_token_milliseconds)
    return max(shares)


def _by_pages(targets: ScalingTargets, sample: Sample) -> float:
    """The engines that would hold the pages in use at their target."""
    return sample.page_use * sample.engines * 100 / targets.page_use_percent


def _needed(targets: ScalingTargets, sample: Sample) -> int:
    """The engines that are wanted so that nothing is over its target; what tells is there counts as enough."""
    engines = sample.engines
    if not engines:
        return 1 if sample.requests else 0
    share = max(_by_pages(targets, sample) / engines, _waiting(targets, sample))
    return engines if share <= 1 + _TOLERANCE else ceil(engines * min(share, _GROWTH))


def _enough(targets: ScalingTargets, sample: Sample, current: int) -> int:
    """With how few engines the load of `sample` might be carried."""
    if sample.is_idle:
        return 1
    if not sample.is_complete or _waiting(targets, sample) > _CALM:
        return current
    by_step = min(current - 1, ceil(current * _SHRINKING))
    return max(1, by_step, ceil(_by_pages(targets, sample) * (1 + _TOLERANCE)))


def _shrunk(policy: Autoscaling, history: History, current: int, now: float) -> int:
    samples = history.samples
    if current == 1:
        is_known = now - history.since >= policy.idle_seconds
        recent = _since(samples, now - policy.idle_seconds)
        return 0 if is_known and recent and all(each.is_idle for each in recent) else 1
    window = policy.scale_in_seconds
    if now - max((history.since, *(each.at for each in history.changes))) < window:
        return current
    recent = _since(samples, now - window)
    enough = max((_enough(policy.targets, each, current) for each in recent), default=current)
    return min(current, max(enough, _lowest(history.changes, window, now)))


def _is_draining(targets: ScalingTargets, before: Sample, last: Sample) -> bool:
    if not before.engines or not last.engines or _by_pages(targets, last) > last.engines:
        return False
    return _waiting(targets, last) < (1 - _DRAINING) * _waiting(targets, before)


def _lowest(changes: Sequence[Change], window: float, now: float) -> int:
    """The lowest number of engines that is worth a try now."""
    wrong: dict[int, tuple[int, float]] = {}
    for change, following in pairwise(changes):
        if change.after >= change.before:
            continue
        if following.after > following.before and following.at - change.at <= _TRIAL_WINDOWS * window:
            times, _ = wrong.get(change.after, (0, 0.0))
            wrong[change.after] = (min(times + 1, _MAX_DOUBLINGS), following.at)
        else:
            # So many were enough, so more are, too.
            wrong = {number: each for number, each in wrong.items() if number < change.after}
    # Once its time is up, the number itself is tried again, and none below it.
    is_barred = {number: now < at + window * 2**times for number, (times, at) in wrong.items()}
    return max((number + is_barred[number] for number in wrong), default=1)
