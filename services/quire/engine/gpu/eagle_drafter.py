"""Runs an EAGLE head after each step's draws: graphs over the batch that stays on the device.

After each step the head writes what its tokens add to its pages. Where drafts are wanted, `_begin` looks where each
sequence stands behind those of the step's own drafts that were right, and then `_pass` makes one draft of each
sequence, again and again: one graph for each size, whatever the number of drafts. They are put behind the sequences'
tokens, where the next step verifies them whether or not the host has read them. Where siblings are wanted, each pass
finds a second choice beside its draft: they are put into the batch's table of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.engine.gpu.batch import MAX_SIBLINGS, GpuBatch
from quire.engine.gpu.eagle import GpuEagle
from quire.engine.gpu.graphs import Graphs, Sizes
from quire.engine.gpu.staged_step import TURNS, StagedStep
from quire.engine.models.gpu_decoder import GpuStep
from quire.engine.models.model import HiddenTaps
from quire.kernels.attention_worklist import AttentionLimits
from quire.kernels.step_inputs import StepInputs, prepare_inputs
from quire.service.pages import PAGE_SIZE

# Of a sequence in a step: what may be verified, and what may be drafted.
_MOST = 64
_PLACES = np.arange(_MOST)


@dataclass(slots=True)
class PendingDrafts:
    """Drafts on their way: of `items`, indexes into the step's work, of which each wants `wanted`."""

    items: npt.NDArray[np.int64]
    wanted: npt.NDArray[np.int64]
    token_ids: Tensor  # int64 [places, choices, items or more] on the host, once the step is done
    began: torch.cuda.Event | None
    ended: torch.cuda.Event | None
    seconds: float = 0.0

    def read(self) -> dict[int, tuple[int, ...]]:
        """By item of the step's work; to be called when the step is done, before `seconds` are looked at."""
        if self.began is not None and self.ended is not None:
            self.seconds = self.began.elapsed_time(self.ended) / 1000
        return self._read(0)

    def read_siblings(self) -> dict[int, tuple[int, ...]]:
        """The second choices beside them, if any were made; likewise."""
        return self._read(1) if self.token_ids.shape[1] > 1 else {}

    def _read(self, choice: int) -> dict[int, tuple[int, ...]]:
        columns = self.token_ids.numpy()[:, choice, : len(self.items)].T.tolist()
        return {
            item: tuple(column[:count])
            for item, count, column in zip(self.items.tolist(), self.wanted.tolist(), columns, strict=True)
        }


