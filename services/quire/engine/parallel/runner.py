"""A rank's part of each step: as on one GPU, but that the logits come from all ranks and the tokens from rank 0.

Three parts of a draw follow one another. All ranks compute logits and gather them, rank 0 draws, with masks, penalties
and all else, and its tokens go to all ranks, each of which puts them where the next step reads its input. So no host
waits for another one. The first and the last part are graphs of all ranks, the draw itself is one of rank 0 alone. So
is an EAGLE head's work, and its drafts take the same way.
"""

from __future__ import annotations

from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from quire.engine.gpu.batch import GpuBatch
from quire.engine.gpu.eagle_drafter import PendingDrafts
from quire.engine.gpu.runner import GpuRunner
from quire.engine.gpu.staged_step import StagedStep
from quire.engine.parallel.group import Group
from quire.service.errors import InternalError


class ShardedRunner(GpuRunner):
    """`quire.engine.gpu.runner.GpuRunner` of one rank. All ranks must be told the same, in the same order."""

    @property
    def _group(self) -> Group:
        if self._model.group is None:
            raise InternalError("a model that was loaded whole needs no runner for its parts")
        return self._model.group

    @cached_property
    def _gathered(self) -> Tensor:
        """Logits of all rows that are drawn from, float32 [num_draws, vocab_size]."""
        shape = (len(self._drawn), self._model.config.vocab_size)
        return torch.empty(shape, dtype=torch.float32, device=self._device)

    def _run_draw(self, size: int, num_masks: int, adjusted: bool, reported: bool, write: bool = False) -> None:
        self._graphs.run(("logits", size), partial(self._gather_logits, size))
        if self._group.rank == 0:
            super()._run_draw(size, num_masks, adjusted, reported, write)
        self._graphs.run(("tokens", size), partial(self._share_tokens, size))

    def _gather_logits(self, num_rows: int) -> None:
        self._model.logits(self._hidden[:num_rows], self._gathered[:num_rows])

    def _logits(self, num_rows: int) -> Tensor:
        return self._gathered[:num_rows]

    def _draft(self, staged: StagedStep, *, written: bool) -> PendingDrafts | None:
        found = super()._draft(staged, written=written)
        wanted = staged.work.wanted[staged.draws.items]
        if wanted.any():
            self._share_drafts(int(wanted.max()), int(np.count_nonzero(wanted)))
        return found

    def _share_drafts(self, places: int, count: int) -> None:
        shared = torch.empty((2, places, count), dtype=torch.int64, device=self._device)
        if self._drafter is not None:
            shared[0], shared[1] = self._drafter.made(places, count)
        self._group.share(shared)
        if self._group.rank:
            self._batch.token_ids.view(-1).index_put_((shared[1],), shared[0].to(torch.int32))

    def _share_tokens(self, num_rows: int) -> None:
        drawn = self._drawn[:num_rows]
        self._group.share(drawn)
        if self._group.rank:
            put_tokens(self._batch, drawn)


def put_tokens(batch: GpuBatch, drawn: Tensor) -> None:
    """Writes int64 [N], drawn for the first rows of `batch.columns`, behind their slots' others, as a draw does."""
    slots, positions = batch.columns.drawing_slots[: len(drawn)], batch.columns.positions[: len(drawn)]
    there, tokens = slots >= 0, batch.token_ids.view(-1)
    # Nothing is drawn for a first position: padding puts back what is there.
    places = torch.where(there, slots.to(torch.int64) * batch.token_ids.shape[1] + positions, 0)
    tokens[places] = torch.where(there, drawn.clamp_min(0).to(tokens.dtype), tokens[0])
