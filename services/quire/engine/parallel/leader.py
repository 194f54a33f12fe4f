"""Rank 0's runner: tells all followers what it is about to do, and does it itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quire.engine.gpu.pending import GpuPendingStep
from quire.engine.gpu.runner import GpuRunner
from quire.engine.parallel.messages import Launch, Prepare
from quire.engine.parallel.ranks import Ranks
from quire.engine.plan import StepPlan, StepResult
from quire.engine.runner import StepMasks


@dataclass(slots=True)
class LedStep:
    """A step on its way on all ranks; see quire.engine.runner.PendingStep."""

    step: GpuPendingStep
    ranks: Ranks

    def draw(self, masks: StepMasks | None) -> None:
        with self.ranks.watched():
            self.step.draw(masks)

    def wait(self) -> StepResult:
        with self.ranks.watched():
            return self.step.wait()


class Leader:
    """`quire.engine.runner.Runner` over all ranks, `runner` being this one's. Raises LostRankError once one is gone."""

    def __init__(self, runner: GpuRunner, ranks: Ranks) -> None:
        self.info = runner.info
        if self.info.device != "cpu":
            self.info = replace(self.info, device=f"{ranks.group.size} × {self.info.device}")
        self.runner = runner
        self._ranks = ranks

    def launch(self, plan: StepPlan, *, masked: bool) -> LedStep:
        """Starts a step on all ranks. Followers know nothing of masks: what is drawn comes from here."""
        with self._ranks.watched():
            self._ranks.send(Launch(plan))
            return LedStep(self.runner.launch(plan, masked=masked), self._ranks)

    def prepare(self) -> bool:
        """Captures the next graph on all ranks; returns whether there may be another."""
        with self._ranks.watched():
            self._ranks.send(Prepare())
            return self.runner.prepare()

    def close(self) -> None:
        """Ends the followers."""
        self.runner.close()
        self._ranks.close()
