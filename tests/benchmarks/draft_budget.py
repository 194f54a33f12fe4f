"""What the budget's choice of drafts is worth, in simulated time: beside the same number of drafts for all, and none.

    python tests/benchmarks/draft_budget.py
    python tests/benchmarks/draft_budget.py --only mixed256 --accept 3.2 --fixed 1 2 --noise 0.03

The core, the scheduler and the budget are the engine's; the device is a table of what steps of llama-8b took on an
H200, by their tokens and their context, with an EAGLE head's passes. Which drafts are right is drawn, as in
gpu_engine.py --accept. It tells in seconds whether the budget decides well, not how fast a GPU is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import numpy as np
from told_drafts import rate_for

import quire.engine.core
import quire.engine.speculation.device_drafts
import quire.engine.speculation.speculator
from quire.cli.bench.workloads import Lengths, Work, Workloads
from quire.engine.core import EngineCore
from quire.engine.page_pool import PagePool
from quire.engine.plan import StepPlan, StepResult
from quire.engine.plan import Work as StepWork
from quire.engine.runner import DeviceInfo, StepMasks
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.engine.speculation.budget import Choice
from quire.engine.speculation.speculator import SpeculationConfig, Speculator
from quire.service.request import Request, SamplingParams, StopConditions

# Milliseconds of a step by its tokens, without attention; of a token of context; of a row that is drawn from.
ROWS = (
    1, 16, 64, 128, 192, 288, 320, 384, 416, 480, 512, 576, 640, 704, 768, 832, 896, 1024, 1152, 1280, 1600, 4096, 8192,
)  # fmt: skip
MILLISECONDS = (
    4.3, 4.3, 4.75, 5.4, 6.6, 9.0, 9.0, 10.1, 11.4, 12.4, 12.4, 14.2, 15.6, 18.1, 19.3, 22.1, 22.1, 23.7, 28.4, 33.0,
    40.5, 90.0, 186.0,
)  # fmt: skip
CONTEXT_MS, DRAW_MS, OTHER_MS, HOST_S = 131072 / 3.7e9, 0.0012, 0.55, 0.0012
# A pass of the head, and of each sequence in it, whose context its one layer of 32 reads.
PASS_MS, PASS_SEQ_MS = 0.26, 0.0009
PASS_CONTEXT_MS = CONTEXT_MS / 32
WRONG, RIGHT = 7, 17
MOST = 4

PROMPTS = Workloads(100_000)
WORKLOADS = {
    "eight": lambda: PROMPTS.fixed(8, 128, 256, 1),
    "sixtyfour": lambda: PROMPTS.fixed(64, 512, 256, 5),
    "mixed256": lambda: PROMPTS.mixed(256, Lengths(100, 1024), Lengths(100, 1024), 0),
}


@dataclass
class Clock:
    """Stands for the module `time` in the core."""

    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@dataclass
class Step:
    """See quire.engine.runner.PendingStep."""

    clock: Clock
    done_at: float
    result: StepResult

    def draw(self, masks: StepMasks | None) -> None:
        """Nothing is masked."""

    def wait(self) -> StepResult:
        waited = max(0.0, self.done_at - self.clock.now)
        self.clock.now += waited
        return replace(self.result, waited_seconds=waited)


@dataclass
class Device:
    """See quire.engine.runner.Runner; `rate` is how often a draft is right, None without a head."""

    clock: Clock
    rate: float | None
    noise: float
    seed: int
    info: DeviceInfo = field(default=DeviceInfo("simulated", "none", 1))
    free_at: float = 0.0
    steps: int = 0
    verified: int = 0
    offered: dict[int, int] = field(default_factory=dict)  # by slot: how many drafts

    def __post_init__(self) -> None:
        self._draws, self._noise = np.random.default_rng(self.seed), np.random.default_rng(self.seed + 1)

    def launch(self, plan: StepPlan, *, masked: bool) -> Step:
        self.clock.now += HOST_S
        self.steps += 1
        passes = pass_milliseconds(plan) if self.rate is not None else 0.0
        took = (milliseconds(plan) + passes) * (1 + self.noise * self._noise.normal())
        self.free_at = max(self.free_at, self.clock.now) + took / 1e3
        token_ids, accepted = [], {}
        for index, work in enumerate(plan.work):
            token_ids.append(self._draw(work, accepted, index))
        drafts = {}
        if self.rate is not None:
            drafts = {i: (RIGHT,) * work.num_wanted for i, work in enumerate(plan.work) if work.num_wanted}
        self.offered = {plan.work[index].slot: len(tokens) for index, tokens in drafts.items()}
        result = StepResult(tuple(token_ids), accepted=accepted, drafts=drafts, draft_seconds=passes / 1e3)
        return Step(self.clock, self.free_at, result)

    def _draw(self, work: StepWork, accepted: dict[int, int], index: int) -> int:
        if not work.sample:
            return -1
        kept = 0
        while kept < work.num_drafts and self._is_right():
            kept += 1
        if work.num_drafts:
            accepted[index] = kept
            self.verified += work.num_drafts
        # Drafts that nobody verifies are right as often.
        follows = kept == work.num_drafts < self.offered.get(work.slot, 0) and self._is_right()
        return RIGHT if follows else WRONG

    def _is_right(self) -> bool:
        return bool(self._draws.random() < (self.rate or 0.0))

    def prepare(self) -> bool:
        return False

    def close(self) -> None:
        """Holds nothing."""


def milliseconds(plan: StepPlan) -> float:
    """Of a step, its passes of the head not counted."""
    rows = sum(work.num_tokens for work in plan.work)
    context = sum(work.start + work.num_tokens for work in plan.work)
    drawn = sum(1 + work.num_drafts for work in plan.work if work.sample)
    return float(np.interp(rows, ROWS, MILLISECONDS)) + CONTEXT_MS * context + DRAW_MS * drawn + OTHER_MS


def pass_milliseconds(plan: StepPlan) -> float:
    """Of all passes of the head behind a step."""
    wanting = [work for work in plan.work if work.num_wanted]
    context = sum(work.start + work.num_tokens for work in wanting)
    one = PASS_MS + PASS_SEQ_MS * len(wanting) + PASS_CONTEXT_MS * context
    return one * max((work.num_wanted for work in wanting), default=0)


def run(work: Work, length: float | None, fixed: int | None, noise: float, seed: int) -> tuple[float, Device]:
    """Output tokens a second; `length` tokens a step are kept where MOST drafts are verified, None: no drafts. `fixed`:
    so many drafts are always verified, None: the budget decides."""
    device = Device(Clock(), rate_for(length, MOST) if length is not None else None, noise, seed)
    speculator = Speculator(None, SpeculationConfig(MOST), on_device=True) if length is not None else None
    limits = SchedulerConfig(256, 8192, 4096, max_mixed_tokens=512, max_draft_tokens=1024)
    core = EngineCore(
        device, Scheduler(limits, PagePool(50_000), frozenset()), None, 100_000, run_ahead=True, speculator=speculator
    )
    for key, job in enumerate(work):
        stop = StopConditions(job.output_len, ignore_eos=True)
        core.submit(key, Request(str(key), "m", job.prompt, SamplingParams(temperature=0.0), stop))
    with patch.object(quire.engine.core, "time", device.clock), fixed_drafts(fixed):
        while core.has_work:
            core.step()
    return sum(job.output_len for job in work) / device.clock.now, device


def fixed_drafts(count: int | None) -> AbstractContextManager[object]:
    """In the budget's place so many drafts of each sequence, None: the budget."""
    if count is None:
        return nullcontext()
    fixed = ExitStack()
    choices = {"choose": lambda offers, *_: [Choice(min(count, offer.num_drafts), 0) for offer in offers]}
    fixed.enter_context(patch.multiple(quire.engine.speculation.speculator, **choices))
    places = {"choose_places": lambda rates, *_: count if rates else 0}
    fixed.enter_context(patch.multiple(quire.engine.speculation.device_drafts, **places))
    return fixed


def figures(arguments: argparse.Namespace) -> Iterator[str]:
    for name in arguments.only:
        work = WORKLOADS[name]()
        without, _ = run(work, None, None, arguments.noise, arguments.seed)
        yield f"{name:10} without drafts {without:8.0f} tok/s"
        for length in arguments.accept:
            for fixed in [*arguments.fixed, None]:
                speed, device = run(work, length, fixed, arguments.noise, arguments.seed)
                what = "the budget's choice" if fixed is None else f"{fixed} of each"
                yield (
                    f"{name:10} {length:g} a step, {what:20}{speed:8.0f} tok/s, {speed / without:5.2f} of without, "
                    f"{device.steps} steps, {device.verified} verified"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="workloads (default: all)")
    add("--accept", type=float, nargs="+", default=[3.2, 2.0, 1.0], metavar="TOKENS", help="a step, with 4 drafts")
    add("--fixed", type=int, nargs="*", default=[1, 2, 3, 4], metavar="N", help="drafts of each (default: 1 2 3 4)")
    add("--noise", type=float, default=0.01, metavar="SHARE", help="of a step's time (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of all draws (default: %(default)s)")
    for line in figures(parser.parse_args()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
