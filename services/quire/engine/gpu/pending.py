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
    token_ids: Tensor | None = None  # on the host, once `done`
    accepted: Tensor | None = None  # int32 [slots] on the host, likewise; None: no drafts are verified
    done: torch.cuda.Event | None = None
    logprobs: TokenReport | None = None
    prompt_logprobs: list[PromptReport] = field(default_factory=list)
    drafts: PendingDrafts | None = None
    num_captured: int = 0  # graphs

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
        draws, token_ids = self.staged.draws, np.full(len(self.staged.work), -1)
        drawn = self.token_ids[: len(draws)].numpy()
        accepted = np.zeros(len(draws.items), dtype=np.int64)
        if self.accepted is not None:
            verified = draws.verified
            accepted[verified] = self.accepted.numpy()[draws.slots[draws.firsts[verified]]]
        token_ids[draws.items] = drawn[draws.firsts + accepted]
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        if self.logprobs is not None:
            logprobs = self.logprobs.read(draws, accepted)
        prompts = {report.item: tuple(report.read()) for report in self.prompt_logprobs}
        drafts = self.drafts.read() if self.drafts is not None else {}
        seconds = self.drafts.seconds if self.drafts is not None else 0.0
        siblings = self.drafts.read_siblings() if self.drafts is not None else {}
        kept = self._kept(drawn, accepted) if self.staged.layout.trees else {}
        counts = draws.kept(accepted) if self.accepted is not None else {}
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
        self._found = [_new_found(count, most, pinned=pinned) for _ in range(TURNS)]
        self._turn = 0

    def send(self, step: GpuPendingStep, drawn: Tensor, reports: Logprobs, stream: torch.cuda.Stream | None) -> None:
        """Sends what `step` drew, int64 [num_draws], and found, in the order of `stream`."""
        draws = step.staged.draws
        self._turn = (self._turn + 1) % TURNS
        step.token_ids = self._drawn[self._turn]
        step.token_ids[: len(draws)].copy_(drawn[: len(draws)], non_blocking=True)
        if step.staged.work.any_drafts:
            step.accepted = self._accepted[self._turn]
            step.accepted.copy_(self._batch.accepted, non_blocking=True)
        num_top = self._batch.sampling.num_logprobs[draws.slots]
        rows = np.flatnonzero(num_top >= 0)
        if rows.size:
            found = self._found[self._turn]
            columns = (reports.chosen, reports.ranks, reports.top_tokens, reports.top_logprobs)
            for values, column in zip(found, columns, strict=True):
                values[: len(draws)].copy_(column[: len(draws)], non_blocking=True)
            step.logprobs = TokenReport(rows, num_top[rows], found)
        if stream is not None:
            step.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            step.done.record(stream)


def _new_found(num_rows: int, most: int, *, pinned: bool) -> Found:
    return Found(
        torch.zeros(num_rows, pin_memory=pinned),
        torch.zeros(num_rows, dtype=torch.int32, pin_memory=pinned),
        torch.zeros(num_rows, most, dtype=torch.int32, pin_memory=pinned),
        torch.zeros(num_rows, most, pin_memory=pinned),
    )
