"""Drafts that are right as often as a benchmark is told, whatever the model says: synthetic acceptance.

Weights are random, so no drafter can be any good: which drafts of a step are right is drawn here, each with the same
probability if those before it are. What a step computes, and what the host does with it, is as ever; only the tokens
that the host believes are others than those on the device, which costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from quire.engine.core import EngineCore
from quire.engine.gpu.runner import GpuPendingStep, GpuRunner
from quire.engine.plan import StepPlan, StepResult
from quire.engine.runner import StepMasks
from quire.engine.speculation.speculator import SpeculationConfig, Speculator

# What is drafted without a head; any token will do.
_DRAFT = 17


def rate_for(length: float, num_drafts: int) -> float:
    """How likely each draft must be right for so many tokens a step, the one after the drafts included."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**n for n in range(num_drafts + 1)) < length else (low, middle)
    return low


@dataclass
class ToldStep:
    """See quire.engine.runner.PendingStep. `right`: whether the draft that each row's draw stands in front of is."""

    pending: GpuPendingStep
    plan: StepPlan
    right: npt.NDArray[np.bool_]
    told: ToldDrafts

    def draw(self, masks: StepMasks | None) -> None:
        self.pending.draw(masks)

    def wait(self) -> StepResult:
        pending = self.pending
        assert pending.token_ids is not None
        if pending.done is not None:
            pending.done.synchronize()
        drawn = pending.token_ids[: len(self.right)].numpy()
        pending.staged = replace(pending.staged, drafted=np.where(self.right, drawn, -1))
        return self.told.believe(self.plan, pending.wait())


@dataclass
class ToldDrafts:
    """Stands before a runner. Without a head it makes drafts, too, which then cost no time."""

    core: EngineCore
    runner: GpuRunner
    rate: float = 0.0
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    offered: dict[int, int] = field(default_factory=dict)  # by slot: what was drafted to follow and not verified

    def __post_init__(self) -> None:
        self._launch = self.runner.launch

    def tell(self, length: float | None, num_drafts: int) -> None:
        """From here on up to `num_drafts` drafts are verified, of a mean of `length` tokens a step; None: no drafts.

        What was learned of drafts before is forgotten.
        """
        self.offered = {}
        self.core._speculator = self.core.stats.speculation = None
        self.runner.launch = self._launch  # type: ignore[method-assign]
        if length is not None:
            self.rate = rate_for(length, num_drafts)
            self.core._speculator = Speculator(None, SpeculationConfig(num_drafts), on_device=True)
            self.core.stats.speculation = self.core._speculator.stats
            self.runner.launch = self.launch  # type: ignore[method-assign,assignment]

    def launch(self, plan: StepPlan, *, masked: bool) -> ToldStep:
        pending = self._launch(plan, masked=masked)
        return ToldStep(pending, plan, self.random.random(len(pending.staged.draws)) < self.rate, self)

    def believe(self, plan: StepPlan, result: StepResult) -> StepResult:
        """`result` with drafts, where there is no head, and with tokens as they were drafted, where nobody verified."""
        token_ids = result.token_ids
        if self.offered and not plan.drafts:
            chosen = self.random.random(len(plan.work)) < self.rate
            token_ids = tuple(
                self.offered.get(work.slot, token) if right else token
                for work, token, right in zip(plan.work, token_ids, chosen, strict=True)
            )
        drafts = result.drafts or {
            i: (_DRAFT,) * work.num_wanted for i, work in enumerate(plan.work) if work.num_wanted
        }
        self.offered = {plan.work[index].slot: tokens[0] for index, tokens in drafts.items()}
        return replace(result, token_ids=token_ids, drafts=drafts)
