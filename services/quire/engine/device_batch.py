"""The batch's state as it lives on a device: tensors indexed by slot, written by plans and by sampling.

Belongs to a runner. The host never reads it: what it needs comes back as a step's tokens. Indexes are numpy's: for a
step's few hundred numbers each of torch's operations costs several times as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.engine.models.model import ForwardBatch
from quire.engine.plan import StepPlan, Work
from quire.engine.sampler import SamplingRows
from quire.engine.sampling_state import SamplingState
from quire.engine.sequence import pages_for
from quire.service.pages import PAGE_SIZE
from quire.service.request import MAX_BAD_WORD_TOKENS


@dataclass(frozen=True, slots=True)
class WorkColumns:
    """A step's work, or part of it, as arrays of one entry per item."""

    slots: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    sample: npt.NDArray[np.bool_]
    score: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, work: Sequence[Work]) -> WorkColumns:
        """Of the items in their order."""
        numbers = np.fromiter(chain.from_iterable(work), np.int64, len(work) * len(Work._fields))
        slots, starts, counts, sample, score = numbers.reshape(len(work), -1).T
        return cls(slots, starts, counts, sample.astype(bool), score.astype(bool))

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, items: npt.NDArray[np.bool_]) -> WorkColumns:
        return WorkColumns(
            self.slots[items], self.starts[items], self.counts[items], self.sample[items], self.score[items]
        )

    @property
    def ends(self) -> npt.NDArray[np.int64]:
        """The position after each item's last token: the next one's."""
        ends: npt.NDArray[np.int64] = self.starts + self.counts
        return ends


class DeviceBatch:
    """Slots for `max_num_seqs` sequences of up to `max_model_len` tokens."""

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        self.token_ids = torch.zeros(max_num_seqs, max_model_len + 1, dtype=torch.int64)
        self.block_table = torch.zeros(max_num_seqs, pages_for(max_model_len), dtype=torch.int32)
        self.sampling = SamplingState(max_num_seqs, MAX_BAD_WORD_TOKENS)
        # The same memory.
        self._tokens: npt.NDArray[np.int64] = self.token_ids.numpy()
        self._pages: npt.NDArray[np.int32] = self.block_table.numpy()

    def apply(self, plan: StepPlan) -> None:
        """Books the plan's admissions and page grants."""
        for admission in plan.admissions:
            self._tokens[admission.slot, : len(admission.token_ids)] = admission.token_ids
            self.sampling.admit(admission)
        for grant in plan.grants:
            self._pages[grant.slot, grant.first : grant.first + len(grant.pages)] = grant.pages

    def forward_batch(self, work: WorkColumns) -> ForwardBatch:
        """The model's input for a plan's work, in its order.

        Logits are wanted of the last token where `sample` is set, and of every token where `score` is.
        """
        query_start = np.zeros(len(work) + 1, dtype=np.int64)
        np.cumsum(work.counts, out=query_start[1:])
        slots = np.repeat(work.slots, work.counts)
        positions = np.arange(query_start[-1]) + np.repeat(work.starts - query_start[:-1], work.counts)
        pages = self._pages[slots, positions // PAGE_SIZE].astype(np.int64)
        context_lens = work.ends
        max_context_len = int(context_lens.max())
        wanted = np.repeat(work.score, work.counts)
        wanted[query_start[1:] - 1] |= work.sample
        return ForwardBatch(
            token_ids=torch.from_numpy(self._tokens[slots, positions]),
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(pages * PAGE_SIZE + positions % PAGE_SIZE),
            query_start=torch.from_numpy(query_start.astype(np.int32)),
            context_lens=torch.from_numpy(context_lens.astype(np.int32)),
            block_tables=torch.from_numpy(self._pages[work.slots, : pages_for(max_context_len)]),
            logit_rows=torch.from_numpy(np.flatnonzero(wanted)),
            max_query_len=int(work.counts.max()),
            max_context_len=max_context_len,
        )

    def sampling_rows(self, work: WorkColumns) -> SamplingRows:
        """The sampling parameters of the slots of `work`."""
        rows, state = torch.from_numpy(work.slots), self.sampling
        return SamplingRows(
            temperature=state.temperature[rows],
            top_p=state.top_p[rows],
            top_k=state.top_k[rows],
            min_p=state.min_p[rows],
            seed=state.seed[work.slots],
            position=work.ends.astype(np.uint64),
        )

    def write_tokens(self, work: WorkColumns, token_ids: Tensor) -> None:
        """Puts each drawn token behind the slot's others, where the next step reads its input."""
        self._tokens[work.slots, work.ends] = token_ids.clamp_min(0).numpy()
