"""The batch's state as it lives on a device: tensors indexed by slot, written by plans and by sampling.

Belongs to a runner. The host never reads it: what it needs comes back as a step's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

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


class DeviceBatch:
    """Slots for `max_num_seqs` sequences of up to `max_model_len` tokens."""

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        self.token_ids = torch.zeros(max_num_seqs, max_model_len + 1, dtype=torch.int64)
        self.block_table = torch.zeros(max_num_seqs, pages_for(max_model_len), dtype=torch.int32)
        self.sampling = SamplingState(max_num_seqs, MAX_BAD_WORD_TOKENS)

    def apply(self, plan: StepPlan) -> None:
        """Books the plan's admissions and page grants."""
        for admission in plan.admissions:
            self.token_ids[admission.slot, : len(admission.token_ids)] = torch.tensor(admission.token_ids)
            self.sampling.admit(admission)
        for grant in plan.grants:
            pages = torch.tensor(grant.pages, dtype=torch.int32)
            self.block_table[grant.slot, grant.first : grant.first + len(grant.pages)] = pages

    def forward_batch(self, work: Sequence[Work]) -> ForwardBatch:
        """The model's input for a plan's work, in its order.

        Logits are wanted of the last token where `sample` is set, and of every token where `score` is.
        """
        slots = torch.tensor([item.slot for item in work])
        starts = torch.tensor([item.start for item in work])
        counts = torch.tensor([item.count for item in work])
        query_start = torch.zeros(len(work) + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=query_start[1:])
        row_slots = slots.repeat_interleave(counts)
        positions = torch.arange(int(query_start[-1])) + (starts - query_start[:-1]).repeat_interleave(counts)
        pages = self.block_table[row_slots, positions // PAGE_SIZE].to(torch.int64)
        context_lens = starts + counts
        max_context_len = int(context_lens.max())
        wanted = torch.tensor([item.score for item in work]).repeat_interleave(counts)
        wanted[query_start[1:] - 1] |= torch.tensor([item.sample for item in work])
        return ForwardBatch(
            token_ids=self.token_ids[row_slots, positions],
            positions=positions,
            slot_mapping=pages * PAGE_SIZE + positions % PAGE_SIZE,
            query_start=query_start.to(torch.int32),
            context_lens=context_lens.to(torch.int32),
            block_tables=self.block_table[slots, : pages_for(max_context_len)],
            logit_rows=torch.nonzero(wanted).squeeze(-1),
            max_query_len=int(counts.max()),
            max_context_len=max_context_len,
        )

    def sampling_rows(self, work: Sequence[Work]) -> SamplingRows:
        """The sampling parameters of the slots of `work`."""
        slots = slots_of(work)
        rows, state = torch.from_numpy(slots), self.sampling
        return SamplingRows(
            temperature=state.temperature[rows],
            top_p=state.top_p[rows],
            top_k=state.top_k[rows],
            min_p=state.min_p[rows],
            seed=state.seed[slots],
            position=np.array([item.start + item.count for item in work], dtype=np.uint64),
        )

    def write_tokens(self, work: Sequence[Work], token_ids: Tensor) -> None:
        """Puts each drawn token behind the slot's others, where the next step reads its input."""
        slots = torch.tensor([item.slot for item in work])
        positions = torch.tensor([item.start + item.count for item in work])
        self.token_ids[slots, positions] = token_ids.clamp_min(0)


def slots_of(work: Sequence[Work]) -> npt.NDArray[np.int64]:
    """The slot of each item."""
    return np.array([item.slot for item in work], dtype=np.int64)
