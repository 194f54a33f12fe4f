"""What benchmarks of the GPU's engine look at beside the time: the host, the GPU's pauses, single steps, pages."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from quire.engine.core import EngineCore
from quire.engine.gpu.pending import GpuPendingStep
from quire.engine.gpu.runner import GpuRunner
from quire.engine.plan import StepPlan
from quire.engine.runner import StepMasks
from quire.engine.speculation.speculator import Speculator
from quire.engine.speculation.step_watch import StepTime
from quire.service.pages import PAGE_SIZE


class HostWait:
    """How long the host waits for the GPU, within its block: what is left of the time is Python's."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._synchronize = torch.cuda.Event.synchronize

    def __enter__(self) -> HostWait:
        torch.cuda.Event.synchronize = lambda event: self._timed(event)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.Event.synchronize = self._synchronize  # type: ignore[method-assign]

    def _timed(self, event: torch.cuda.Event) -> None:
        began = time.perf_counter()
        self._synchronize(event)
        self.seconds += time.perf_counter() - began


class StepGaps:
    """How long the GPU has nothing to do between two steps: from one's last operation to the next one's first."""

    def __init__(self, runner: GpuRunner) -> None:
        self._runner = runner
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._launch = runner.launch
        runner.launch = self._timed  # type: ignore[method-assign]

    def share(self) -> float:
        """Of the time from the first step's begin to the last one's end; stops measuring."""
        self._runner.launch = self._launch  # type: ignore[method-assign]
        torch.cuda.synchronize()
        if len(self._events) < 2:
            return 0.0
        idle = sum(before[1].elapsed_time(after[0]) for before, after in pairwise(self._events))
        return idle / self._events[0][0].elapsed_time(self._events[-1][1])

    def _timed(self, plan: StepPlan, *, masked: bool) -> GpuPendingStep:
        events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        events[0].record(self._runner._stream)
        step = self._launch(plan, masked=masked)
        self._events.append(events)
        if not masked:
            events[1].record(self._runner._stream)
            return step
        draw = step.draw_masked

        def draw_masked(step: GpuPendingStep, masks: StepMasks | None) -> None:
            draw(step, masks)
            events[1].record(self._runner._stream)

        step.draw_masked = draw_masked
        return step


class StepTimes:
    """What the budget is told of each step within its block, None for one that captured something."""

    def __init__(self) -> None:
        self.told: list[StepTime | None] = []
        self._observe = Speculator.observe_step

    def __enter__(self) -> StepTimes:
        Speculator.observe_step = lambda speculator, told: self._observed(speculator, told)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Speculator.observe_step = self._observe  # type: ignore[method-assign]

    def _observed(self, speculator: Speculator, told: StepTime | None) -> None:
        self.told.append(told)
        self._observe(speculator, told)


@dataclass(frozen=True)
class Step:
    """What a step took, in seconds, and did."""

    seconds: float
    tokens: int
    sequences: int
    context: int


class Trace:
    """A meter's `each_step`: every step of a run that begins now."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._steps: list[Step] = []
        self._last, self._computed = time.perf_counter(), core.stats.computed_tokens

    def __call__(self) -> None:
        now, scheduler, computed = time.perf_counter(), self._core.scheduler, self._core.stats.computed_tokens
        context = sum(sequence.num_computed for sequence in scheduler)
        self._steps.append(Step(now - self._last, computed - self._computed, scheduler.num_running, context))
        self._last, self._computed = now, computed

    def show(self, shape: dict[str, Any]) -> None:
        """Groups of steps by their tokens: how long they took, and the bytes that they read over that time."""
        layers, hidden, head = shape["num_hidden_layers"], shape["hidden_size"], shape["head_dim"]
        heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
        weights = layers * (2 * hidden * head * (heads + kv_heads) + 3 * hidden * shape["intermediate_size"])
        weights += shape["vocab_size"] * hidden
        groups: dict[int, list[Step]] = {}
        for step in self._steps:
            groups.setdefault(min(step.tokens.bit_length(), 13), []).append(step)
        for _, steps in sorted(groups.items()):
            seconds = sum(step.seconds for step in steps)
            read = sum(2 * weights + 4 * layers * kv_heads * head * step.context for step in steps)
            low, high = min(step.tokens for step in steps), max(step.tokens for step in steps)
            print(
                f"  {len(steps):5} steps of {low:5} to {high:5} tokens: {1e3 * seconds / len(steps):8.3f} ms each, "
                f"{seconds:7.3f} s in all, {read / seconds / 1e12:5.2f} TB/s"
            )


class PageWaste:
    """A meter's `each_step`: the share of slots in granted pages that hold no token, over all steps."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._granted = self._used = 0

    def __call__(self) -> None:
        running = [sequence for sequence in self._core.scheduler if sequence.block_table]
        self._granted += sum(len(sequence.block_table) * PAGE_SIZE for sequence in running)
        self._used += sum(sequence.num_computed for sequence in running)

    @property
    def share(self) -> float:
        return 1 - self._used / self._granted
