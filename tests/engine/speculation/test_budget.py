"""What speculation costs when drafts are wrong, and how soon it comes back when they are good: by simulated time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from draft_oracle import Oracle
from hypothesis import given
from hypothesis import strategies as st
from page_machine import EOS, VOCAB_SIZE, Launched, PageMachine, next_token, run_alone

import quire.engine.core
import quire.engine.speculation.device_drafts as device_drafts_module
import quire.engine.speculation.speculator as speculator_module
from quire.engine.core import EngineCore
from quire.engine.page_pool import PagePool
from quire.engine.plan import StepPlan, StepResult
from quire.engine.runner import StepMasks
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.engine.speculation.acceptance import Rates
from quire.engine.speculation.budget import Base, Choice, Offer, choose, choose_places
from quire.engine.speculation.cost import PassCost, StepCost
from quire.engine.speculation.drafts import Drafter
from quire.engine.speculation.speculator import SpeculationConfig, Speculator
from quire.engine.speculation.step_watch import StepTime
from quire.service.request import Request, SamplingParams, StopConditions

PAGES, MAX_MODEL_LEN = 400, 800


@dataclass
class Clock:
    """Stands for the module `time` in the core."""

    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@dataclass
class Head:
    """A drafter on the device: its passes take `seconds`, and its drafts are right or wrong."""

    seconds: float
    right: bool

    def drafts(self, tokens: list[int], count: int) -> tuple[int, ...]:
        found: list[int] = []
        for _ in range(count):
            token = next_token([*tokens, *found])
            found.append(token if self.right else (token + 1) % VOCAB_SIZE)
        return tuple(found)


class HalfRight(Head):
    """Every other draft is wrong, by what the text before it is."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds, right=False)

    def drafts(self, tokens: list[int], count: int) -> tuple[int, ...]:
        found: list[int] = []
        for _ in range(count):
            token = next_token([*tokens, *found])
            wrong = random.Random(sum(tokens) + 31 * len(tokens) + len(found)).random() < 0.5
            found.append((token + wrong) % VOCAB_SIZE)
        return tuple(found)


class HeadMachine(PageMachine):
    """May have a head, which makes a pass for each place, of all sequences that want a draft there."""

    def __init__(
        self, clock: Clock, seconds: Callable[[int], float], max_num_seqs: int, head: Head | None = None
    ) -> None:
        super().__init__(PAGES, max_num_seqs, MAX_MODEL_LEN)
        self.clock, self.seconds, self.head = clock, seconds, head

    def draft(self, plan: StepPlan, accepted: dict[int, int]) -> dict[int, tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}
        for index, work in enumerate(plan.work):
            if self.head is not None and work.num_wanted:
                length = work.start + work.num_tokens - work.num_drafts + accepted.get(index, 0)
                text = [*self.seen(work.slot, length), int(self.tokens[work.slot, length])]
                found[index] = drafts = self.head.drafts(text, work.num_wanted)
                self.tokens[work.slot, length + 1 : length + 1 + len(drafts)] = drafts
        return found

    def draft_seconds(self, plan: StepPlan) -> float:
        return max(work.num_wanted for work in plan.work) * self.head.seconds if self.head is not None else 0.0


class TimedMachine(HeadMachine):
    """Its steps take the time that `seconds` says for their number of tokens."""

    def __init__(
        self, clock: Clock, seconds: Callable[[int], float], max_num_seqs: int, head: Head | None = None
    ) -> None:
        super().__init__(clock, seconds, max_num_seqs, head)
        self.steps: list[int] = []

    def launch(self, plan: StepPlan, *, masked: bool) -> Launched:
        num_tokens, drafting = sum(work.num_tokens for work in plan.work), self.draft_seconds(plan)
        self.steps.append(num_tokens)
        # Machines are not exact: a hundredth more or less.
        self.clock.now += self.seconds(num_tokens) * (1 + (len(self.steps) * 7 % 5 - 2) / 200) + drafting
        launched = super().launch(plan, masked=masked)
        launched.result = replace(launched.wait(), draft_seconds=drafting)
        return launched


