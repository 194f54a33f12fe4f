"""Drafts that are right as often as a benchmark is told, whatever the model says: synthetic acceptance.

Weights are random, so no drafter can be any good: how many drafts of a sequence are right is drawn on the device, each
with the same probability if those before it are. What a step computes, and what the host does with it, is as ever; only
the tokens that the host believes are others than those on the device, which costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from quire.engine.core import EngineCore
from quire.engine.gpu.pending import GpuPendingStep
from quire.engine.gpu.runner import GpuRunner
from quire.engine.gpu.staged_step import StagedStep
from quire.engine.plan import StepPlan, StepResult
from quire.engine.runner import StepMasks
from quire.engine.speculation.speculator import SpeculationConfig, Speculator

# What is drafted without a head; any token will do.
_DRAFT = 17
# Drafts of a sequence in a step.
_MOST = 64


def rate_for(length: float, num_drafts: int) -> float:
    """How likely each draft must be right for so many tokens a step, the one after the drafts included."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**n for n in range(num_drafts + 1)) < length else (low, middle)
    return low


@dataclass
class ToldStep:
    """See quire.engine.runner.PendingStep."""

    pending: GpuPendingStep
    plan: StepPlan
    told: ToldDrafts

    def draw(self, masks: StepMasks | None) -> None:
        self.pending.draw(masks)

    def wait(self) -> StepResult:
        return self.told.believe(self.plan, self.pending.wait())


@dataclass
class ToldDrafts:
    """Stands before a runner. Without a head it makes drafts, too, which then cost no time."""

    core: EngineCore
    runner: GpuRunner
    rate: float = 0.0
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    offered: dict[int, tuple[int, ...]] = field(default_factory=dict)  # by slot: what was drafted to follow

    def __post_init__(self) -> None:
        self._launch, self._verify = self.runner.launch, self.runner._verify

    def tell(self, length: float | None, num_drafts: int) -> None:
        """From here on up to `num_drafts` drafts are verified, of a mean of `length` tokens a step; None: no drafts.

        What was learned of drafts before is forgotten.
        """
        self.offered = {}
        self.core._speculator = self.core.stats.speculation = None
        self.runner.launch, self.runner._verify = self._launch, self._verify  # type: ignore[method-assign]
        if length is not None:
            self.rate = rate_for(length, num_drafts)
            self.core._speculator = Speculator(None, SpeculationConfig(num_drafts), on_device=True)
            self.core.stats.speculation = self.core._speculator.stats
            self.runner.launch = self.launch  # type: ignore[method-assign,assignment]
            self.runner._verify = self.verify  # type: ignore[method-assign]

    def launch(self, plan: StepPlan, *, masked: bool) -> ToldStep:
        return ToldStep(self._launch(plan, masked=masked), plan, self)

    def verify(self, staged: StagedStep) -> None:
        """In the place of the runner's own: what it counts is of no use."""
        columns, accepted = self.runner._batch.columns, self.runner._batch.accepted
        right = torch.rand(len(accepted), _MOST, device=accepted.device) < self.rate
        num_drafts = torch.zeros_like(accepted)
        num_drafts.scatter_reduce_(0, columns.slots.to(torch.int64), columns.num_drafts, "amax")
        accepted.copy_(torch.minimum(right.to(torch.int32).cumprod(1).sum(1), num_drafts))

    def believe(self, plan: StepPlan, result: StepResult) -> StepResult:
        """`result` with drafts, where there is no head, and where all that were verified are right with the next one
        that was offered as the token after them, as often as drafts are right."""
        token_ids = list(result.token_ids)
        for index, (work, chosen) in enumerate(zip(plan.work, self.random.random(len(plan.work)), strict=True)):
            offer = self.offered.get(work.slot, ())
            if chosen < self.rate and result.accepted.get(index, 0) == work.num_drafts < len(offer):
                token_ids[index] = offer[work.num_drafts]
        drafts = result.drafts or {
            i: (_DRAFT,) * work.num_wanted for i, work in enumerate(plan.work) if work.num_wanted
        }
        self.offered = {plan.work[index].slot: tokens for index, tokens in drafts.items()}
        return replace(result, token_ids=tuple(token_ids), drafts=drafts)
