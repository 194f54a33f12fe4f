"""The batch's state as it lives on a device: tensors indexed by slot, written by plans and by sampling.

Belongs to a runner. The host never reads it: what it needs comes back as a step's tokens. Indexes are numpy's: for a
step's few hundred numbers each of torch's operations costs several times as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from quire.engine.models.model import ForwardBatch
from quire.engine.plan import StepPlan, Work
from quire.engine.sampler import SamplingRows
from quire.engine.sampling_state import SamplingState
from quire.engine.sequence import pages_for
from quire.service.pages import PAGE_SIZE
from quire.service.request import MAX_BAD_WORD_TOKENS

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class WorkColumns:
    """A step's work, or part of it, as arrays of one entry per item."""

    slots: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]  # the position after each item's last token: the next one's
    sample: npt.NDArray[np.bool_]
    score: npt.NDArray[np.bool_]
    drafts: npt.NDArray[np.int64]  # how many
    wanted: npt.NDArray[np.int64]  # how many
    open: npt.NDArray[np.int64]  # how many
    siblings: npt.NDArray[np.int64]  # how many
    # Whether any item has some of them.
    any_score: bool
    any_drafts: bool
    any_wanted: bool
    any_open: bool
    any_siblings: bool

    @classmethod
    def of(cls, work: Sequence[Work]) -> WorkColumns:
        """Of the items in their order."""
        return cls.of_numbers(numbers_of(work))

    @classmethod
    def of_numbers(cls, numbers: npt.NDArray[np.int64]) -> WorkColumns:
        """Of what `numbers_of` made of the items."""
        slots, starts, counts, sample, score, drafts, wanted, opened, siblings = numbers.T
        some: npt.NDArray[np.bool_] = np.logical_or.reduce(numbers, axis=0)
        return cls(
            slots, starts, counts, starts + counts, sample != 0, score != 0, drafts, wanted, opened, siblings,
            *some[4:].tolist(),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.slots)

    def at(self, starts: npt.NDArray[np.int64]) -> WorkColumns:
        """The same, but that the items begin at other positions."""
        return WorkColumns(
            self.slots, starts, self.counts, starts + self.counts, self.sample, self.score, self.drafts, self.wanted,
            self.open, self.siblings, self.any_score, self.any_drafts, self.any_wanted, self.any_open,
            self.any_siblings,
        )  # fmt: skip


def numbers_of(work: Sequence[Work]) -> npt.NDArray[np.int64]:
    """[items, fields], of the items in their order."""
    width = len(Work._fields)
    return np.fromiter(chain.from_iterable(work), np.int64, len(work) * width).reshape(len(work), width)


