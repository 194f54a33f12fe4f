"""The device's side of a step: what the core asks of it, on whatever device it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from quire.engine.masks import MaskBatch, MaskTicket
from quire.engine.plan import StepPlan, StepResult


class StepMasks:
    """The masks of one step, on their way while the forward pass runs.

    Row i of the batch masks the logits of `plan.work[work[i]]`.
    """

    def __init__(self, work: tuple[int, ...], ticket: MaskTicket) -> None:
        self.work = work
        self._ticket = ticket

    def arrive(self, seconds: float) -> bool:
        """Whether `batch` is there; blocks for up to so many seconds until it is."""
        return self._ticket.arrives(seconds)

    @cached_property
    def batch(self) -> MaskBatch:
        """Blocks until the rows are filled; ask as late as possible."""
        return self._ticket.wait()


class PendingStep(Protocol):
    """A step that was launched."""

    def draw(self, masks: StepMasks | None) -> None:
        """Draws the tokens of a step that was launched `masked`: once, before the next launch. No effect on others."""

    def wait(self) -> StepResult:
        """Blocks until its tokens are known."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """Where and how a runner computes, for status and logs."""

    device: str
    dtype: str
    threads: int


class Runner(Protocol):
    """Owns the batch's state on a device: tokens, block tables, sampling parameters, pages.

    The host may launch a step before it has read the last one's tokens: a plan never names them.
    """

    info: DeviceInfo

    def launch(self, plan: StepPlan, *, masked: bool) -> PendingStep:
        """Starts a step. Steps run in the order of their launches.

        Its tokens are drawn at once, unless it is `masked`: then `draw` brings the masks, which may depend on the
        tokens of the step before. Raises QuireError if the device fails; the runner can't be used after that.
        """

    def prepare(self) -> bool:
        """Does a part of what makes later steps faster, while there is no work; returns whether there may be more."""

    def close(self) -> None:
        """Lets go of what it holds, and ends the processes that compute with this one; it can't be used after that."""
