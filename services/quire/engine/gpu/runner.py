"""Runs steps on a GPU: two graphs a step, forward and draw, over a batch that stays on the device.

`launch` sends the plan and starts both; nothing waits until the core reads the tokens. Where tokens are masked, the
draw is launched when the masks are there. Everything happens on one stream, in the order of the launches: what a
step reads of the batch is what the steps before it wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from quire.engine.gpu.batch import GpuBatch, StagedStep
from quire.engine.gpu.drawing import adjust, draw_tokens, report_tokens
from quire.engine.gpu.graphs import Graphs, batch_sizes, token_sizes
from quire.engine.gpu.reports import PromptReport, TokenReport
from quire.engine.logprobs import Found
from quire.engine.models.gpu_decoder import GpuDecoder, GpuStep
from quire.engine.plan import StepPlan, StepResult
from quire.engine.runner import DeviceInfo, StepMasks
from quire.kernels.adjust import new_scratch
from quire.kernels.attention_worklist import AttentionLimits
from quire.kernels.logprobs import new_logprobs
from quire.kernels.step_inputs import StepInputs, prepare_inputs
from quire.kernels.token_mask import apply_token_mask_triton
from quire.service.errors import InternalError
from quire.service.pages import PAGE_SIZE
from quire.service.request import MAX_LOGPROBS, TokenLogprobs

# Larger steps take longer to run than to launch kernel by kernel, and are rarely of a size seen before.
_LARGEST_GRAPH = 2048
# Rows whose histories are counted side by side, each in as many numbers as the vocabulary has tokens.
_ADJUSTED_AT_ONCE = 64


@dataclass(slots=True)
class GpuPendingStep:
    """A step on its way; see quire.engine.runner.PendingStep."""

    staged: StagedStep
    draw_masked: Callable[[GpuPendingStep, StepMasks | None], None]
    drawn: bool = False
    token_ids: Tensor | None = None  # on the host, once `done`
    done: torch.cuda.Event | None = None
    logprobs: TokenReport | None = None
    prompt_logprobs: list[PromptReport] = field(default_factory=list)

    def draw(self, masks: StepMasks | None) -> None:
        if not self.drawn:
            self.draw_masked(self, masks)

    def wait(self) -> StepResult:
        if self.token_ids is None:
            raise InternalError("the step's masks never came")
        if self.done is not None:
            self.done.synchronize()
        token_ids = np.full(len(self.staged.work), -1)
        token_ids[self.staged.drawing] = self.token_ids[: len(self.staged.drawing)].numpy()
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        if self.logprobs is not None:
            logprobs = {item: (found,) for item, found in zip(self.logprobs.items, self.logprobs.read(), strict=True)}
        prompts = {report.item: tuple(report.read()) for report in self.prompt_logprobs}
        return StepResult(tuple(token_ids.tolist()), logprobs, prompts)


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
    ) -> None:
        device, on_gpu = model.device, model.device.type == "cuda"
        name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
        self.info = DeviceInfo(name, str(model.dtype).removeprefix("torch."), torch.get_num_threads())
        self._model = model
        self._device = device
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._copies = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._graphs = Graphs(self._stream, enabled=graphs and on_gpu)
        self._batch = batch = GpuBatch(max_num_seqs, max_model_len, device)
        self._cache = model.new_kv_cache(num_pages)
        self._max_num_seqs = max_num_seqs
        self._batch_sizes = batch_sizes(max_num_seqs)
        self._token_sizes = token_sizes(min(max_num_batched_tokens, _LARGEST_GRAPH))
        self._pads = on_gpu
        self._unprepared = self._all_graphs() if graphs and on_gpu else []
        rows, vocab_size = max_num_batched_tokens, model.config.vocab_size
        self._inputs = StepInputs(
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
        )
        self._hidden = torch.zeros(batch.size, model.config.hidden_size, dtype=model.dtype, device=device)
        self._drawn = torch.zeros(batch.size, dtype=torch.int64, device=device)
        self._results = [torch.zeros(batch.size, dtype=torch.int64, pin_memory=on_gpu) for _ in range(3)]
        self._turn = 0
        self._scratch = new_scratch(min(batch.size, _ADJUSTED_AT_ONCE), vocab_size, device)
        most = min(MAX_LOGPROBS, vocab_size)
        self._reports = new_logprobs(batch.size, most, device)
        self._found = [self._new_found(batch.size, most) for _ in self._results]
        words = -(-vocab_size // 32)
        self._masks = torch.zeros(max_num_seqs, words, dtype=torch.int32, device=device)
        self._mask_rows = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, *, masked: bool) -> GpuPendingStep:
        """Starts a step; see quire.engine.runner.Runner."""
        with self._on_stream():
            staged = self._batch.stage(plan)
            step = GpuPendingStep(staged, self._draw)
            if staged.work.score.any():
                self._forward_and_score(step)
            else:
                self._forward(staged)
            if not masked:
                self._draw(step, None)
        return step

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
        wanted: list[tuple[bool, int, Callable[[], None]]] = []
        for grouped in (False, True):
            wanted += [(grouped, size, partial(self._run_decodes, size, grouped)) for size in self._batch_sizes.all]
            wanted += [(grouped, size, partial(self._run_mixed, size, grouped)) for size in self._token_sizes.all]
        wanted += [(False, size, partial(self._run_draw, size, 0, False, False)) for size in self._batch_sizes.all]
        return [run for _, _, run in sorted(wanted, key=lambda one: one[:2])]

    def _synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def warm_up(self, max_num_batched_tokens: int) -> None:
        """Runs the largest step, of padding only: compiles kernels and takes the memory that it needs."""
        with torch.inference_mode(), self._on_stream():
            self._batch.clear_inputs()
            size = min(max_num_batched_tokens, len(self._inputs.token_ids))
            self._hidden_states(size, min(size, self._max_num_seqs), size, min(size, self._max_num_seqs))
            self._draw_rows(self._max_num_seqs, 0, False, False)
        self._synchronize()

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def _forward(self, staged: StagedStep) -> None:
        """Leaves the hidden states of the rows that are drawn in `_hidden`."""
        count = len(staged.work)
        if staged.decodes_only and self._pads and (size := self._batch_sizes(count)) is not None:
            self._run_decodes(size, staged.grouped)
        elif self._pads and (size := self._token_sizes(staged.num_tokens)) is not None:
            self._run_mixed(size, staged.grouped)
        else:
            # All slots, so that kernels that look at all sequences are compiled once.
            most = int(staged.work.counts.max())
            self._forward_padded(staged.num_tokens, self._max_num_seqs, most, len(staged.drawing), staged.grouped)

    def _run_decodes(self, size: int, grouped: bool) -> None:
        self._graphs.run(("decode", size, grouped), partial(self._forward_padded, size, size, 1, None, grouped))

    def _run_mixed(self, size: int, grouped: bool) -> None:
        seqs = min(size, self._max_num_seqs)
        self._graphs.run(("mixed", size, grouped), partial(self._forward_padded, size, seqs, size, seqs, grouped))

    def _run_draw(self, size: int, num_masks: int, adjusted: bool, reported: bool) -> None:
        kind = (size, num_masks, adjusted, reported)
        self._graphs.run(("draw", *kind), partial(self._draw_rows, *kind))

    def _forward_padded(
        self, num_tokens: int, num_seqs: int, max_query_len: int, num_logits: int | None, grouped: bool
    ) -> None:
        self._keep(self._hidden_states(num_tokens, num_seqs, max_query_len, num_logits, grouped))

    def _keep(self, hidden: Tensor) -> None:
        self._hidden[: len(hidden)].copy_(hidden)

    def _hidden_states(
        self, num_tokens: int, num_seqs: int, max_query_len: int, num_logits: int | None, grouped: bool = False
    ) -> Tensor:
        columns, batch = self._batch.columns, self._batch
        inputs = self._inputs.rows(num_tokens)
        query_start, slots = columns.query_start[: num_seqs + 1], columns.slots[:num_seqs]
        prepare_inputs(
            query_start, slots, columns.starts[:num_seqs], batch.token_ids, batch.block_tables, PAGE_SIZE, inputs
        )
        step = GpuStep(
            token_ids=inputs.token_ids,
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            query_start=query_start,
            context_lens=columns.context_lens[:num_seqs],
            table_rows=slots,
            block_tables=batch.block_tables,
            logit_rows=None if num_logits is None else columns.logit_rows[:num_logits],
            limits=AttentionLimits(num_tokens, num_seqs, max_query_len),
            grouped=grouped,
        )
        return self._model.forward(step, self._cache)

    def _draw(self, step: GpuPendingStep, masks: StepMasks | None) -> None:
        with torch.inference_mode(), self._on_stream():
            staged, count = step.staged, len(step.staged.drawing)
            if count:
                num_masks = self._send_masks(staged, masks) if masks is not None and masks.work else 0
                state, slots = self._batch.sampling, staged.work.slots[staged.drawing]
                adjusted = state.penalizes[slots] | state.biases[slots]
                adjusted |= state.forbids_ends[slots] | state.forbids_words[slots]
                reported = state.num_logprobs[slots] >= 0
                size = self._batch_sizes(count) if self._pads else count
                self._run_draw(size or count, num_masks, bool(adjusted.any()), bool(reported.any()))
            self._send_back(step)
        step.drawn = True

    def _draw_rows(self, num_rows: int, num_masks: int, adjusted: bool, reported: bool) -> None:
        """`adjusted`: some want penalties, bias or bans. `reported`: some want log-probabilities."""
        logits, drawn = self._model.logits(self._hidden[:num_rows]), self._drawn[:num_rows]
        as_given = logits.clone() if reported and (adjusted or num_masks) else logits
        if adjusted:
            adjust(logits, self._batch, self._scratch)
        if num_masks:
            apply_token_mask_triton(logits, self._mask_rows[:num_masks], self._masks[:num_masks])
        draw_tokens(logits, self._batch, drawn)
        if reported:
            report_tokens(as_given, self._batch, drawn, self._reports)

    def _send_back(self, step: GpuPendingStep) -> None:
        count = len(step.staged.drawing)
        self._turn = (self._turn + 1) % len(self._results)
        step.token_ids = self._results[self._turn]
        step.token_ids[:count].copy_(self._drawn[:count], non_blocking=True)
        self._send_reports(step)
        if self._stream is not None:
            step.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            step.done.record(self._stream)

    def _send_reports(self, step: GpuPendingStep) -> None:
        drawing, state = step.staged.drawing, self._batch.sampling
        num_top = state.num_logprobs[step.staged.work.slots[drawing]]
        rows = np.flatnonzero(num_top >= 0)
        if rows.size:
            found, there = self._found[self._turn], self._reports
            columns = (there.chosen, there.ranks, there.top_tokens, there.top_logprobs)
            for values, column in zip(found, columns, strict=True):
                values[: len(drawing)].copy_(column[: len(drawing)], non_blocking=True)
            step.logprobs = TokenReport(drawing[rows].tolist(), num_top[rows].tolist(), rows.tolist(), found)

    def _send_masks(self, staged: StagedStep, masks: StepMasks) -> int:
        """Copies masks beside the forward pass; returns how many."""
        rows = (np.cumsum(staged.work.sample) - 1)[list(masks.work)].astype(np.int32)
        size = self._batch_sizes(len(rows)) or len(rows)
        padded = np.full(size, -1, dtype=np.int32)
        padded[: len(rows)] = rows
        # Blocks until the masks are there, while the forward pass runs.
        bits = torch.from_numpy(masks.batch.rows.view(np.int32))
        if self._copies is None or self._stream is None:
            self._masks[: len(rows)].copy_(bits)
            self._mask_rows[:size].copy_(torch.from_numpy(padded))
            return size
        # No step that still reads the last masks can be running: its tokens were needed to ask for these.
        with torch.cuda.stream(self._copies):
            self._masks[: len(rows)].copy_(self._pinned(bits), non_blocking=True)
            self._mask_rows[:size].copy_(torch.from_numpy(padded).pin_memory(), non_blocking=True)
        self._stream.wait_stream(self._copies)
        return size

    def _pinned(self, values: Tensor) -> Tensor:
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)

    def _new_found(self, num_rows: int, most: int) -> Found:
        """On the host, for what `_reports` has."""
        return Found(
            torch.zeros(num_rows, pin_memory=self._pads),
            torch.zeros(num_rows, dtype=torch.int32, pin_memory=self._pads),
            torch.zeros(num_rows, most, dtype=torch.int32, pin_memory=self._pads),
            torch.zeros(num_rows, most, pin_memory=self._pads),
        )

    def _forward_and_score(self, step: GpuPendingStep) -> None:
        """`_forward`, and what is to be reported of prompts: an item's row r is about the token at start + r + 1."""
        work, state = step.staged.work, self._batch.sampling
        hidden = self._hidden_states(step.staged.num_tokens, len(work), int(work.counts.max()), None)
        firsts = np.cumsum(work.counts) - work.counts
        for item in np.flatnonzero(work.score).tolist():
            slot, start, first = int(work.slots[item]), int(work.starts[item]), int(firsts[item])
            end = min(int(work.ends[item]), int(state.num_prompt_tokens[slot]) - 1)
            targets = self._batch.token_ids[slot, start + 1 : end + 1]
            rows, num_top = hidden[first : first + len(targets)], int(state.num_prompt_logprobs[slot])
            step.prompt_logprobs.append(PromptReport.of(item, rows, targets, num_top, self._model.logits))
        self._keep(hidden.index_select(0, self._batch.columns.logit_rows[: len(step.staged.drawing)]))
