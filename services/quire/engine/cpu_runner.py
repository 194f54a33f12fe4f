"""Runs steps on the CPU: the reference for every other device, and what a laptop runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quire.engine.device_batch import DeviceBatch
from quire.engine.models.model import Model
from quire.engine.plan import StepPlan, StepResult
from quire.engine.runner import DeviceInfo, StepMasks
from quire.engine.sampler import sample
from quire.kernels.token_mask import apply_token_mask


@dataclass(frozen=True, slots=True)
class _DoneStep:
    """A CPU computes in the caller's thread: a launched step is a finished one."""

    result: StepResult

    def wait(self) -> StepResult:
        return self.result


class CpuRunner:
    """`quire.engine.runner.Runner` on the CPU. The masks are waited for when the logits are there, not before."""

    def __init__(self, model: Model, num_pages: int, max_num_seqs: int, max_model_len: int, dtype: str) -> None:
        self.info = DeviceInfo("cpu", dtype, torch.get_num_threads())
        self._model = model
        self._batch = DeviceBatch(max_num_seqs, max_model_len)
        self._cache = model.new_kv_cache(num_pages)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, masks: StepMasks | None) -> _DoneStep:
        """Runs the step and returns it done."""
        self._batch.apply(plan)
        logits = self._model.forward(self._batch.forward_batch(plan.work), self._cache)
        token_ids = [-1] * len(plan.work)
        drawn = [index for index, item in enumerate(plan.work) if item.sample]
        if drawn:
            work = [plan.work[index] for index in drawn]
            if masks is not None and masks.work:
                row_of = {index: row for row, index in enumerate(drawn)}
                rows = torch.tensor([row_of[index] for index in masks.work])
                apply_token_mask(logits, rows, torch.from_numpy(masks.batch.rows.view("int32")))
            sampled = sample(logits, self._batch.sampling_rows(work))
            self._batch.write_tokens(work, sampled)
            for index, token_id in zip(drawn, sampled.tolist(), strict=True):
                token_ids[index] = token_id
        return _DoneStep(StepResult(tuple(token_ids)))