@dataclass
class Running:
    """A step on a device that computes beside the host."""

    launched: Launched
    clock: Clock
    done_at: float
    draft_seconds: float

    def draw(self, masks: StepMasks | None) -> None:
        self.launched.draw(masks)

    def wait(self) -> StepResult:
        waited = max(0.0, self.done_at - self.clock.now)
        self.clock.now += waited
        return replace(self.launched.wait(), draft_seconds=self.draft_seconds, waited_seconds=waited)


class AheadMachine(HeadMachine):
    """Computes beside the host, which takes `host` seconds before each launch, and `drafting` more for one with
    drafts."""

    def __init__(
        self,
        clock: Clock,
        seconds: Callable[[int], float],
        max_num_seqs: int,
        host: float,
        head: Head | None = None,
        drafting: float = 0.0,
    ) -> None:
        super().__init__(clock, seconds, max_num_seqs, head)
        self.host, self.drafting = host, drafting
        self.free_at = self.idle = 0.0
        self.launches = 0

    def launch(self, plan: StepPlan, *, masked: bool) -> Running:  # type: ignore[override]
        drafts = any(work.num_drafts or work.num_wanted for work in plan.work)
        self.launches += 1
        # Hosts are less exact than devices.
        noise = 1 + (self.launches * 7 % 5 - 2) / 50
        self.clock.now += (self.host + self.drafting * drafts) * noise
        self.idle += max(0.0, self.clock.now - self.free_at)
        seconds = self.seconds(sum(work.num_tokens for work in plan.work)) + self.draft_seconds(plan)
        self.free_at = max(self.free_at, self.clock.now) + seconds
        return Running(super().launch(plan, masked=masked), self.clock, self.free_at, self.draft_seconds(plan))


def simulate(
    monkeypatch: pytest.MonkeyPatch,
    seconds: Callable[[int], float],
    quality: float | None,
    num_seqs: int,
    num_tokens: int = 400,
    head: Head | None = None,
    host: float | None = None,
    fewer: int = 0,
    drafting: float = 0.0,
) -> tuple[float, TimedMachine | AheadMachine, Oracle, EngineCore]:
    """The time that `num_seqs` requests of `num_tokens` output tokens take, each of `fewer` than the one before;
    without drafts if `quality` is None. With `host` the device is a step ahead."""
    clock = Clock()
    monkeypatch.setattr(quire.engine.core, "time", clock)
    machine: TimedMachine | AheadMachine = TimedMachine(clock, seconds, num_seqs, head)
    if host is not None:
        machine = AheadMachine(clock, seconds, num_seqs, host, head, drafting)
    requests = [
        Request(
            str(key), "m", (key, 5, 7), SamplingParams(temperature=0.0),
            StopConditions(num_tokens - key * fewer, ignore_eos=True),
        )
        for key in range(num_seqs)
    ]  # fmt: skip
    outputs = [run_alone(request, MAX_MODEL_LEN)[0] for request in requests]
    oracle = Oracle(lambda key: [*requests[key].prompt_token_ids, *outputs[key]], quality or 0.0, VOCAB_SIZE)
    source, speculator = oracle if quality is not None else None, None
    if source is not None or head is not None:
        speculator = Speculator(source, SpeculationConfig(4), on_device=head is not None)
    config = SchedulerConfig(num_seqs, 512, MAX_MODEL_LEN)
    scheduler = Scheduler(config, PagePool(PAGES), frozenset({EOS}))
    core = EngineCore(machine, scheduler, None, VOCAB_SIZE, run_ahead=host is not None, speculator=speculator)
    for key, request in enumerate(requests):
        core.submit(key, request)
    return clock.now, machine, oracle, core


def finish(core: EngineCore, machine: TimedMachine | AheadMachine) -> float:
    while core.has_work:
        core.step()
    return machine.clock.now


