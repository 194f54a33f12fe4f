"""The batch as it lives on a GPU, and what the host sends there: one copy a step.

Token ids, block tables and sampling parameters stay on the device: plans bring changes, sampling writes the next step's
input. Everything else that a step needs is a few numbers per sequence. They and the changes go into one pinned buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.engine.device_batch import WorkColumns
from quire.engine.models.gpu_decoder import MIN_SHARED_PAGES, MIN_SHARING
from quire.engine.plan import StepPlan
from quire.engine.sampling_state import SamplingState
from quire.engine.sequence import pages_for
from quire.kernels.sample import SamplingParameters
from quire.service.request import MAX_BAD_WORD_TOKENS

# Changes that fit the buffer for a step's inputs; a prompt that joins brings one for each token.
_CHANGES = 16384


@dataclass(frozen=True, slots=True)
class Columns:
    """Views of a step's numbers, in a buffer of the host or of the device; S = N = max_num_seqs, rounded up to even."""

    query_start: Tensor  # int32 [S + 1]
    slots: Tensor  # int32 [S]
    starts: Tensor  # int32 [S]
    context_lens: Tensor  # int32 [S]
    logit_rows: Tensor  # int32 [N], of the rows that draw a token
    drawing_slots: Tensor  # int32 [N], theirs; -1 for padding
    positions: Tensor  # int32 [N], of the token to be drawn in its sequence

    @classmethod
    def of(cls, buffer: Tensor, size: int) -> Columns:
        """Of the first `words(size)` words of an int32 buffer."""
        parts = torch.split(buffer[: cls.words(size)], [size + 2] + [size] * 6)
        return cls(parts[0][: size + 1], *parts[1:])

    @staticmethod
    def words(size: int) -> int:
        """How long the buffer must be: an even number for an even size."""
        return 7 * size + 2


@dataclass(frozen=True, slots=True)
class StagedStep:
    """What the host knows of a step whose inputs are on their way."""

    work: WorkColumns
    num_tokens: int
    drawing: npt.NDArray[np.int64]  # indexes of the work that draws a token, in its order
    decodes_only: bool  # every sequence computes one token and draws the next
    grouped: bool  # some sequences share a long prefix


