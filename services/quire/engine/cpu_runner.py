"""Runs steps on the CPU: the reference for every other device, and what a laptop runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.engine.adjust import adjust_logits
from quire.engine.device_batch import DeviceBatch, slots_of
from quire.engine.logprobs import report
from quire.engine.models.model import Model
from quire.engine.plan import StepPlan, StepResult, Work
from quire.engine.runner import DeviceInfo, StepMasks
from quire.engine.sampler import sample
from quire.kernels.token_mask import apply_token_mask
from quire.service.request import TokenLogprobs


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
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        if any(item.score for item in plan.work):
            prompt_logprobs = self._score(plan.work, logits)
            logits = logits[_last_rows(plan.work)]
        drawn = [index for index, item in enumerate(plan.work) if item.sample]
        sampled, logprobs = self._sample(plan.work, drawn, logits, masks)
        token_ids = [-1] * len(plan.work)
        for index, token_id in zip(drawn, sampled.tolist(), strict=True):
            token_ids[index] = token_id
        return _DoneStep(StepResult(tuple(token_ids), logprobs, prompt_logprobs))

    def _sample(
        self, all_work: Sequence[Work], drawn: list[int], logits: Tensor, masks: StepMasks | None
    ) -> tuple[Tensor, dict[int, TokenLogprobs]]:
        """The token drawn for each of `all_work[drawn]`, whose logits these are; and what is to be reported of them."""
        if not drawn:
            return torch.empty(0, dtype=torch.int64), {}
        batch, work = self._batch, [all_work[index] for index in drawn]
        slots = slots_of(work)
        reported = [row for row, slot in enumerate(slots) if batch.sampling.num_logprobs[slot] >= 0]
        as_given = logits[reported]
        lengths = torch.tensor([item.start + item.count for item in work])
        adjust_logits(logits, batch.sampling, batch.token_ids, slots, lengths)
        if masks is not None and masks.work:
            row_of = {index: row for row, index in enumerate(drawn)}
            rows = torch.tensor([row_of[index] for index in masks.work])
            apply_token_mask(logits, rows, torch.from_numpy(masks.batch.rows.view("int32")))
        sampled = sample(logits, batch.sampling_rows(work))
        batch.write_tokens(work, sampled)
        if not reported:
            return sampled, {}
        num_top = batch.sampling.num_logprobs[slots[reported]].tolist()
        found = report(as_given, sampled[reported].clamp_min(0), num_top)
        return sampled, {drawn[row]: logprobs for row, logprobs in zip(reported, found, strict=True)}

    def _score(self, work: Sequence[Work], logits: Tensor) -> dict[int, tuple[TokenLogprobs, ...]]:
        """What is to be reported of prompts: row r of an item's logits is about the token at start + r + 1."""
        found: dict[int, tuple[TokenLogprobs, ...]] = {}
        state, first = self._batch.sampling, 0
        for index, item in enumerate(work):
            if item.score:
                end = min(item.start + item.count, int(state.num_prompt_tokens[item.slot]) - 1)
                targets = self._batch.token_ids[item.slot, item.start + 1 : end + 1]
                num_top = [int(state.num_prompt_logprobs[item.slot])] * len(targets)
                found[index] = tuple(report(logits[first : first + len(targets)], targets, num_top))
            first += _num_logits(item)
        return found


def _last_rows(work: Sequence[Work]) -> Tensor:
    """Of all logits of a step, those after which a token is drawn."""
    ends = torch.tensor([_num_logits(item) for item in work]).cumsum(0)
    return ends[torch.tensor([item.sample for item in work])] - 1


def _num_logits(item: Work) -> int:
    return item.count if item.score else int(item.sample)