# What a step costs, from one that is bound by its weights to one that is bound by arithmetic.
COSTS = {
    "flat": lambda tokens: 0.006,
    "a GPU's": lambda tokens: 0.006 + 0.00002 * tokens,
    "a CPU's": lambda tokens: 0.010 + 0.003 * tokens,
    "by the token": lambda tokens: 0.001 * tokens,
    "in steps": lambda tokens: 0.004 * (1 + tokens // 8),
}


@pytest.mark.parametrize("num_seqs", [1, 4, 8])
@pytest.mark.parametrize("cost", COSTS)
def test_drafts_that_are_all_wrong_cost_at_most_three_percent(
    monkeypatch: pytest.MonkeyPatch, cost: str, num_seqs: int
) -> None:
    """Peers lose up to half of their throughput there: nobody could leave speculation on."""
    _, machine, _, core = simulate(monkeypatch, COSTS[cost], None, num_seqs)
    without = finish(core, machine)
    _, machine, oracle, core = simulate(monkeypatch, COSTS[cost], 0.0, num_seqs)
    assert finish(core, machine) <= 1.03 * without
    assert oracle.num_proposed > 0


@pytest.mark.parametrize("num_seqs", [1, 8, 15])
@pytest.mark.parametrize("share", [0.05, 0.15, 0.3])
def test_a_device_that_runs_ahead_loses_little_by_wrong_drafts(
    monkeypatch: pytest.MonkeyPatch, share: float, num_seqs: int
) -> None:
    """Looking for drafts makes it wait for the host, whose share of a step is lost each time."""
    cost = COSTS["a GPU's"]
    host = share * cost(num_seqs)
    _, machine, _, core = simulate(monkeypatch, cost, None, num_seqs, host=host)
    without = finish(core, machine)
    assert without < 400 * 1.01 * cost(num_seqs)
    _, machine, oracle, core = simulate(monkeypatch, cost, 0.0, num_seqs, host=host)
    assert finish(core, machine) <= (1.03 + share / 8) * without
    assert oracle.num_proposed > 0


@pytest.mark.parametrize("num_seqs", [1, 8])
def test_a_device_that_runs_ahead_comes_back_to_right_drafts(monkeypatch: pytest.MonkeyPatch, num_seqs: int) -> None:
    """Though they are looked for seldom by then: within 50 steps."""
    _, machine, oracle, core = simulate(monkeypatch, COSTS["a GPU's"], 0.0, num_seqs, num_tokens=700, host=0.0006)
    for _ in range(150):
        core.step()
    oracle.quality = 1.0
    for _ in range(50):
        core.step()
    before = sum(len(sequence.token_ids) for sequence in core.scheduler)
    for _ in range(10):
        core.step()
    assert sum(len(sequence.token_ids) for sequence in core.scheduler) - before >= 10 * num_seqs * 4
    # Where a step with drafts costs more than they win, there are none.
    cost = COSTS["a GPU's"]
    _, machine, _, core = simulate(monkeypatch, cost, None, num_seqs, host=0.9 * cost(num_seqs))
    without = finish(core, machine)
    _, machine, _, core = simulate(monkeypatch, cost, 0.3, num_seqs, host=0.9 * cost(num_seqs))
    assert finish(core, machine) <= 1.2 * without


@pytest.mark.parametrize("num_seqs", [1, 4])
@pytest.mark.parametrize("cost", ["flat", "a GPU's"])
def test_drafts_that_are_right_are_used(monkeypatch: pytest.MonkeyPatch, cost: str, num_seqs: int) -> None:
    """Where tokens of a step are nearly free, four right drafts are worth nearly four steps."""
    _, machine, _, core = simulate(monkeypatch, COSTS[cost], None, num_seqs)
    without = finish(core, machine)
    _, machine, _, core = simulate(monkeypatch, COSTS[cost], 1.0, num_seqs)
    assert finish(core, machine) < without / 4


def test_right_drafts_are_left_alone_where_they_cost_more_than_they_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step's time is its tokens', a draft saves nothing: half of them wrong, and all would lose."""
    _, machine, _, core = simulate(monkeypatch, COSTS["by the token"], None, 4)
    without = finish(core, machine)
    _, machine, _, core = simulate(monkeypatch, COSTS["by the token"], 0.5, 4)
    assert finish(core, machine) <= 1.03 * without


@pytest.mark.parametrize("num_seqs", [1, 4])
def test_speculation_comes_back_when_drafts_become_good(monkeypatch: pytest.MonkeyPatch, num_seqs: int) -> None:
    """A chat turns to code: what was given up for the talk is worth most for the rest."""
    _, _, oracle, core = simulate(monkeypatch, COSTS["a GPU's"], 0.0, num_seqs, num_tokens=700)
    for _ in range(150):
        core.step()
    oracle.quality = 1.0
    for _ in range(50):
        core.step()
    before = sum(len(sequence.token_ids) for sequence in core.scheduler)
    for _ in range(10):
        core.step()
    tokens = sum(len(sequence.token_ids) for sequence in core.scheduler) - before
    assert tokens >= 10 * num_seqs * 4


@pytest.mark.parametrize("num_seqs", [1, 4, 8])
@pytest.mark.parametrize("cost", COSTS)
def test_a_head_that_is_always_wrong_costs_at_most_three_percent(
    monkeypatch: pytest.MonkeyPatch, cost: str, num_seqs: int
) -> None:
    """Its passes cost, too, whether or not anybody verifies what they drafted."""
    _, machine, _, core = simulate(monkeypatch, COSTS[cost], None, num_seqs)
    without = finish(core, machine)
    head = Head(0.08 * COSTS[cost](num_seqs), right=False)
    _, machine, _, core = simulate(monkeypatch, COSTS[cost], None, num_seqs, head=head)
    assert finish(core, machine) <= 1.03 * without


@pytest.mark.parametrize("num_seqs", [1, 4])
def test_a_head_comes_back_when_it_is_right(monkeypatch: pytest.MonkeyPatch, num_seqs: int) -> None:
    """Within 50 steps, though it is asked seldom."""
    head = Head(0.0005, right=False)
    _, _, _, core = simulate(monkeypatch, COSTS["a GPU's"], None, num_seqs, num_tokens=700, head=head)
    for _ in range(150):
        core.step()
    head.right = True
    for _ in range(50):
        core.step()
    before = sum(len(sequence.token_ids) for sequence in core.scheduler)
    for _ in range(10):
        core.step()
    assert sum(len(sequence.token_ids) for sequence in core.scheduler) - before >= 10 * num_seqs * 3


def test_a_batch_that_ends_one_by_one_is_drafted_for_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each smaller batch is a size of step that never was: where it has to be measured before anything is drafted, most
    of a batch's end goes by without."""

    def ended(*, always: bool) -> float:
        if always:
            monkeypatch.setattr(
                speculator_module, "choose", lambda offers, *_: [Choice(offer.num_drafts, 0) for offer in offers]
            )
            monkeypatch.setattr(device_drafts_module, "choose_places", lambda rates, *_: 4 if rates else 0)
        head = Head(0.0002, right=True)
        _, machine, _, core = simulate(monkeypatch, COSTS["a GPU's"], None, 15, 400, head, host=0.0005, fewer=24)
        return finish(core, machine)

    assert ended(always=False) <= 1.06 * ended(always=True)


@pytest.mark.parametrize("num_seqs", [1, 8])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_device_with_a_head_does_not_wait_for_the_host(
    monkeypatch: pytest.MonkeyPatch, share: float, num_seqs: int
) -> None:
    """It verifies its own drafts before the host has read them: else the host's share of each step would be lost."""
    cost = COSTS["a GPU's"]
    host = share * cost(num_seqs)
    _, machine, _, core = simulate(monkeypatch, cost, None, num_seqs, head=Head(0.0005, right=True), host=host)
    took = finish(core, machine)
    assert isinstance(machine, AheadMachine) and machine.idle < 0.03 * took + 3 * host
    _, machine, _, core = simulate(monkeypatch, cost, None, num_seqs, host=host)
    without = finish(core, machine)
    assert took < without / 2.5
    _, machine, _, core = simulate(monkeypatch, cost, None, num_seqs, head=Head(0.0005, right=False), host=host)
    assert finish(core, machine) <= 1.03 * without


@pytest.mark.parametrize("num_seqs", [1, 8])
@pytest.mark.parametrize("quality", ["wrong", "half of them right"])
@pytest.mark.parametrize("drafting", [0.5, 2.0])
def test_a_device_that_waits_for_the_host_loses_little_by_drafts(
    monkeypatch: pytest.MonkeyPatch, drafting: float, quality: str, num_seqs: int
) -> None:
    """What small models take on a fast device is the host's time, of which a step with drafts takes twice or thrice as
    much: who only looks at steps with drafts does not see it, and who looks for better drafts must do so seldom."""
    host, cost = 0.0005, COSTS["flat"]
    short = {"seconds": lambda tokens: cost(tokens) / 30, "num_tokens": 700, "host": host}
    _, machine, _, core = simulate(monkeypatch, quality=None, num_seqs=num_seqs, **short)
    without = finish(core, machine)
    # Of 5 tokens a step with four drafts has 1.9 where half of them are right: worth half as much again, not thrice.
    head = Head(0.00002, right=False) if quality == "wrong" else HalfRight(0.00002)
    _, machine, _, core = simulate(
        monkeypatch, quality=None, num_seqs=num_seqs, head=head, drafting=drafting * host, **short
    )
    took = finish(core, machine)
    assert took <= 1.03 * without
    if quality != "wrong" and drafting < 1:
        assert took <= 0.95 * without


@pytest.mark.parametrize("num_seqs", [1, 8])
def test_right_drafts_are_used_by_a_device_that_waits_for_the_host(
    monkeypatch: pytest.MonkeyPatch, num_seqs: int
) -> None:
    """Five tokens for twice the time; to see again what steps take without drafts costs little."""
    short = {"seconds": lambda tokens: 0.0002, "num_tokens": 700, "host": 0.0005}
    _, machine, _, core = simulate(monkeypatch, quality=None, num_seqs=num_seqs, **short)
    without = finish(core, machine)
    head = Head(0.00002, right=True)
    _, machine, _, core = simulate(monkeypatch, quality=None, num_seqs=num_seqs, head=head, drafting=0.0005, **short)
    assert finish(core, machine) <= 0.45 * without


@pytest.mark.parametrize("num_seqs", [1, 8])
def test_what_the_first_drafts_took_is_not_believed_for_ever(monkeypatch: pytest.MonkeyPatch, num_seqs: int) -> None:
    """The host is slow at what it does for the first time: drafts would be given up for what only the first ones took,
    and as none are verified then, nobody would find out."""
    monkeypatch.setattr(f"{__name__}.MAX_MODEL_LEN", 4096)
    monkeypatch.setattr(f"{__name__}.PAGES", 2400)
    short = {"seconds": lambda tokens: 0.0002, "num_tokens": 3500, "host": 0.0005}
    _, machine, _, core = simulate(monkeypatch, quality=None, num_seqs=num_seqs, **short)
    without = finish(core, machine)
    head = Head(0.00002, right=True)
    _, machine, _, core = simulate(monkeypatch, quality=None, num_seqs=num_seqs, head=head, drafting=0.004, **short)
    assert isinstance(machine, AheadMachine)
    while machine.launches < 40:
        core.step()
    machine.drafting, began = 0.0005, machine.clock.now
    assert finish(core, machine) - began <= 0.65 * without


@pytest.mark.parametrize("num_seqs", [1, 8])
def test_steps_that_wait_for_masks_say_nothing_of_others(monkeypatch: pytest.MonkeyPatch, num_seqs: int) -> None:
    """They may take ten times as long, with drafts many times: after them nobody else would get drafts any more."""
    head = Head(0.00002, right=True)
    _, _, _, core = simulate(
        monkeypatch, lambda tokens: 0.0002, None, num_seqs, num_tokens=700, head=head, host=0.0005, drafting=0.0005
    )
    for _ in range(60):
        core.step()
    speculator = core._speculator
    assert speculator is not None
    for num_places in (0, 0, 0, 0, *([4] * 40)):
        seconds = 0.02 if num_places else 0.005
        num_drafts = num_places * num_seqs
        speculator.observe_step(
            StepTime(num_seqs + num_drafts, 100, seconds, num_places, 0.0001, num_drafts, 0.0, masked=True)
        )
    before = sum(len(sequence.token_ids) for sequence in core.scheduler)
    for _ in range(20):
        core.step()
    assert sum(len(sequence.token_ids) for sequence in core.scheduler) - before >= 18 * num_seqs * 5


@pytest.mark.parametrize("num_seqs", [1, 8])
def test_the_hosts_drafts_come_back_beside_a_device_that_rests(monkeypatch: pytest.MonkeyPatch, num_seqs: int) -> None:
    """Where neither was right for long nothing is decided for some steps in a row, while the host's may become so."""
    cost, host = COSTS["a GPU's"], 0.0006
    head = Head(0.0005, right=False)
    _, machine, _, core = simulate(monkeypatch, cost, None, num_seqs, num_tokens=700, host=host)
    without = finish(core, machine)
    _, machine, _, core = simulate(monkeypatch, cost, 0.0, num_seqs, num_tokens=700, head=head, host=host)
    assert finish(core, machine) <= (1.03 + host / cost(num_seqs) / 8) * without
    _, machine, oracle, core = simulate(monkeypatch, cost, 0.0, num_seqs, num_tokens=700, head=head, host=host)
    for _ in range(150):
        core.step()
    oracle.quality = 1.0
    for _ in range(50):
        core.step()
    before = sum(len(sequence.token_ids) for sequence in core.scheduler)
    for _ in range(10):
        core.step()
    assert sum(len(sequence.token_ids) for sequence in core.scheduler) - before >= 10 * num_seqs * 4


def test_drafts_that_are_given_up_cost_the_host_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is thought over in each step, for each sequence, is most of what a small model's step takes."""
    asked = 0

    def count(*arguments: Any) -> int:
        nonlocal asked
        asked += 1
        return choose_places(*arguments)

    monkeypatch.setattr(device_drafts_module, "choose_places", count)
    _, _, _, core = simulate(monkeypatch, COSTS["a GPU's"], None, 8, 700, Head(0.0005, right=False), host=0.0005)
    for _ in range(100):
        core.step()
    asked = 0
    for _ in range(400):
        core.step()
    # Once in 8 steps, and in those that look for drafts and at what became of them, 5 or 6 of 40.
    assert asked < 400 / 3


def test_no_drafts_are_made_behind_a_prompt_after_they_were_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass takes as long for one sequence as for all. A request that waited since drafts were wanted still asked for
    them when its turn came."""
    _, machine, _, core = simulate(monkeypatch, COSTS["a GPU's"], None, 2, 40, Head(0.0005, right=False), host=0.0005)
    launch, wanted = machine.launch, []

    def watch(plan: StepPlan, *, masked: bool) -> Any:
        wanted.extend(work.num_wanted for work in plan.work if work.num_tokens - work.num_drafts > 1)
        return launch(plan, masked=masked)

    monkeypatch.setattr(machine, "launch", watch)
    for key in range(10, 16):
        stop = StopConditions(40, ignore_eos=True)
        core.submit(key, Request(str(key), "m", (key, 5, 7), SamplingParams(temperature=0.0), stop))
    finish(core, machine)
    assert len(wanted) == 8 and wanted[0] > 0
    assert not any(wanted[4:])


def test_what_a_large_batch_took_is_no_cost_of_a_small_one() -> None:
    """Most of a step of many long sequences is their context: without it drafts of the last few seem to cost what the
    whole batch did, and none is made."""

    def seconds(num_tokens: int, context: int) -> float:
        return 0.005 + 2e-5 * num_tokens + 4e-8 * context

    cost, noise = StepCost(), np.random.default_rng(0)
    for step in range(1200):
        num_seqs = 200 - step // 8
        context = num_seqs * (300 + step // 2)
        # The first half verifies a draft of each.
        num_tokens = num_seqs * (2 if step % 3 and step < 600 else 1)
        cost.record(num_tokens, seconds(num_tokens, context) * (1 + noise.normal() / 100), context)
    sizes, context = np.array([50, 100, 150, 200, 250]), 50 * 900
    expected = [seconds(size, context) for size in sizes.tolist()]
    assert cost.seconds(sizes, context) == pytest.approx(expected, rel=0.08)
    assert cost.seconds(np.array([20]), context) == pytest.approx([seconds(20, context)], rel=0.08)
    assert cost.price == pytest.approx(4e-8, rel=0.4)


def test_what_drafts_of_few_took_is_no_cost_of_many_without() -> None:
    """A host takes its time for each draft, so 16 sequences with 3 drafts take longer than 64 without any, and both
    are 64 tokens: without it a batch's own steps seem to take as long, and drafts that double them to cost nothing."""
    cost, base = StepCost(), Base(64, 64, context=64)
    for _ in range(8):
        cost.record(64, 0.001, 64)
    for step in range(100):
        cost.record(48 + step % 17, 0.0022, 64, has_drafts=True)
    with_drafts, without = 1.2 * 0.0022, base.seconds(cost, np.array([0, 64]))[0]
    assert 0.001 <= without <= 0.00101
    assert cost.seconds(np.array([64]), 64)[0] <= with_drafts
    assert base.seconds(cost, np.array([0, 64]))[1] >= 0.002
    # Where nothing was run without drafts, those with some have to tell.
    assert not cost.was_measured(16) and cost.knows(128) and not StepCost().knows(128)


@given(
    steps=st.lists(st.tuples(st.sampled_from([0, 1, 8, 9, 40, 64]), st.booleans(), st.integers(1, 1500)), max_size=40),
    size=st.integers(1, 80),
)
def test_what_is_known_can_be_told_however_old_it_is(steps: list[tuple[int, bool, int]], size: int) -> None:
    """What was measured seldom is forgotten: an engine that asks for it all the same would stop."""
    cost = StepCost()
    for num_tokens, has_drafts, rested in steps:
        if num_tokens:
            cost.record(num_tokens, 0.001 * num_tokens, num_tokens * 100, has_drafts=has_drafts)
        else:
            cost.grow_older(rested)
        if cost.knows(size):
            assert cost.seconds_without(size, 100 * size) > 0
            assert np.isfinite(cost.seconds(np.arange(1, 100), 100 * size)).all()


def test_noise_is_no_price_of_context() -> None:
    """One short sequence says nothing of contexts: without it a noisy machine's drafts seem to cost any number."""
    for seed in range(20):
        cost, noise = StepCost(), np.random.default_rng(seed)
        cost.record(60, 0.1, 60)
        for step in range(30):
            num_tokens = 1 + 4 * (step % 5 == 4)
            cost.record(num_tokens, (0.015 + 0.001 * num_tokens) * (1 + noise.normal() / 10), 60 + step)
        assert cost.seconds(np.array([1, 5]), 300) == pytest.approx([0.016, 0.020], rel=0.2)


def test_no_price_makes_a_step_cost_nothing() -> None:
    """A cost of nothing, or less, would be divided by: the engine would end."""
    cost = StepCost()
    for _ in range(4):
        cost.record(16, 0.01, 10**6)
    for step in range(50):
        cost.record(8, 0.01 + 0.02 * step, 20_000 * step)
    for context in (0, 1000):
        assert (cost.seconds(np.arange(1, 400), context) > 0).all()
    cost.record(16, 0.01, 0)
    found = cost.seconds(np.arange(1, 400), 0)
    assert np.isfinite(found).all() and (found > 0).all()


def test_a_few_drafts_say_what_a_new_drafter_is_worth() -> None:
    """Where nothing is known a rate that moves slowly has a short answer pay for drafts that are never right."""
    rates = Rates.of_all()
    for _ in range(4):
        rates.record(Drafter.EAGLE, 0, True)
    assert rates[Drafter.EAGLE] < 0.25
    for _ in range(200):
        rates.record(Drafter.EAGLE, 1, False)
    settled = rates[Drafter.EAGLE]
    rates.record(Drafter.EAGLE, 0, True)
    assert settled > 0.9 and settled - rates[Drafter.EAGLE] < 0.011
    one = Rates(start=rates)
    one.record(Drafter.EAGLE, 1, False)
    assert one[Drafter.EAGLE] > rates[Drafter.EAGLE]


def test_what_is_compiled_for_one_step_is_no_cost_of_the_one_before() -> None:
    """A launch that captures a graph delays the reading of the step in flight: without it the drafts of that step
    seem to cost seconds, and nobody drafts for the next hundred steps."""
    cost = StepCost()
    speculator = Speculator(None, SpeculationConfig(4), on_device=True, cost=cost)
    for measured in (StepTime(8, 0, 0.01, 0, 0.0), StepTime(40, 0, 3.0, 4, 0.5), None, StepTime(40, 0, 0.02, 0, 0.0)):
        speculator.observe_step(measured)
    assert cost.seconds(np.array([8, 40])).tolist() == [0.01, 0.01]
    speculator.observe_step(StepTime(8, 0, 0.01, 0, 0.0))
    assert cost.seconds(np.array([8, 40])).tolist() == [0.01, 0.02]


# Siblings are beside drafts that there are.
OFFERS = st.integers(0, 6).flatmap(
    lambda count: st.builds(Offer, st.just(count), st.floats(0, 1), st.integers(0, count), st.floats(0, 1))
)


@given(
    offers=st.lists(OFFERS, max_size=8),
    num_decodes=st.integers(1, 8),
    num_prompt=st.sampled_from([0, 0, 20]),
    per_token=st.floats(0, 1),
)
def test_nothing_is_chosen_that_slows_a_batch_down(
    offers: list[Offer], num_decodes: int, num_prompt: int, per_token: float
) -> None:
    """The choice is the best of all along the order of what drafts are worth, none included."""
    cost = StepCost()
    for num_tokens in range(1, 100):
        for _ in range(5):
            cost.record(num_tokens, 1 + per_token * num_tokens)
    base = Base(num_decodes + num_prompt, num_decodes, num_prompt)

    def speed(choices: list[Choice]) -> float:
        expected = float(num_decodes)
        for offer, (num_drafts, num_siblings) in zip(offers, choices, strict=True):
            expected += sum(offer.rate**nth for nth in range(1, num_drafts + 1))
            wrong = (offer.rate ** (nth - 1) * (1 - offer.rate) for nth in range(1, num_siblings + 1))
            expected += offer.second_rate * sum(wrong)
        return expected / float(base.seconds(cost, np.array([sum(map(sum, choices))]))[0])

    chosen = choose(offers, base, cost)
    assert len(chosen) == len(offers)
    for (num_drafts, num_siblings), offer in zip(chosen, offers, strict=True):
        assert 0 <= num_siblings <= num_drafts <= offer.num_drafts and num_siblings <= offer.num_siblings
    none = [Choice(0, 0)] * len(offers)
    assert speed(chosen) >= speed(none) * (1 - 1e-9)
    for index, offer in enumerate(offers):
        for count in range(offer.num_drafts + 1):
            alone = [*none[:index], Choice(count, 0), *none[index + 1 :]]
            assert speed(chosen) >= speed(alone) / 1.0101


def test_a_tree_is_chosen_where_it_wins() -> None:
    """Where drafts are often wrong and rows are cheap, a second choice beside the first ones is worth more than another
    draft behind them; where rows cost as much as steps, nothing is."""

    def chosen(rate: float, second_rate: float, per_token: float) -> Choice:
        cost = StepCost()
        for num_tokens in range(1, 20):
            for _ in range(5):
                cost.record(num_tokens, 1 + per_token * num_tokens)
        return choose([Offer(4, rate, 4, second_rate)], Base(1, 1), cost)[0]

    assert chosen(0.5, 0.4, 0.0) == (4, 4)
    assert chosen(0.5, 0.4, 0.1) == (2, 1)
    assert chosen(0.9, 0.2, 0.1) == (4, 0)
    assert chosen(0.5, 0.4, 3.0) == (0, 0)


def test_a_pass_may_be_worth_it_for_its_second_choice() -> None:
    """Else the device makes no drafts where trees win and chains do not."""
    cost, passes = StepCost(), PassCost()
    for num_tokens in range(1, 20):
        for _ in range(5):
            cost.record(num_tokens, 1.0)
    passes.record(1, 0.25)
    one = Base(1, 1)
    assert choose_places([0.2], [0.0], 4, one, cost, passes) == 0
    assert choose_places([0.2], [0.4], 4, one, cost, passes) == 1
    assert choose_places([0.9], [0.0], 4, one, cost, passes) == choose_places([0.9], [0.4], 4, one, cost, passes)


def test_prompts_do_not_make_drafts_look_cheap() -> None:
    """Else a step that is long by its prompts has drafts that cost more than they save: they delay all of it, and the
    prompts are to be computed in any case."""
    cost, offers = StepCost(), [Offer(4, 0.5)] * 10
    for num_tokens in range(1, 101):
        for _ in range(5):
            # Up to 20 tokens a step takes as long as one does.
            cost.record(num_tokens, max(1.0, num_tokens / 20))
    alone, beside = choose(offers, Base(10, 10), cost), choose(offers, Base(60, 10, num_prompt=50), cost)
    assert sum(num_drafts for num_drafts, _ in alone) == 10
    assert beside == [Choice(0, 0)] * 10
