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
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.engine.gpu.batch import LAYOUTS, MAX_SIBLINGS, GpuBatch
from quire.engine.gpu.eagle import GpuEagle
from quire.engine.gpu.graphs import Graphs, Sizes
from quire.engine.gpu.staged_step import TURNS, Layout, StagedStep
from quire.engine.models.gpu_decoder import GpuStep
from quire.engine.models.model import HiddenTaps
from quire.kernels.attention_worklist import AttentionLimits
from quire.kernels.draft_passes import DraftingSeqs, DraftPlaces, begin_drafts, begin_pass, step_of
from quire.kernels.draft_tokens import DraftTokens, end_pass
from quire.kernels.step_inputs import StepInputs, StepSource
from quire.service.pages import PAGE_SIZE

# Of a sequence in a step: what may be verified, and what may be drafted.
_MOST = 64
_PLACES = np.arange(_MOST)


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """The drafts that steps of one layout want, of `items`, indexes into their work, so many of each: those who want
    most come first. `numbers` is what the device is told of them."""

    items: tuple[int, ...]
    counts: tuple[int, ...]
    numbers: npt.NDArray[np.int32]

    @classmethod
    def of(cls, num_seqs: int, layout: Layout) -> Wanted:
        """In a batch of so many sequences."""
        draws = layout.draws
        wanted = layout.work.wanted[draws.items]
        # So those who want a draft in a place are the first of them.
        order = (-wanted).argsort(kind="stable")[: np.count_nonzero(wanted)]
        wanted, count = wanted[order], len(order)
        numbers = np.zeros(2 * num_seqs + _MOST, np.int32)
        numbers[:count] = draws.firsts[order]
        numbers[num_seqs : num_seqs + count] = draws.counts[order] - 1
        # `wanted` falls: its entries above each place.
        numbers[2 * num_seqs :] = count - wanted[::-1].searchsorted(_PLACES, side="right")
        return cls(tuple(draws.items[order].tolist()), tuple(wanted.tolist()), numbers)