class GpuBatch:
    """Slots for `max_num_seqs` sequences of up to `max_model_len` tokens; works on any device."""

    def __init__(self, max_num_seqs: int, max_model_len: int, device: torch.device) -> None:
        self.size = max_num_seqs + max_num_seqs % 2
        self.sampling = SamplingState(max_num_seqs, MAX_BAD_WORD_TOKENS)
        self._row, self._pages = max_model_len + 1, pages_for(max_model_len)
        # One block of memory, so that all kinds of changes are one scatter; what has 64 bits comes first.
        widths = [2, 1, 1, 1, 1, self._row, self._pages]
        self.memory = torch.zeros(max_num_seqs * sum(widths), dtype=torch.int32, device=device)
        parts = torch.split(self.memory, [max_num_seqs * width for width in widths])
        self.parameters = SamplingParameters(
            seed=parts[0].view(torch.int64),
            temperature=parts[1].view(torch.float32),
            top_p=parts[2].view(torch.float32),
            min_p=parts[3].view(torch.float32),
            top_k=parts[4],
        )
        self.token_ids = parts[5].view(max_num_seqs, self._row)
        self.block_tables = parts[6].view(max_num_seqs, self._pages)
        # Each slot's last page of those that sequences must share to be a group.
        self._shared_pages = np.full(max_num_seqs, -1)
        self._starts = [max_num_seqs * sum(widths[:index]) for index in range(len(widths))]
        self._device = device
        words = Columns.words(self.size)
        self._inputs = torch.zeros(words + 3 * _CHANGES, dtype=torch.int32, device=device)
        self.columns = Columns.of(self._inputs, self.size)

    def clear_inputs(self) -> None:
        """Makes the next step one of padding only."""
        self.columns.query_start.zero_()
        self.columns.context_lens.zero_()
        self.columns.drawing_slots.fill_(-1)

    def stage(self, plan: StepPlan) -> StagedStep:
        """Sends a plan to the device: its changes are made and `columns` filled in the order of launches."""
        work = WorkColumns.of(plan.work)
        places, values = self._changes(plan)
        words, fits = Columns.words(self.size), len(places) <= _CHANGES
        buffer = torch.empty(words + 3 * len(places), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        changes = buffer[words:].numpy()
        changes[: 2 * len(places)].view(np.int64)[:] = places
        changes[2 * len(places) :] = values
        staged = self._fill(Columns.of(buffer, self.size), work)
        if fits:
            self._inputs[: len(buffer)].copy_(buffer, non_blocking=True)
            arrived = self._inputs[words : len(buffer)]
        else:
            self._inputs[:words].copy_(buffer[:words], non_blocking=True)
            arrived = buffer[words:].to(self._device, non_blocking=True)
        if len(places):
            self.memory.index_copy_(0, arrived[: 2 * len(places)].view(torch.int64), arrived[2 * len(places) :])
        return staged

    def _changes(self, plan: StepPlan) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Where in `memory` the plan puts which numbers."""
        seeds, temperatures, top_ps, min_ps, top_ks, tokens, tables = self._starts
        starts: list[int] = []
        counts: list[int] = []
        values: list[int] = []
        for admission in plan.admissions:
            self.sampling.admit(admission)
            self._shared_pages[admission.slot] = -1
            slot, sampling = admission.slot, admission.sampling
            reals = np.array([sampling.temperature, sampling.top_p, sampling.min_p], dtype=np.float32)
            seed = np.array([sampling.seed], dtype=np.uint64)
            starts += [seeds + 2 * slot, temperatures + slot, top_ps + slot, min_ps + slot, top_ks + slot]
            counts += [2, 1, 1, 1, 1]
            values += [*seed.view(np.int32).tolist(), *reals.view(np.int32).tolist(), sampling.top_k]
            starts.append(tokens + slot * self._row)
            counts.append(len(admission.token_ids))
            values += admission.token_ids
        for grant in plan.grants:
            if grant.first < MIN_SHARED_PAGES <= grant.first + len(grant.pages):
                self._shared_pages[grant.slot] = grant.pages[MIN_SHARED_PAGES - 1 - grant.first]
            starts.append(tables + grant.slot * self._pages + grant.first)
            counts.append(len(grant.pages))
            values += grant.pages
        lengths = np.array(counts, dtype=np.int64)
        offsets = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return np.repeat(np.array(starts, dtype=np.int64), lengths) + offsets, np.array(values, dtype=np.int32)

    def _fill(self, columns: Columns, work: WorkColumns) -> StagedStep:
        count, ends = len(work), work.ends
        query_start = columns.query_start.numpy()
        query_start[0] = 0
        np.cumsum(work.counts, out=query_start[1 : count + 1])
        num_tokens = int(query_start[count])
        query_start[count + 1 :] = num_tokens
        _put(columns.slots, work.slots)
        _put(columns.starts, work.starts)
        _put(columns.context_lens, ends)
        drawing = np.flatnonzero(work.sample)
        _put(columns.logit_rows, query_start[1 : count + 1][drawing] - 1)
        _put(columns.drawing_slots, work.slots[drawing], -1)
        _put(columns.positions, ends[drawing])
        decodes_only = num_tokens == count == len(drawing) and not work.score.any()
        return StagedStep(work, num_tokens, drawing, decodes_only, self._share_prefixes(work))

    def _share_prefixes(self, work: WorkColumns) -> bool:
        pages = self._shared_pages[work.slots]
        return bool((np.bincount(pages[pages >= 0]) >= MIN_SHARING).any())


def _put(column: Tensor, values: npt.NDArray[np.generic], padding: int = 0) -> None:
    array = column.numpy()
    array[: len(values)] = values
    array[len(values) :] = padding
