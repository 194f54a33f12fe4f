"""A step's numbers on their way to the GPU, and what the host knows of it: filled by `quire.engine.gpu.batch`.

The views of what travels are made once: to make them costs more than to fill them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.engine.device_batch import Draws, WorkColumns

# Changes that fit the buffer for a step's inputs; a prompt that joins brings one for each token.
MAX_CHANGES = 16384
# Steps whose memory on the host is not used again yet: that of a core that runs ahead by one, and one more.
TURNS = 3

_Numbers = TypeVar("_Numbers", Tensor, npt.NDArray[np.int32])


@dataclass(frozen=True, slots=True)
class Columns(Generic[_Numbers]):
    """Views of a step's numbers, in a buffer of the host or of the device; S and N are the batch's."""

    query_start: _Numbers  # int32 [S + 1]
    slots: _Numbers  # int32 [S]
    starts: _Numbers  # int32 [S]
    context_lens: _Numbers  # int32 [S]
    num_open: _Numbers  # int32 [S], of drafts that the step before verifies
    num_drafts: _Numbers  # int32 [S], of those that this one does
    num_siblings: _Numbers  # int32 [S], beside them
    first_draws: _Numbers  # int32 [S]
    logit_rows: _Numbers  # int32 [N], of the rows that draw a token
    drawing_slots: _Numbers  # int32 [N], theirs; -1 for padding
    positions: _Numbers  # int32 [N], of the token to be drawn in its sequence
    draw_items: _Numbers  # int32 [N], which of the S sequences draws

    @classmethod
    def of(cls, buffer: _Numbers, num_seqs: int, num_draws: int) -> Columns[_Numbers]:
        """Of the first `words` words of an int32 buffer."""
        sizes = [num_seqs + 2] + [num_seqs] * 7 + [num_draws] * 4
        parts = [buffer[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]
        return cls(parts[0][: num_seqs + 1], *parts[1:])

    @staticmethod
    def words(num_seqs: int, num_draws: int) -> int:
        """How long the buffer must be: an even number for even sizes."""
        return 8 * num_seqs + 2 + 4 * num_draws


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What steps have in common whose sequences do the same, each of them at any position: found once for all that come
    in a row, and the key of what else follows from it. `work` and `draws` are those of the step that begins at 0."""

    work: WorkColumns
    draws: Draws
    owners: npt.NDArray[np.int64]  # of each draw, which item of the work draws
    drawing_slots: npt.NDArray[np.int64]  # of each of the draws' items
    verified: npt.NDArray[np.int64]  # which of the draws' items have drafts
    verified_items: tuple[int, ...]  # they, as items of the work
    num_tokens: int
    draws_only: bool  # every row draws a token: decodes and verifications, no prompts
    grouped: bool  # some sequences share a long prefix
    trees: bool  # some drafts have siblings

    @classmethod
    def of(cls, work: WorkColumns, *, grouped: bool) -> Layout:
        """Of work that begins at 0."""
        draws, num_tokens = Draws.of(work), int(work.counts.sum())
        draws_only = num_tokens == len(draws) and not work.any_score
        owners, verified = draws.items.repeat(draws.counts), draws.verified
        return cls(
            work, draws, owners, work.slots[draws.items], verified, tuple(draws.items[verified].tolist()), num_tokens,
            draws_only, grouped, work.any_siblings,
        )  # fmt: skip

    def at(self, starts: npt.NDArray[np.int64]) -> StagedStep:
        """The step whose items begin at these positions."""
        return StagedStep(self, self.work.at(starts), self.draws.at(self.draws.positions + starts[self.owners]))


@dataclass(frozen=True, slots=True)
class StagedStep:
    """What the host knows of a step whose inputs are on their way."""

    layout: Layout
    work: WorkColumns
    draws: Draws


class HostInputs:
    """A step's numbers and changes on the host, pinned for a GPU."""

    def __init__(self, num_seqs: int, num_draws: int, *, pinned: bool) -> None:
        words = Columns.words(num_seqs, num_draws)
        self.buffer = torch.zeros(words + 3 * MAX_CHANGES, dtype=torch.int32, pin_memory=pinned)
        self.numbers = self.buffer[:words]
        self.columns = Columns.of(self.buffer.numpy(), num_seqs, num_draws)
        self.changes = self.buffer.numpy()[words:]
        self._layout: Layout | None = None

    def fill(self, step: StagedStep) -> None:
        """Puts a step's numbers in place: its positions, and the rest where the last one that was here had another."""
        columns, work, draws = self.columns, step.work, step.draws
        if self._layout is not step.layout:
            self._layout = step.layout
            self._lay_out(step.layout)
        columns.starts[: len(work)] = work.starts
        columns.context_lens[: len(work)] = work.ends
        columns.positions[: len(draws)] = draws.positions

    def _lay_out(self, layout: Layout) -> None:
        columns, work, draws = self.columns, layout.work, layout.draws
        query_start, count = columns.query_start, len(work)
        query_start[0] = 0
        work.counts.cumsum(out=query_start[1 : count + 1])
        query_start[count + 1 :] = layout.num_tokens
        _put(columns.slots, work.slots)
        _put(columns.starts, work.starts)
        _put(columns.context_lens, work.ends)
        _put(columns.num_open, work.open)
        _put(columns.num_drafts, work.drafts)
        _put(columns.num_siblings, work.siblings)
        columns.first_draws[draws.items] = draws.firsts
        _put(columns.logit_rows, draws.rows_behind(query_start[1 : count + 1]))
        _put(columns.drawing_slots, draws.slots, -1)
        _put(columns.positions, draws.positions)
        _put(columns.draw_items, layout.owners)


def put_changes(changes: npt.NDArray[np.int32], places: npt.NDArray[np.int64], values: npt.NDArray[np.int32]) -> None:
    """Places, of 64 bits, come before values."""
    count = len(places)
    changes[: 2 * count].view(np.int64)[:] = places
    changes[2 * count : 3 * count] = values


def _put(column: npt.NDArray[np.int32], values: npt.NDArray[np.int64], padding: int = 0) -> None:
    column[: len(values)] = values
    column[len(values) :] = padding