@dataclass(slots=True)
class PendingDrafts:
    """Drafts on their way: what was `wanted`."""

    wanted: Wanted
    token_ids: npt.NDArray[np.int64]  # [places, choices, items or more], once the step is done
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
        items, counts = self.wanted.items, self.wanted.counts
        columns = zip(*self.token_ids[: counts[0], choice, : len(items)].tolist(), strict=True)
        if counts[0] == counts[-1]:
            return dict(zip(items, columns, strict=True))
        return {item: column[:count] for item, count, column in zip(items, counts, columns, strict=True)}


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
        self._sizes = sizes
        self._nowhere = num_pages * PAGE_SIZE
        self._cache = head.new_kv_cache(num_pages)
        device, num_rows, num_seqs = head.device, len(inputs.token_ids), batch.num_seqs
        hidden_size = head.config.hidden_size
        self._rows = StepInputs(
            torch.zeros_like(inputs.token_ids),
            torch.zeros_like(inputs.positions),
            torch.zeros_like(inputs.slot_mapping),
        )
        self._taps = head.new_taps(num_rows)
        self._fused = torch.zeros(num_rows, hidden_size, dtype=head.dtype, device=device)
        # Each drafting sequence's first draw and number of drafts that were verified, and how many want a draft in each
        # pass.
        self._wanted = torch.zeros(2 * num_seqs + _MOST, dtype=torch.int32, device=device)
        self._firsts, self._verified, self._counts = torch.split(self._wanted, [num_seqs, num_seqs, _MOST])
        targets, beside = torch.zeros(2, _MOST, num_seqs, dtype=torch.int64, device=device)
        self._places = DraftPlaces(
            hidden=torch.zeros(num_seqs, hidden_size, dtype=head.dtype, device=device),
            token_ids=torch.zeros(num_seqs, dtype=torch.int64, device=device),
            slots=torch.zeros(num_seqs, dtype=torch.int32, device=device),
            steps=torch.zeros(_MOST, 4 * (num_seqs + 4), dtype=torch.int32, device=device),
            targets=targets,
            beside=beside,
            next_pass=torch.zeros(1, dtype=torch.int64, device=device),
        )
        self._step = torch.zeros_like(self._places.steps[0])
        self._skipped = torch.ones(num_seqs, dtype=torch.int32, device=device)
        shape = (_MOST, num_choices, num_seqs)
        self._drafts = DraftTokens(
            torch.zeros(shape, dtype=torch.int64, device=device), batch.token_ids.view(-1), batch.siblings.view(-1)
        )
        on_gpu = device.type == "cuda"
        results = [torch.zeros(shape, dtype=torch.int64, pin_memory=on_gpu) for _ in range(TURNS)]
        # By the number of places; to slice them anew takes longer than to copy them.
        self._made, *self._results = (_prefixes(drafts) for drafts in (self._drafts.drafts, *results))
        self._landed = [result.numpy() for result in results]
        self._wanted_by = lru_cache(LAYOUTS)(partial(Wanted.of, num_seqs))
        self._sent_last: Wanted | None = None
        self._sent = [torch.zeros_like(self._wanted, device="cpu", pin_memory=on_gpu) for _ in range(TURNS)]
        # To make an event that takes the time costs more than to record one.
        self._marks = [_timing_events() for _ in range(TURNS)] if on_gpu else []
        self._turn = 0
        self._on_gpu = on_gpu

    def taps(self, num_tokens: int) -> HiddenTaps:
        """What the model's forward pass is to fill."""
        return HiddenTaps(self._taps.layers, self._taps.hidden[:num_tokens])

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """What was kept of rows `sources` of the step is that of rows `targets`, too; int32 [S], no source is another's
        target."""
        hidden = self._taps.hidden
        hidden.index_copy_(0, targets.to(torch.int64), hidden.index_select(0, sources))

    def graphs(self) -> list[tuple[int, Callable[[], None]]]:
        """What captures each graph that steps may want, with its size."""
        if self._sizes is None:
            return []
        batches, tokens = self._sizes
        wanted: list[tuple[int, Callable[[], None]]] = []
        wanted += [(size, partial(self._run_write, size)) for size in sorted({*batches.all, *tokens.all})]
        for run in (self._run_begin, self._run_pass):
            wanted += [(size, partial(run, size)) for size in batches.all]
        return wanted

    def warm_up(self, num_tokens: int) -> None:
        """Runs the largest step, of padding only, after the model's."""
        self.write(num_tokens)

    def follow(self, staged: StagedStep, *, written: bool = False) -> PendingDrafts | None:
        """After a step's draws: writes its tokens' keys and values, unless they are, and makes drafts if any are
        wanted."""
        layout = staged.layout
        count = layout.num_tokens
        if written:
            return self._draft(staged)
        if self._sizes is None:
            self.write(count)
        else:
            batches, tokens = self._sizes
            size = (batches(count) if layout.draws_only else None) or tokens(count)
            self.write(count) if size is None else self._run_write(size)
        return self._draft(staged)

    def _draft(self, staged: StagedStep) -> PendingDrafts | None:
        if not staged.work.any_wanted:
            return None
        wanted = self._wanted_by(staged.layout)
        places, count = wanted.counts[0], len(wanted.items)
        self._turn = (self._turn + 1) % TURNS
        self._send(wanted)
        size = self._sizes[0](count) if self._sizes is not None else None
        clock, began = time.perf_counter(), self._mark(0)
        self._run_begin(size or count)
        for _ in range(places):
            self._run_pass(size or count)
        self._results[self._turn][places].copy_(self._made[places], non_blocking=True)
        return PendingDrafts(wanted, self._landed[self._turn], began, self._mark(1), time.perf_counter() - clock)

    def made(self, places: int, count: int) -> tuple[Tensor, Tensor]:
        """The last step's drafts of so many sequences, int64 [places, count], and where they are among the batch's
        tokens; what is no draft lies where nobody reads."""
        return self._drafts.drafts[:places, 0, :count], self._places.targets[:places, :count]

    def _mark(self, which: int) -> torch.cuda.Event | None:
        if not self._on_gpu:
            return None
        event = self._marks[self._turn][which]
        event.record()
        return event

    def _send(self, wanted: Wanted) -> None:
        if wanted is self._sent_last:
            return
        buffer, self._sent_last = self._sent[self._turn], wanted
        buffer.numpy()[:] = wanted.numbers
        self._wanted.copy_(buffer, non_blocking=True)

    def _run_write(self, size: int) -> None:
        self._graphs.run(("head's keys and values", size), partial(self.write, size))

    def _run_begin(self, size: int) -> None:
        self._graphs.run(("drafts' beginning", size), partial(self._begin, size))

    def _run_pass(self, size: int) -> None:
        self._graphs.run(("draft", size), partial(self._pass, size))

    def write(self, num_rows: int) -> None:
        """The keys and values of the step's rows, each a position later: the tokens that came after them."""
        columns, batch = self._batch.columns, self._batch
        num_seqs = min(num_rows, batch.num_seqs)
        source = StepSource(
            columns.query_start[: num_seqs + 1],
            columns.slots[:num_seqs],
            columns.starts[:num_seqs],
            batch.token_ids,
            batch.block_tables,
            PAGE_SIZE,
        )
        tapped, fused = self._taps.hidden[:num_rows], self._fused[:num_rows]
        self._head.write(source, self._rows.rows(num_rows), tapped, fused, self._cache)

    def _begin(self, size: int) -> None:
        """Where each sequence stands: its next token, the model's state before it, and the places of all passes."""
        columns, batch = self._batch.columns, self._batch
        seqs = DraftingSeqs(
            firsts=self._firsts[:size],
            verified=self._verified[:size],
            counts=self._counts,
            drawing_slots=columns.drawing_slots,
            logit_rows=columns.logit_rows,
            positions=columns.positions,
            drawn=self._drawn,
            accepted=batch.accepted,
            block_tables=batch.block_tables,
            page_size=PAGE_SIZE,
            nowhere=self._nowhere,
            length=batch.token_ids.shape[1],
            num_siblings=MAX_SIBLINGS,
        )
        begin_drafts(seqs, self._fused, self._places.first(size))

    def _pass(self, size: int) -> None:
        """A draft of each sequence that wants one in this pass."""
        places = self._places.first(size)
        begin_pass(places, self._step)
        step = step_of(self._step, size)
        given = GpuStep(
            token_ids=places.token_ids,
            positions=step.positions,
            slot_mapping=step.slot_mapping,
            query_start=step.query_start,
            context_lens=step.context_lens,
            table_rows=places.slots,
            block_tables=self._batch.block_tables,
            logit_rows=None,
            limits=AttentionLimits(size, size, 1),
        )
        logits = self._head.forward(given, places.hidden, self._cache, self._skipped[:size])
        end_pass(logits, self._head.target_ids, places, self._drafts)


def _prefixes(values: Tensor) -> list[Tensor]:
    return [values[:count] for count in range(len(values) + 1)]


def _timing_events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Of a beginning and an end."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    return began, ended