class EagleInPages:
    """One head for the slots of a batch, whose pages of the head's are under the model's numbers.

    `drawn` int64 [num_draws] and `inputs` are the runner's: what the step drew, and its rows.
    """

    def __init__(
        self,
        head: GpuEagle,
        num_pages: int,
        batch: GpuBatch,
        inputs: StepInputs,
        drawn: Tensor,
        graphs: Graphs,
        sizes: tuple[Sizes, Sizes] | None,
        num_choices: int = 1,
    ) -> None:
        """`sizes`: of batches and of steps with prompts, to which rows are padded; None: they are not. `num_choices`:
        in each place, 1 or 2."""
        self._head, self._batch, self._drawn, self._graphs = head, batch, drawn, graphs
        self._sizes, self._num_choices = sizes, num_choices
        self._nowhere = num_pages * PAGE_SIZE
        self._cache = head.new_kv_cache(num_pages)
        device, num_rows, num_seqs = head.device, len(inputs.token_ids), batch.num_seqs
        hidden_size = head.config.hidden_size
        self._rows = StepInputs(
            torch.zeros_like(inputs.token_ids),
            torch.zeros_like(inputs.positions),
            torch.zeros_like(inputs.slot_mapping),
        )
        self._fused = torch.zeros(num_rows, hidden_size, dtype=head.dtype, device=device)
        # Each drafting sequence's first draw and number of drafts that were verified, and how many want a draft in each
        # place.
        self._wanted = torch.zeros(2 * num_seqs + _MOST, dtype=torch.int32, device=device)
        self._firsts, self._verified, self._counts = torch.split(self._wanted, [num_seqs, num_seqs, _MOST])
        # Where the next pass is, what it begins with, and what it is to do.
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._hidden = torch.zeros(num_seqs, hidden_size, dtype=head.dtype, device=device)
        self._tokens = torch.zeros(num_seqs, dtype=torch.int64, device=device)
        self._slots = torch.zeros(num_seqs, dtype=torch.int32, device=device)
        self._steps = torch.zeros(_MOST, 4 * (num_seqs + 4), dtype=torch.int32, device=device)
        shape = (_MOST, num_choices, num_seqs)
        self._drafts = torch.zeros(shape, dtype=torch.int64, device=device)
        # Where they go among the batch's tokens, and siblings in its table, both flat.
        self._targets, self._beside = torch.zeros(2, _MOST, num_seqs, dtype=torch.int64, device=device)
        on_gpu = device.type == "cuda"
        self._results = [torch.zeros(shape, dtype=torch.int64, pin_memory=on_gpu) for _ in range(TURNS)]
        self._sent = [torch.zeros_like(self._wanted, device="cpu", pin_memory=on_gpu) for _ in range(TURNS)]
        # To make an event that takes the time costs more than to record one.
        self._marks = [_timing_events() for _ in range(TURNS)] if on_gpu else []
        self._turn = 0
        self._on_gpu = on_gpu

    def new_taps(self, num_tokens: int) -> HiddenTaps:
        """What the model's forward pass is to keep."""
        return self._head.new_taps(num_tokens)

    def take(self, taps: HiddenTaps) -> None:
        """Keeps what the head needs of the step's rows."""
        self._fused[: len(taps.hidden)].copy_(self._head.fuse(taps.hidden))

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """What was kept of rows `sources` of the step is that of rows `targets`, too; int32 [S], no source is another's
        target."""
        self._fused.index_copy_(0, targets.to(torch.int64), self._fused.index_select(0, sources))

    def graphs(self) -> list[tuple[int, Callable[[], None]]]:
        """What captures each graph that steps may want, with its size."""
        if self._sizes is None:
            return []
        batches, tokens = self._sizes
        wanted: list[tuple[int, Callable[[], None]]] = []
        wanted += [(size, partial(self._run_write, size)) for size in sorted({*batches.all, *tokens.all})]
        for run in (self._run_begin, self._run_pass, self._run_end):
            wanted += [(size, partial(run, size)) for size in batches.all]
        return wanted

    def warm_up(self, num_tokens: int) -> None:
        """Runs the largest step, of padding only, after the model's."""
        self.write(num_tokens)

    def follow(self, staged: StagedStep, *, written: bool = False) -> PendingDrafts | None:
        """After a step's draws: writes its tokens' keys and values, unless they are, and makes drafts if any are
        wanted."""
        count = staged.num_tokens
        if written:
            return self._draft(staged)
        if self._sizes is None:
            self.write(count)
        else:
            batches, tokens = self._sizes
            size = (batches(count) if staged.draws_only else None) or tokens(count)
            self.write(count) if size is None else self._run_write(size)
        return self._draft(staged)

    def _draft(self, staged: StagedStep) -> PendingDrafts | None:
        work, draws = staged.work, staged.draws
        if not work.any_wanted:
            return None
        wanted = work.wanted[draws.items]
        # Those who want most come first: so those who want a draft in a place are the first of them.
        order = (-wanted).argsort(kind="stable")[: np.count_nonzero(wanted)]
        wanted = wanted[order]
        places = int(wanted[0])
        self._turn = (self._turn + 1) % TURNS
        self._send(draws.firsts[order], draws.counts[order] - 1, wanted)
        size = self._sizes[0](len(order)) if self._sizes is not None else None
        clock, began = time.perf_counter(), self._mark(0)
        self._run_begin(size or len(order))
        for _ in range(places):
            self._run_pass(size or len(order))
        self._run_end(size or len(order))
        token_ids = self._results[self._turn][:places]
        token_ids.copy_(self._drafts[:places], non_blocking=True)
        return PendingDrafts(draws.items[order], wanted, token_ids, began, self._mark(1), time.perf_counter() - clock)

    def made(self, places: int, count: int) -> tuple[Tensor, Tensor]:
        """The last step's drafts of so many sequences, int64 [places, count], and where they are among the batch's
        tokens; what is no draft lies where nobody reads."""
        return self._drafts[:places, 0, :count], self._targets[:places, :count]

    def _mark(self, which: int) -> torch.cuda.Event | None:
        if not self._on_gpu:
            return None
        event = self._marks[self._turn][which]
        event.record()
        return event

    def _send(
        self, firsts: npt.NDArray[np.int64], verified: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]
    ) -> None:
        num_seqs, buffer = self._batch.num_seqs, self._sent[self._turn]
        columns = buffer.numpy()
        columns[: len(firsts)] = firsts
        columns[num_seqs : num_seqs + len(firsts)] = verified
        # `wanted` falls: its entries above each place.
        columns[2 * num_seqs :] = len(wanted) - wanted[::-1].searchsorted(_PLACES, side="right")
        self._wanted.copy_(buffer, non_blocking=True)

    def _run_write(self, size: int) -> None:
        self._graphs.run(("head's keys and values", size), partial(self.write, size))

    def _run_begin(self, size: int) -> None:
        self._graphs.run(("drafts' beginning", size), partial(self._begin, size))

    def _run_pass(self, size: int) -> None:
        self._graphs.run(("draft", size), partial(self._pass, size))

    def _run_end(self, size: int) -> None:
        self._graphs.run(("drafts' end", size), partial(self._end, size))

    def write(self, num_rows: int) -> None:
        """The keys and values of the step's rows, each a position later: the tokens that came after them."""
        columns, batch = self._batch.columns, self._batch
        num_seqs, rows = min(num_rows, batch.num_seqs), self._rows.rows(num_rows)
        prepare_inputs(
            columns.query_start[: num_seqs + 1],
            columns.slots[:num_seqs],
            columns.starts[:num_seqs] + 1,
            batch.token_ids,
            batch.block_tables,
            PAGE_SIZE,
            rows,
        )
        self._head.write(rows, self._fused[:num_rows], self._cache)

    def _begin(self, size: int) -> None:
        """Where each sequence stands: its next token, the model's state before it, and the places of all passes."""
        columns, batch = self._batch.columns, self._batch
        ahead = torch.arange(_MOST, dtype=torch.int32, device=self._place.device)
        rows = columns.logit_rows
        first = self._firsts[:size]
        accepted = batch.accepted[columns.drawing_slots[first].clamp_min(0)]
        draw = first + torch.where(self._verified[:size] > 0, accepted, 0)
        self._hidden[:size] = self._fused[rows[draw]]
        self._tokens[:size] = self._drawn[draw].clamp_min(0)
        self._slots[:size] = slots = columns.drawing_slots[draw].clamp_min(0)
        self._place.zero_()
        there = torch.arange(size, dtype=torch.int32, device=ahead.device) < self._counts[:, None]
        positions = torch.where(there, columns.positions[draw] + ahead[:, None], 1)
        pages = batch.block_tables[slots, positions // PAGE_SIZE]
        places = torch.where(there, pages * PAGE_SIZE + positions % PAGE_SIZE, self._nowhere)
        # What is no draft goes behind the last token that a slot may have.
        length = batch.token_ids.shape[1]
        columns_of = torch.where(there, positions + 1, length - 1).clamp_max_(length - 1)
        self._targets[:, :size] = slots.to(torch.int64) * length + columns_of
        if self._num_choices > 1:
            # What is no sibling goes where a slot's last one would be: there are never so many.
            columns_of = torch.where(there, ahead[:, None], MAX_SIBLINGS - 1)
            self._beside[:, :size] = slots.to(torch.int64) * MAX_SIBLINGS + columns_of
        starts = torch.arange(size + 1, dtype=torch.int32, device=ahead.device)
        query_start, *others = self._columns(self._steps, size)
        torch.minimum(starts, self._counts[:, None], out=query_start)
        for column, values in zip(others, (positions, places, positions + 1), strict=True):
            column.copy_(values)

    def _end(self, size: int) -> None:
        """Puts the drafts behind their sequences' tokens, and siblings into the table of them."""
        drafts, targets = self.made(_MOST, size)
        self._batch.token_ids.view(-1).index_put_((targets,), drafts.to(torch.int32))
        if self._num_choices > 1:
            targets, siblings = self._beside[:, :size], self._drafts[:, 1, :size]
            self._batch.siblings.view(-1).index_put_((targets,), siblings.to(torch.int32))

    def _columns(self, steps: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of int32 [places, any]: query_start [places, size + 1]; positions, slot_mapping and context_lens
        [places, size]."""
        width = steps.shape[1] // 4
        first, *others = torch.split(steps, [width] * 4, 1)
        positions, places, lengths = (column[:, :size] for column in others)
        return first[:, : size + 1], positions, places, lengths

    def _pass(self, size: int) -> None:
        """A draft of each sequence that wants one in this place."""
        columns = self._columns(self._steps.index_select(0, self._place), size)
        query_start, positions, places, context_lens = (column[0] for column in columns)
        step = GpuStep(
            token_ids=self._tokens[:size],
            positions=positions,
            slot_mapping=places,
            query_start=query_start,
            context_lens=context_lens,
            table_rows=self._slots[:size],
            block_tables=self._batch.block_tables,
            logit_rows=None,
            limits=AttentionLimits(size, size, 1),
        )
        hidden, tokens = self._head.forward(step, self._hidden[:size], self._cache, self._num_choices)
        self._hidden[:size].copy_(hidden)
        self._tokens[:size].copy_(tokens[0])
        self._drafts[:, :, :size].index_copy_(0, self._place, tokens[None])
        self._place.add_(1)


def _timing_events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Of a beginning and an end."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    return began, ended
