"""Runs steps on a GPU: two graphs a step, forward and draw, over a batch that stays on the device; with an EAGLE head
those of `quire.engine.gpu.eagle_drafter` follow.

`launch` sends the plan and starts both; nothing waits until the core reads the tokens. Where tokens are masked, the
draw is launched when the masks are there. Everything happens on one stream, in the order of the launches: what a
step reads of the batch is what the steps before it wrote.

Drafts are rows of a step like others, with a draw in front of each. A draw overwrites the draft that it stands in front
of; how many of a sequence's are right stays on the device, where the next step begins behind them, and goes to the host
with the tokens. What is drawn behind a wrong one lies behind the sequence's last token, where nobody reads before a
later step writes. A sibling that turns out to be right is moved to where the wrong draft beside it was, so that all who
come later see drafts that are right.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from quire.engine.config import MAX_VERIFIED_ROWS
from quire.engine.gpu.batch import LAYOUTS, GpuBatch
from quire.engine.gpu.drawing import adjust, draw_tokens, report_tokens
from quire.engine.gpu.eagle import GpuEagle
from quire.engine.gpu.eagle_drafter import EagleInPages, PendingDrafts
from quire.engine.gpu.graphs import Graphs, batch_sizes
from quire.engine.gpu.mask_rows import MaskRows
from quire.engine.gpu.pending import GpuPendingStep, Results
from quire.engine.gpu.reports import PromptReport
from quire.engine.gpu.staged_step import Layout, StagedStep
from quire.engine.gpu.step_shapes import StepShape, StepShapes
from quire.engine.models.gpu_decoder import GpuDecoder, GpuStep
from quire.engine.plan import StepPlan
from quire.engine.runner import DeviceInfo, StepMasks
from quire.engine.sampling_state import SamplingState
from quire.kernels.adjust import new_scratch
from quire.kernels.draft_trees import PagedLayers, move_tokens
from quire.kernels.logprobs import new_logprobs
from quire.kernels.step_inputs import StepInputs, StepSource, prepare_inputs
from quire.service.errors import InternalError
from quire.service.pages import PAGE_SIZE
from quire.service.request import MAX_LOGPROBS

# Rows whose histories are counted side by side, each in as many numbers as the vocabulary has tokens.
_ADJUSTED_AT_ONCE = 64
# What their heads that share a KV head may take of a program's memory, beside blocks of keys and values, each of which
# may be so long.
_VERIFIED_BYTES, _KEY_BYTES = 16 << 10, 256


class GpuRunner:
    """`quire.engine.runner.Runner` for a model on a GPU; on a CPU it runs without graphs, for tests.

    Use with a core that runs ahead by one step at most: pinned memory of a step's tokens is used again two steps later.
    """

    def __init__(
        self,
        model: GpuDecoder,
        num_pages: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        *,
        graphs: bool = True,
        max_draft_tokens: int = 0,
        num_speculative_tokens: int = 8,
        num_siblings: int = 0,
        head: GpuEagle | None = None,
    ) -> None:
        """`max_draft_tokens`: of a step, of all sequences together, siblings included. Up to `num_speculative_tokens`
        of a sequence are verified fastest, with up to `num_siblings`; without these the head makes none. With a `head`
        the scheduler's configuration must say `drafter_in_pages`."""
        device, on_gpu = model.device, model.device.type == "cuda"
        name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
        self.info = DeviceInfo(name, str(model.dtype).removeprefix("torch."), torch.get_num_threads())
        self._model = model
        self._device = device
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        agree = None if model.group is None else model.group.agree
        self._graphs = Graphs(self._stream, enabled=graphs and on_gpu, agree=agree)
        self._batch = batch = GpuBatch(max_num_seqs, max_model_len, device, max_draft_tokens)
        self._cache = model.new_kv_cache(num_pages)
        self._max_num_seqs = max_num_seqs
        self._max_num_draws = max_num_seqs + max_draft_tokens
        self._draw_sizes = batch_sizes(self._max_num_draws)
        plain = _verified_at_once(model, num_speculative_tokens)
        verified = plain, _verified_at_once(model, num_speculative_tokens + num_siblings)
        self._shapes = StepShapes(
            max_num_seqs, self._max_num_draws, max_num_batched_tokens, verified, siblings=num_siblings > 0
        )
        # Of layouts that come again and again.
        self._captured = lru_cache(LAYOUTS)(self._shapes.captured)
        self._asked = lru_cache(LAYOUTS)(partial(_asked, batch.sampling))
        self._layers = PagedLayers.of(self._cache.keys, self._cache.values) if num_siblings else None
        self._pads = on_gpu
        rows, vocab_size = max_num_batched_tokens, model.config.vocab_size
        self._inputs = StepInputs(
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
        )
        num_draws = batch.num_draws
        self._hidden = torch.zeros(num_draws, model.config.hidden_size, dtype=model.dtype, device=device)
        self._drawn = torch.zeros(num_draws, dtype=torch.int64, device=device)
        self._scratch = new_scratch(min(num_draws, _ADJUSTED_AT_ONCE), vocab_size, device)
        most = min(MAX_LOGPROBS, vocab_size)
        self._reports = new_logprobs(num_draws, most, device)
        self._results = Results(batch, most)
        self._masks = MaskRows(num_draws, vocab_size, device, self._stream, self._draw_sizes)
        self._drafter: EagleInPages | None = None
        if head is not None:
            sizes = (self._shapes.batch_sizes, self._shapes.token_sizes) if on_gpu else None
            drafts = self._graphs.alone
            choices = 2 if num_siblings else 1
            self._drafter = EagleInPages(head, num_pages, batch, self._inputs, self._drawn, drafts, sizes, choices)
        self._unprepared = self._all_graphs() if graphs and on_gpu else []

    @torch.inference_mode()
    def launch(self, plan: StepPlan, *, masked: bool) -> GpuPendingStep:
        """Starts a step; see quire.engine.runner.Runner."""
        with self._on_stream():
            staged, num_graphs = self._batch.stage(plan), self._num_graphs
            step = GpuPendingStep(staged, self._draw_masked)
            if staged.work.any_open:
                self._run_follow_drafts()
            if staged.work.any_score:
                self._forward_and_score(step)
            else:
                self._forward(staged)
            step.num_captured = self._num_graphs - num_graphs
            if not masked:
                self._draw(step, None)
        return step

    @torch.inference_mode()
    def _draw_masked(self, step: GpuPendingStep, masks: StepMasks | None) -> None:
        with self._on_stream():
            self._draw(step, masks)

    def prepare(self) -> bool:
        """Captures the next graph that steps may want, the smallest first; returns whether there may be another.

        To be called between steps only. Requests go on without: what is missing is captured when it is wanted.
        """
        if not self._unprepared:
            return False
        run = self._unprepared.pop(0)
        with torch.inference_mode(), self._on_stream():
            self._batch.clear_inputs()
            run()
        self._synchronize()
        return bool(self._unprepared)

    def _all_graphs(self) -> list[Callable[[], None]]:
        """What captures each graph that requests without masks may want: rare ones last, small ones first."""
        shapes, largest_draw = self._shapes.all(), self._draw_sizes.all[-1]
        wanted: list[tuple[int, int, Callable[[], None]]] = []
        wanted += [(rank, size, partial(self._run_forward, shape)) for rank, size, shape in shapes]
        wanted += [(0, size, partial(self._run_draw, size, 0, False, False)) for size in self._draw_sizes.all]
        if self._writes_with_draws:
            sizes = {self._draw_sizes(size) or size for size in self._shapes.batch_sizes.all}
            wanted += [(0, size, partial(self._run_draw, size, 0, False, False, write=True)) for size in sizes]
        if self._max_num_draws > self._max_num_seqs:
            wanted += [(0, 1, self._run_follow_drafts), (0, 1, self._run_count_accepted)]
        if self._layers is not None:
            wanted.append((0, 1, self._run_siblings))
        if self._drafter is not None and self._model.group is None:
            wanted += [(0, size, run) for size, run in self._drafter.graphs()]
        # The largest before all: the others fit into the memory that they leave, which would else grow with each.
        largest: list[Callable[[], None]] = [
            partial(self._run_draw, largest_draw, 0, False, False),
            partial(self._run_forward, max(shapes, key=lambda one: (one[1], one[0]))[2]),
        ]
        return largest + [run for _, _, run in sorted(wanted, key=lambda one: one[:2])]

    def close(self) -> None:
        """Lets go of its graphs, and of others' memory."""
        self._graphs.clear()
        self._masks.close()

    @property
    def _num_graphs(self) -> int:
        return len(self._graphs) + len(self._graphs.alone)

    def _synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def warm_up(self, max_num_batched_tokens: int) -> None:
        """Runs the largest step, of padding only: compiles kernels and takes the memory that it needs."""
        with torch.inference_mode(), self._on_stream():
            self._batch.clear_inputs()
            size = min(max_num_batched_tokens, len(self._inputs.token_ids))
            self._hidden_states(self._shapes.largest(size))
            self._run_draw(self._max_num_draws, 0, False, False)
            if self._max_num_draws > self._max_num_seqs:
                if self._layers is not None:
                    self._keep_siblings()
                else:
                    self._count_accepted()
                self._batch.follow_drafts()
            if self._drafter is not None:
                self._drafter.warm_up(size)
        self._synchronize()

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def _forward(self, staged: StagedStep) -> None:
        """Leaves the hidden states of the rows that are drawn in `_hidden`."""
        shape = self._captured(staged.layout) if self._pads else None
        if shape is not None:
            self._run_forward(shape)
        else:
            self._keep(self._hidden_states(self._shapes.exact(staged.layout)))

    def _run_forward(self, shape: StepShape) -> None:
        self._graphs.run(shape, lambda: self._keep(self._hidden_states(shape)))

    def _run_draw(self, size: int, num_masks: int, adjusted: bool, reported: bool, write: bool = False) -> None:
        """`write`: and then the head's keys and values of as many rows."""
        kind = (size, num_masks, adjusted, reported, write)
        self._graphs.alone.run(("draw", *kind), partial(self._draw_rows, *kind))

    def _keep(self, hidden: Tensor) -> None:
        # A step may be padded to more rows than can be drawn from.
        hidden = hidden[: len(self._hidden)]
        self._hidden[: len(hidden)].copy_(hidden)

    def _hidden_states(self, shape: StepShape) -> Tensor:
        columns, batch, limits = self._batch.columns, self._batch, shape.limits
        inputs, num_seqs = self._inputs.rows(limits.max_tokens), limits.max_seqs
        query_start, slots = columns.query_start[: num_seqs + 1], columns.slots[:num_seqs]
        drafts = batch.trees(num_seqs) if shape.trees else None
        starts, token_ids, block_tables = columns.starts[:num_seqs], batch.token_ids, batch.block_tables
        prepare_inputs(StepSource(query_start, slots, starts, token_ids, block_tables, PAGE_SIZE), inputs, drafts)
        step = GpuStep(
            token_ids=inputs.token_ids,
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            query_start=query_start,
            context_lens=columns.context_lens[:num_seqs],
            table_rows=slots,
            block_tables=block_tables,
            logit_rows=None if shape.num_logits is None else columns.logit_rows[: shape.num_logits],
            limits=limits,
            grouped=shape.grouped,
            trees=drafts,
        )
        taps = None if self._drafter is None else self._drafter.taps(limits.max_tokens)
        return self._model.forward(step, self._cache, taps)

    def _draw(self, step: GpuPendingStep, masks: StepMasks | None) -> None:
        staged, count, num_graphs = step.staged, len(step.staged.draws), self._num_graphs
        written = False
        if count:
            num_masks = self._masks.send(staged, masks) if masks is not None and masks.work else 0
            adjusted, step.reported = self._asked(staged.layout)
            size = self._draw_sizes(count) if self._pads else count
            # One graph less, of a step that has no drafts to verify in between.
            written = self._writes_with_draws and staged.layout.draws_only and not staged.work.any_drafts
            self._run_draw(size or count, num_masks, adjusted, step.reported, written)
        if staged.work.any_drafts:
            self._verify(staged)
        step.drafts = self._draft(staged, written=written)
        self._results.send(step, self._drawn, self._reports, self._stream)
        step.num_captured += self._num_graphs - num_graphs
        step.drawn = True

    @property
    def _writes_with_draws(self) -> bool:
        """Whether a graph may do both: not if others share in the draw."""
        return self._drafter is not None and self._model.group is None

    def _draft(self, staged: StagedStep, *, written: bool) -> PendingDrafts | None:
        return None if self._drafter is None else self._drafter.follow(staged, written=written)

    def _run_follow_drafts(self) -> None:
        self._graphs.alone.run(("drafts before",), self._batch.follow_drafts)

    def _verify(self, staged: StagedStep) -> None:
        if staged.layout.trees:
            self._run_siblings()
        else:
            self._run_count_accepted()

    def _run_count_accepted(self) -> None:
        self._graphs.alone.run(("accepted",), self._count_accepted)

    def _count_accepted(self) -> None:
        self._batch.count_accepted(self._drawn, self._inputs.token_ids)

    def _run_siblings(self) -> None:
        self._graphs.alone.run(("siblings",), self._keep_siblings)

    def _keep_siblings(self) -> None:
        self._count_accepted()
        batch = self._batch
        if self._layers is None:
            raise InternalError("a step has siblings, and this runner was made for none")
        batch.keep_siblings(self._drawn, self._inputs.token_ids)
        move_tokens(batch.moves, self._inputs.slot_mapping, self._layers)
        if self._drafter is not None:
            self._drafter.move(batch.moves.sources, batch.moves.targets)

    def _draw_rows(self, num_rows: int, num_masks: int, adjusted: bool, reported: bool, write: bool) -> None:
        """`adjusted`: some want penalties, bias or bans. `reported`: some want log-probabilities."""
        logits, drawn = self._logits(num_rows), self._drawn[:num_rows]
        as_given = logits.clone() if reported and (adjusted or num_masks) else logits
        if adjusted:
            adjust(logits, self._batch, self._scratch)
        if num_masks:
            self._masks.apply(logits, num_masks)
        draw_tokens(logits, self._batch, drawn)
        if reported:
            report_tokens(as_given, self._batch, drawn, self._reports)
        if write and self._drafter is not None:
            self._drafter.write(num_rows)

    def _logits(self, num_rows: int) -> Tensor:
        """Of the first rows of `_hidden`; they will be changed."""
        return self._model.logits(self._hidden[:num_rows])

    def _forward_and_score(self, step: GpuPendingStep) -> None:
        """`_forward`, and what is to be reported of prompts: an item's row r is about the token at start + r + 1."""
        work, state = step.staged.work, self._batch.sampling
        hidden = self._hidden_states(replace(self._shapes.exact(step.staged.layout), num_logits=None))
        firsts = np.cumsum(work.counts) - work.counts
        for item in np.flatnonzero(work.score).tolist():
            slot, start, first = int(work.slots[item]), int(work.starts[item]), int(firsts[item])
            end = min(int(work.ends[item]), int(state.num_prompt_tokens[slot]) - 1)
            targets = self._batch.token_ids[slot, start + 1 : end + 1]
            rows, num_top = hidden[first : first + len(targets)], int(state.num_prompt_logprobs[slot])
            step.prompt_logprobs.append(PromptReport.of(item, rows, targets, num_top, self._model.logits))
        self._keep(hidden.index_select(0, self._batch.columns.logit_rows[: len(step.staged.draws)]))


def _asked(state: SamplingState, layout: Layout) -> tuple[bool, bool]:
    """Whether some of a step's draws want penalties, bias or bans, and some log-probabilities."""
    slots = layout.draws.slots
    adjusted = state.penalizes[slots] | state.biases[slots] | state.forbids_ends[slots] | state.forbids_words[slots]
    return bool(adjusted.any()), bool((state.num_logprobs[slots] >= 0).any())


def _verified_at_once(model: GpuDecoder, num_drafts: int) -> int:
    """Of how many rows of a sequence attention reads the keys and values at once, as a decode does for one."""
    config, key_bytes = model.config, model.config.head_size * model.dtype.itemsize
    row_bytes, most = config.num_heads // config.num_kv_heads * key_bytes, MAX_VERIFIED_ROWS
    if key_bytes > _KEY_BYTES:
        return 1
    while most > 1 and (most * row_bytes > _VERIFIED_BYTES or most >= 2 * (1 + num_drafts)):
        most //= 2
    return most
