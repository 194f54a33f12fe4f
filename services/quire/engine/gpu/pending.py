"""A step that was launched on a GPU, and what it brings back to the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.engine.gpu.batch import GpuBatch
from quire.engine.gpu.eagle_drafter import PendingDrafts
from quire.engine.gpu.reports import PromptReport, TokenReport
from quire.engine.gpu.staged_step import TURNS, StagedStep
from quire.engine.logprobs import Found
from quire.engine.plan import StepResult
from quire.engine.runner import StepMasks
from quire.kernels.logprobs import Logprobs
from quire.service.errors import InternalError
from quire.service.request import TokenLogprobs


@dataclass(slots=True)
class GpuPendingStep:
    """A step on its way; see quire.engine.runner.PendingStep."""

    staged: StagedStep
    draw_masked: Callable[[GpuPendingStep, StepMasks | None], None]
    drawn: bool = False
    token_ids: npt.NDArray[np.int64] | None = None  # by draw, once `done`
    accepted: npt.NDArray[np.int32] | None = None  # by slot, likewise; None: no drafts are verified
    done: torch.cuda.Event | None = None
    logprobs: TokenReport | None = None
    prompt_logprobs: list[PromptReport] = field(default_factory=list)
    drafts: PendingDrafts | None = None
    num_captured: int = 0  # graphs
    reported: bool = False  # log-probabilities of some tokens are wanted

    def draw(self, masks: StepMasks | None) -> None:
        if not self.drawn:
            self.draw_masked(self, masks)

    def wait(self) -> StepResult:
        if self.token_ids is None:
            raise InternalError("the step's masks never came")
        waited = None
        if self.done is not None:
            began = time.perf_counter()
            self.done.synchronize()
            waited = time.perf_counter() - began
        layout, draws, drawn = self.staged.layout, self.staged.draws, self.token_ids
        accepted, counts = np.zeros(len(draws.items), dtype=np.int64), {}
        if self.accepted is not None:
            # Of those that have no drafts none is right.
            accepted = np.minimum(self.accepted[layout.drawing_slots], draws.counts - 1)
            counts = dict(zip(layout.verified_items, accepted[layout.verified].tolist(), strict=True))
        token_ids = drawn[draws.firsts + accepted]
        if len(token_ids) < len(layout.work):
            token_ids = _spread(token_ids, draws.items, len(layout.work))
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        if self.logprobs is not None:
            logprobs = self.logprobs.read(draws, accepted)
        prompts = {report.item: tuple(report.read()) for report in self.prompt_logprobs}
        drafts = self.drafts.read() if self.drafts is not None else {}
        seconds = self.drafts.seconds if self.drafts is not None else 0.0
        siblings = self.drafts.read_siblings() if self.drafts is not None else {}
        kept = self._kept(drawn, accepted) if layout.trees else {}
        repeatable = self.num_captured == 0
        return StepResult(
            tuple(token_ids.tolist()), logprobs, prompts, counts, drafts, seconds, repeatable, siblings, kept, waited
        )

    def _kept(self, drawn: npt.NDArray[np.int64], accepted: npt.NDArray[np.int64]) -> dict[int, tuple[int, ...]]:
        """By item of the step's work with siblings, the tokens that come before its last."""
        draws = self.staged.draws
        branched = np.flatnonzero(self.staged.work.siblings[draws.items])
        return {
            item: tuple(drawn[first : first + count].tolist())
            for item, first, count in zip(
                draws.items[branched].tolist(),
                draws.firsts[branched].tolist(),
                accepted[branched].tolist(),
                strict=True,
            )
        }


class Results:
    """Memory of the host, pinned for a GPU, for what steps of `batch` bring back; log-probabilities of up to `most`
    tokens beside each that is drawn."""

    def __init__(self, batch: GpuBatch, most: int) -> None:
        self._batch = batch
        pinned, count = batch.accepted.is_cuda, batch.num_draws
        self._drawn = [torch.zeros(count, dtype=torch.int64, pin_memory=pinned) for _ in range(TURNS)]
        self._accepted = [torch.zeros_like(batch.accepted, device="cpu", pin_memory=pinned) for _ in range(TURNS)]
        # The same memory.
        self._drawn_numbers = [drawn.numpy() for drawn in self._drawn]
        self._accepted_numbers = [accepted.numpy() for accepted in self._accepted]
        self._found = [_new_found(count, most, pinned=pinned) for _ in range(TURNS)]
        self._turn = 0

    def send(self, step: GpuPendingStep, drawn: Tensor, reports: Logprobs, stream: torch.cuda.Stream | None) -> None:
        """Sends what `step` drew, int64 [num_draws], and found, in the order of `stream`."""
        turn = self._turn = (self._turn + 1) % TURNS
        self._drawn[turn].copy_(drawn, non_blocking=True)
        step.token_ids = self._drawn_numbers[turn]
        if step.staged.work.any_drafts:
            self._accepted[turn].copy_(self._batch.accepted, non_blocking=True)
            step.accepted = self._accepted_numbers[turn]
        if step.reported:
            self._report(step, reports)
        if stream is not None:
            step.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            step.done.record(stream)

    def _report(self, step: GpuPendingStep, reports: Logprobs) -> None:
        draws, found = step.staged.draws, self._found[self._turn]
        num_top = self._batch.sampling.num_logprobs[draws.slots]
        rows = np.flatnonzero(num_top >= 0)
        columns = (reports.chosen, reports.ranks, reports.top_tokens, reports.top_logprobs)
        for values, column in zip(found, columns, strict=True):
            values[: len(draws)].copy_(column[: len(draws)], non_blocking=True)
        step.logprobs = TokenReport(rows, num_top[rows], found)


def _spread(token_ids: npt.NDArray[np.int64], items: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Those of `items`, and -1 for the others of so many."""
    spread = np.full(count, -1)
    spread[items] = token_ids
    return spread


def _new_found(num_rows: int, most: int, *, pinned: bool) -> Found:
    return Found(
        torch.zeros(num_rows, pin_memory=pinned),
        torch.zeros(num_rows, dtype=torch.int32, pin_memory=pinned),
        torch.zeros(num_rows, most, dtype=torch.int32, pin_memory=pinned),
        torch.zeros(num_rows, most, pin_memory=pinned),
    )
