"""How many engines a service gets: bounds, reactions and calm, on load that is made up and on engines that are."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.operator.autoscaling_spec import Autoscaling, ScalingTargets
from quire.operator.scaling import Change, History, Sample, changed, decide, load_percent, observe

INTERVAL = 15.0

policies = st.builds(
    lambda low, more, out, in_, idle, first: Autoscaling(
        min_replicas=low,
        max_replicas=max(1, low + more),
        scale_out_seconds=out,
        scale_in_seconds=in_,
        idle_seconds=idle,
        targets=ScalingTargets(first_token_milliseconds=first),
    ),
    st.integers(0, 5), st.integers(0, 20), st.integers(0, 60), st.integers(0, 600), st.integers(1, 600),
    st.none() | st.integers(100, 5000),
)  # fmt: skip
samples = st.builds(
    Sample,
    at=st.floats(0, 2000),
    engines=st.integers(0, 30),
    is_complete=st.booleans(),
    queued_prefill_tokens=st.floats(0, 1e6),
    page_use=st.floats(0, 1),
    first_token_seconds=st.none() | st.floats(0, 100),
    requests=st.integers(0, 1000),
    had_requests=st.booleans(),
)


@given(
    policy=policies,
    seen=st.lists(samples, max_size=12),
    changes=st.lists(st.builds(Change, st.floats(0, 2000), st.integers(0, 30), st.integers(0, 30)), max_size=5),
    current=st.integers(0, 40),
)
def test_bounds_hold_whatever_was_seen(
    policy: Autoscaling, seen: list[Sample], changes: list[Change], current: int
) -> None:
    """A number beyond the bounds is a bill, or an outage."""
    by_time = tuple(sorted(seen, key=lambda each: each.at))
    history = History(0.0, by_time, tuple(sorted(changes, key=lambda each: each.at)))
    assert policy.min_replicas <= decide(policy, history, current, 2000.0) <= policy.max_replicas


@dataclass
class Engines:
    """Engines on paper: each computes `prefill` prompt tokens a second and holds `pages` pages.

    `tokens` of prompts come a second, and what they lead to fills `used` pages, however many engines there are. A new
    engine takes part after `load` intervals, one that goes is gone.
    """

    policy: Autoscaling
    prefill: float = 10_000
    pages: float = 1_000
    load: int = 2
    wanted: int = 1
    queued: float = 0.0

    def __post_init__(self) -> None:
        self.now = 0.0
        self.history = History(0.0)
        self.ready = self.wanted
        self.starting: list[int] = []
        self.numbers: list[int] = []

    def run(self, intervals: int, tokens: Callable[[], float], used: Callable[[], float]) -> None:
        for _ in range(intervals):
            self.now += INTERVAL
            self.starting = [left - 1 for left in self.starting]
            self.ready += sum(left <= 0 for left in self.starting)
            self.starting = [left for left in self.starting if left > 0]
            asked, pages = tokens(), used()
            self.queued = max(0.0, self.queued + INTERVAL * (asked - self.ready * self.prefill))
            sample = Sample(
                at=self.now,
                engines=self.ready,
                is_complete=True,
                queued_prefill_tokens=self.queued if self.ready else 0.0,
                page_use=min(1.0, pages / (self.ready * self.pages)) if self.ready else 0.0,
                requests=int(bool(asked or pages)),
                had_requests=bool(asked or pages),
            )
            self.history = observe(self.policy, self.history, sample)
            wanted = decide(self.policy, self.history, self.wanted, self.now)
            if wanted != self.wanted:
                self.history = changed(self.history, self.now, self.wanted, wanted)
            if wanted > self.wanted:
                self.starting += [self.load] * (wanted - self.wanted)
            for _ in range(self.wanted - wanted):
                if self.starting:
                    self.starting.pop()
                else:
                    self.ready -= 1
            self.wanted = wanted
            self.numbers.append(wanted)

    def turns(self) -> int:
        """How often the number began to go the other way."""
        steps = [after - before for before, after in pairwise(self.numbers)]
        ways = [step > 0 for step in steps if step]
        return sum(before != after for before, after in pairwise(ways))


def noisy(value: float, by: float, seed: int) -> Callable[[], float]:
    source = random.Random(seed)
    return lambda: value * source.uniform(1 - by, 1 + by)


@settings(deadline=None, max_examples=15)
@given(
    pages=st.floats(100, 20_000),
    tokens=st.floats(0, 100_000),
    noise=st.floats(0, 0.08),
    seed=st.integers(0, 1 << 20),
    wanted=st.integers(1, 30),
)
def test_steady_noisy_load_leads_to_a_steady_number(
    pages: float, tokens: float, noise: float, seed: int, wanted: int
) -> None:
    """Each engine that comes and goes loads a model and moves streams: in eight hours at most a dozen tries.

    Where prompts' waiting decides, how few are enough is found by trying; every wrong try doubles the time to the next.
    """
    engines = Engines(Autoscaling(min_replicas=1, max_replicas=40), wanted=wanted)
    engines.run(8 * 240, noisy(tokens, noise, seed), noisy(pages, noise, seed + 1))
    assert engines.turns() <= 24
    # In the last two hours there is at most two more of them: fewer engines, and back.
    last = engines.numbers[-480:]
    assert sum(before != after for before, after in pairwise(last)) <= 6
    # And it is enough: nothing waits longer and longer, nor are pages over what a page holds.
    assert engines.queued <= 40 * 8192
    assert engines.wanted * engines.pages * 0.8 * 1.2 >= pages


@settings(deadline=None, max_examples=15)
@given(pages=st.floats(200, 10_000), noise=st.floats(0, 0.04), seed=st.integers(0, 1 << 20))
def test_where_pages_decide_nothing_is_tried(pages: float, noise: float, seed: int) -> None:
    """Pages tell how many engines are enough without a try: once found, the number never changes again."""
    engines = Engines(Autoscaling(min_replicas=1, max_replicas=40), prefill=1e9)
    engines.run(2000, noisy(1.0, noise, seed), noisy(pages, noise, seed + 1))
    assert len(set(engines.numbers[400:])) == 1


@settings(deadline=None, max_examples=50)
@given(before=st.floats(0.05, 0.5), times=st.floats(2.5, 50), noise=st.floats(0, 0.08), seed=st.integers(0, 1 << 20))
def test_a_step_is_answered_within_two_intervals(before: float, times: float, noise: float, seed: int) -> None:
    """Users wait from the first second of a rush on."""
    engines = Engines(Autoscaling(min_replicas=1, max_replicas=40), wanted=4)
    calm = 4 * engines.prefill * before
    engines.run(4, noisy(calm, noise, seed), noisy(400, noise, seed))
    wanted = engines.wanted
    step = max(calm * times, 4 * engines.prefill * 1.5)
    engines.run(2, noisy(step, noise, seed), noisy(400, noise, seed))
    assert engines.wanted > wanted
    # And the answer goes on until there are enough, however many times more that is.
    step = min(step, 30 * engines.prefill)
    engines.run(12, noisy(step, 0, seed), noisy(400, 0, seed))
    assert engines.ready * engines.prefill > step


def test_one_spike_is_noise() -> None:
    """A long prompt is over before an engine for it would have loaded."""
    policy = Autoscaling(max_replicas=10)
    history = observe(policy, History(0.0), Sample(0.0, 2, True, requests=3))
    history = observe(policy, history, Sample(15.0, 2, True, queued_prefill_tokens=1e6, requests=9))
    assert decide(policy, history, 2, 15.0) == 2
    history = observe(policy, history, Sample(30.0, 2, True, queued_prefill_tokens=1e6, requests=9))
    assert decide(policy, history, 2, 30.0) == 4


@pytest.mark.parametrize(
    ("sample", "percent"),
    [
        (Sample(0, 2, True, page_use=0.4), 50),
        (Sample(0, 2, True, page_use=0.4, queued_prefill_tokens=2 * 8192), 100),
        (Sample(0, 2, True, first_token_seconds=3.0), 300),
        (Sample(0, 0, True), None),
    ],
)
def test_load_is_the_share_of_the_nearest_target(sample: Sample, percent: int | None) -> None:
    """What `kubectl get` shows is what decides."""
    assert load_percent(ScalingTargets(first_token_milliseconds=1000), sample) == percent


def test_while_new_engines_load_more_load_adds_none() -> None:
    """The queue grows all the while a model loads; an engine for each interval of that would be dozens."""
    engines = Engines(Autoscaling(max_replicas=100), load=40, wanted=2)
    engines.run(35, lambda: 1e6, lambda: 100)
    assert engines.wanted == 4


def test_what_is_not_known_takes_no_engine_away() -> None:
    """An engine that is too busy to tell its load must not look idle; a whole silence changes nothing."""
    policy = Autoscaling(max_replicas=10, scale_in_seconds=60)
    history = History(0.0)
    for index in range(20):
        history = observe(policy, history, Sample(15.0 * index, 3 if index % 2 else 0, is_complete=False))
        assert decide(policy, history, 4, 15.0 * index) == 4


def test_an_operator_that_has_just_started_takes_no_engine_away() -> None:
    """It has not seen the load of the minutes before."""
    policy = Autoscaling(max_replicas=10, scale_in_seconds=60)
    history = History(1000.0)
    for now in (1015.0, 1030.0, 1045.0):
        history = observe(policy, history, Sample(now, 4, True))
        assert decide(policy, history, 4, now) == 4
    history = observe(policy, history, Sample(1060.0, 4, True))
    assert decide(policy, history, 4, 1060.0) == 1


def test_to_zero_and_back() -> None:
    """The last engine goes only after the whole time without a request, and one request at any time keeps it."""
    policy = Autoscaling(min_replicas=0, max_replicas=3, idle_seconds=60)
    history, wanted = History(0.0), 1
    for now in range(5, 60, 5):
        history = observe(policy, history, Sample(now, 1, True, had_requests=now == 30))
        assert decide(policy, history, wanted, now) == 1
    for now in range(60, 91, 5):
        history = observe(policy, history, Sample(now, 1, True))
        assert decide(policy, history, wanted, now) == 1
    history = observe(policy, history, Sample(95, 1, True))
    assert decide(policy, history, wanted, 95) == 0
    history = observe(policy, history, Sample(100, 0, True))
    assert decide(policy, history, 0, 100) == 0
    # Held by a router: one look is enough.
    history = observe(policy, history, Sample(105, 0, True, requests=1))
    assert decide(policy, history, 0, 105) == 1
    history = observe(policy, history, Sample(110, 0, True, requests=5))
    assert decide(policy, history, 1, 110) == 1


def test_a_wrong_try_doubles_the_time_to_the_next() -> None:
    """The pattern behind the bound on tries."""
    policy = Autoscaling(max_replicas=10, scale_in_seconds=100)
    changes = (Change(100, 3, 2), Change(150, 2, 3))
    history = History(0.0, (), changes)
    for now in range(150, 360, 10):
        history = observe(policy, history, Sample(now, 3, True, requests=1, page_use=0.1))
        assert decide(policy, history, 3, now) == (2 if now >= 350 else 3), now