@dataclass(frozen=True, slots=True)
class Draws:
    """Rows of logits from which a step draws: one for each item of its work that draws, and one more for each draft,
    then for each sibling."""

    items: npt.NDArray[np.int64]  # the step's work that draws
    counts: npt.NDArray[np.int64]  # how many rows each of them has
    firsts: npt.NDArray[np.int64]  # the first of them
    behind: npt.NDArray[np.int64]  # of each row, how many of its item's come before it
    slots: npt.NDArray[np.int64]  # of each row
    positions: npt.NDArray[np.int64]  # of the token to be drawn, in its sequence

    @classmethod
    def of(cls, work: WorkColumns) -> Draws:
        """Of a step's work, in its order."""
        items = work.sample.nonzero()[0]
        slots, ends = work.slots[items], work.ends[items]
        if not work.any_drafts:
            ones, firsts = np.ones(len(items), np.int64), np.arange(len(items))
            return cls(items, ones, firsts, np.zeros(len(items), np.int64), slots, ends)
        drafts = work.drafts[items]
        counts = 1 + drafts + work.siblings[items]
        firsts = counts.cumsum() - counts
        behind = np.arange(counts.sum()) - firsts.repeat(counts)
        depths = behind
        if work.any_siblings:
            trunks = drafts.repeat(counts)
            depths = np.where(behind > trunks, behind - trunks, behind)
        return cls(items, counts, firsts, behind, slots.repeat(counts), (ends + 1 - counts).repeat(counts) + depths)

    def __len__(self) -> int:
        return len(self.slots)

    def at(self, positions: npt.NDArray[np.int64]) -> Draws:
        """The same, but that the tokens to be drawn have other positions."""
        return Draws(self.items, self.counts, self.firsts, self.behind, self.slots, positions)

    @property
    def verified(self) -> npt.NDArray[np.int64]:
        """Which of `items` have drafts."""
        return np.flatnonzero(self.counts > 1)

    def rows_behind(self, ends: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Of each draw, the row of a table that has one for each draw, or more, of each item of the step's work, in
        front of that item's end in `ends`."""
        rows: npt.NDArray[np.int64] = (ends[self.items] - self.counts).repeat(self.counts) + self.behind
        return rows

    def accepted(self, drawn: npt.NDArray[np.int64], drafted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many of each item's drafts are as drawn, int64 [items], by the tokens drawn and drafted for each row;
        there is no draft for an item's last row."""
        if len(self.firsts) == len(self):
            return np.zeros(len(self.firsts), dtype=np.int64)
        wrong = drawn != drafted
        wrong[self.firsts + self.counts - 1] = True
        counted: npt.NDArray[np.int64] = np.minimum.reduceat(np.where(wrong, self.behind, len(self)), self.firsts)
        return counted

    def kept(self, accepted: npt.NDArray[np.int64]) -> dict[int, int]:
        """By item of the step's work: how many of its drafts are as drawn, where there are any."""
        verified = self.verified
        return dict(zip(self.items[verified].tolist(), accepted[verified].tolist(), strict=True))

    def counting(self, rows: npt.NDArray[np.int64], accepted: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether what each of these rows draws counts: all drafts of its item before it are as drawn."""
        counts: npt.NDArray[np.bool_] = np.repeat(accepted, self.counts)[rows] >= self.behind[rows]
        return counts

    def by_item(self, rows: npt.NDArray[np.int64], found: Sequence[_T]) -> dict[int, tuple[_T, ...]]:
        """What was found of each of these rows, which ascend, by item of the step's work."""
        items: dict[int, tuple[_T, ...]] = {}
        for item, one in zip(np.repeat(self.items, self.counts)[rows].tolist(), found, strict=True):
            items[item] = (*items.get(item, ()), one)
        return items

    def rows_of(self, indexes: Sequence[int]) -> npt.NDArray[np.int64]:
        """All rows of these items of the step's work, which must draw, in the order that is given."""
        places = np.searchsorted(self.items, np.asarray(indexes, dtype=np.int64))
        counts = self.counts[places]
        behind = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows: npt.NDArray[np.int64] = np.repeat(self.firsts[places], counts) + behind
        return rows


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
        for drafts in plan.drafts:
            self._tokens[drafts.slot, drafts.position : drafts.position + len(drafts.token_ids)] = drafts.token_ids

    def forward_batch(self, work: WorkColumns) -> ForwardBatch:
        """The model's input for a plan's work, in its order.

        Logits are wanted of the last token and in front of each draft where `sample` is set, and of every token where
        `score` is.
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
        if work.any_drafts:
            first = np.where(work.drafts > 0, work.ends - 1 - work.drafts, work.ends)
            wanted |= positions >= np.repeat(first, work.counts)
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

    def sampling_rows(self, draws: Draws) -> SamplingRows:
        """The sampling parameters of a step's draws."""
        rows, state = torch.from_numpy(draws.slots), self.sampling
        return SamplingRows(
            temperature=state.temperature[rows],
            top_p=state.top_p[rows],
            top_k=state.top_k[rows],
            min_p=state.min_p[rows],
            seed=state.seed[draws.slots],
            position=draws.positions.astype(np.uint64),
        )

    def accept(self, draws: Draws, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many of each item's drafts are as drawn, int64 [draws.items].

        Puts the drawn tokens behind the slot's others, where the next step reads its input; what is drawn after a draft
        that is wrong lies where nobody reads it before it is written again.
        """
        drafted = self._tokens[draws.slots, draws.positions]
        self._tokens[draws.slots, draws.positions] = np.maximum(token_ids, 0)
        return draws.accepted(token_ids, drafted)
