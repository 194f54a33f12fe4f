"""Runs steps on the CPU: the reference for every other device, and what a laptop runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.engine.adjust import adjust_logits
from quire.engine.device_batch import DeviceBatch, Draws, WorkColumns
from quire.engine.logprobs import report
from quire.engine.models.model import HiddenTaps, Model
from quire.engine.plan import StepPlan, StepResult
from quire.engine.runner import DeviceInfo, StepMasks
from quire.engine.sampler import sample
from quire.engine.speculation.eagle.drafter import EagleDrafter, Progress
from quire.kernels.token_mask import apply_token_mask
from quire.service.errors import InternalError
from quire.service.request import TokenLogprobs


@dataclass(slots=True)
class _CpuStep:
    """A CPU computes in the caller's thread: what was launched is done, but for a draw that awaits its masks."""

    sample: Callable[[StepMasks | None], StepResult]
    result: StepResult | None = None

    def draw(self, masks: StepMasks | None) -> None:
        if self.result is None:
            self.result = self.sample(masks)

    def wait(self) -> StepResult:
        if self.result is None:
            raise InternalError("the step's masks never came")
        return self.result


class CpuRunner:
    """`quire.engine.runner.Runner` on the CPU. The masks are waited for when the logits are there, not before."""

    def __init__(
        self,
        model: Model,
        num_pages: int,
        max_num_seqs: int,
        max_model_len: int,
        dtype: str,
        drafter: EagleDrafter | None = None,
    ) -> None:
        self.info = DeviceInfo("cpu", dtype, torch.get_num_threads())
        self._model = model
        self._batch = DeviceBatch(max_num_seqs, max_model_len)
        self._cache = model.new_kv_cache(num_pages)
        self._drafter = drafter

    @torch.inference_mode()
    def launch(self, plan: StepPlan, *, masked: bool) -> _CpuStep:
        """Runs the step; it is done when this returns, but for the draw if it is `masked`."""
        self._batch.apply(plan)
        work = WorkColumns.of(plan.work)
        taps = self._taps(plan, work)
        logits = self._model.forward(self._batch.forward_batch(work), self._cache, taps)
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        draws = Draws.of(work)
        if work.any_score:
            prompt_logprobs = self._score(work, logits)
            logits = logits[torch.from_numpy(draws.rows_behind(np.cumsum(_num_logits(work))))]
        step = _CpuStep(partial(self._draw, work, draws, taps, logits, prompt_logprobs))
        if not masked:
            step.draw(None)
        return step

    def prepare(self) -> bool:
        """There is nothing to prepare."""
        return False

    def close(self) -> None:
        """It has no processes of its own."""

    @torch.inference_mode()
    def _draw(
        self,
        work: WorkColumns,
        draws: Draws,
        taps: HiddenTaps | None,
        logits: Tensor,
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]],
        masks: StepMasks | None,
    ) -> StepResult:
        token_ids = np.full(len(work), -1)
        if not len(draws):
            return StepResult(tuple(token_ids.tolist()), {}, prompt_logprobs)
        reported = np.flatnonzero(self._batch.sampling.num_logprobs[draws.slots] >= 0)
        as_given = logits[torch.from_numpy(reported)]
        drawn = self._sample(draws, logits, masks)
        accepted = self._batch.accept(draws, drawn)
        token_ids[draws.items] = drawn[draws.firsts + accepted]
        logprobs = self._report(draws, accepted, drawn, reported, as_given) if reported.size else {}
        began = time.perf_counter()
        drafts = self._draft(work, draws, accepted, token_ids, taps) if taps is not None else {}
        seconds = time.perf_counter() - began
        kept = draws.kept(accepted)
        return StepResult(tuple(token_ids.tolist()), logprobs, prompt_logprobs, kept, drafts, seconds)

    def _taps(self, plan: StepPlan, work: WorkColumns) -> HiddenTaps | None:
        if self._drafter is None:
            return None
        for admission in plan.admissions:
            self._drafter.admit(admission.slot)
        if not work.any_wanted:
            return None
        return HiddenTaps.new(self._drafter.taps, int(work.counts.sum()), self._drafter.target_hidden_size)

    def _draft(
        self,
        work: WorkColumns,
        draws: Draws,
        accepted: npt.NDArray[np.int64],
        token_ids: npt.NDArray[np.int64],
        taps: HiddenTaps,
    ) -> dict[int, tuple[int, ...]]:
        """What may come after what was drawn, for each item that wants it."""
        chosen = (work.wanted[draws.items] > 0) & (token_ids[draws.items] >= 0)
        items = draws.items[chosen]
        if self._drafter is None or not items.size:
            return {}
        progress = Progress(
            slots=work.slots[items],
            starts=work.starts[items],
            counts=work.counts[items] - work.drafts[items] + accepted[chosen],
            rows=(np.cumsum(work.counts) - work.counts)[items],
            wanted=work.wanted[items],
        )
        found = self._drafter.draft(progress, taps.hidden, self._batch.token_ids.numpy())
        return dict(zip(items.tolist(), found, strict=True))

    def _sample(self, draws: Draws, logits: Tensor, masks: StepMasks | None) -> npt.NDArray[np.int64]:
        """The token drawn from each row of logits, which are changed."""
        batch = self._batch
        adjust_logits(logits, batch.sampling, batch.token_ids, draws.slots, torch.from_numpy(draws.positions))
        if masks is not None and masks.work:
            rows = torch.from_numpy(draws.rows_of(masks.work))
            apply_token_mask(logits, rows, torch.from_numpy(masks.batch.rows.view("int32")))
        return sample(logits, batch.sampling_rows(draws)).numpy()

    def _report(
        self,
        draws: Draws,
        accepted: npt.NDArray[np.int64],
        drawn: npt.NDArray[np.int64],
        reported: npt.NDArray[np.int64],
        logits: Tensor,
    ) -> dict[int, tuple[TokenLogprobs, ...]]:
        """What is to be reported of the drawn tokens that count, for each item that wants it; `logits` are those of the
        rows `reported`."""
        counts = draws.counting(reported, accepted)
        rows = reported[counts]
        num_top = self._batch.sampling.num_logprobs[draws.slots[rows]].tolist()
        tokens = torch.from_numpy(drawn[rows]).clamp_min(0)
        return draws.by_item(rows, report(logits[torch.from_numpy(counts)], tokens, num_top))

    def _score(self, work: WorkColumns, logits: Tensor) -> dict[int, tuple[TokenLogprobs, ...]]:
        """What is to be reported of prompts: row r of an item's logits is about the token at start + r + 1."""
        found: dict[int, tuple[TokenLogprobs, ...]] = {}
        state, firsts = self._batch.sampling, np.cumsum(_num_logits(work)) - _num_logits(work)
        for index in np.flatnonzero(work.score).tolist():
            slot, start, first = int(work.slots[index]), int(work.starts[index]), int(firsts[index])
            end = min(int(work.ends[index]), int(state.num_prompt_tokens[slot]) - 1)
            targets = self._batch.token_ids[slot, start + 1 : end + 1]
            num_top = [int(state.num_prompt_logprobs[slot])] * len(targets)
            found[index] = tuple(report(logits[first : first + len(targets)], targets, num_top))
        return found


def _num_logits(work: WorkColumns) -> npt.NDArray[np.int64]:
    """How many rows of logits each item has."""
    return np.where(work.score, work.counts, work.sample * (1 + work.drafts))
