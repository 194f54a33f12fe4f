"""Where an EAGLE head drafts: the places of all its passes, found at once, and those of the next one.

A pass makes one draft of each of N sequences. Sequences that want most drafts come first, so those that want one in a
pass are the first of them.
"""
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quire.kernels._triton import jit, next_power_of_2, tl


@dataclass(frozen=True, slots=True)
class DraftingSeqs:
    """N sequences that drafts are wanted of, after a step's draws, and the batch that they are in."""

    firsts: Tensor  # int32 [N], of each its first draw
    verified: Tensor  # int32 [N], how many of its drafts were verified
    counts: Tensor  # int32 [P], how many want a draft in each of P passes
    drawing_slots: Tensor  # int32 [draws], each draw's slot; -1 is padding
    logit_rows: Tensor  # int32 [draws], each draw's row in the step
    positions: Tensor  # int32 [draws], of the tokens that were drawn
    drawn: Tensor  # int64 [draws]
    accepted: Tensor  # int32 [slots], how many of a slot's drafts were right
    block_tables: Tensor  # int32 [slots, any]
    page_size: int
    nowhere: int  # a place in the pool that nobody reads
    length: int  # of a slot's tokens; nobody reads the last one
    num_siblings: int  # that a slot has room for; nobody reads the last one


@dataclass(frozen=True, slots=True)
class DraftPlaces:
    """What `begin_drafts` finds."""

    hidden: Tensor  # [N, H], the model's states that the first pass begins with
    token_ids: Tensor  # int64 [N], the tokens after them
    slots: Tensor  # int32 [N]
    steps: Tensor  # int32 [P, any]: see `step_of`
    targets: Tensor  # int64 [P, N or more], where drafts go among the slots' tokens, flat
    beside: Tensor  # int64 [P, N or more], where siblings go in the slots' tables of them, flat
    next_pass: Tensor  # int64 [1], 0

    def first(self, num_seqs: int) -> DraftPlaces:
        """Those of the first so many sequences."""
        hidden, token_ids, slots = self.hidden[:num_seqs], self.token_ids[:num_seqs], self.slots[:num_seqs]
        return replace(self, hidden=hidden, token_ids=token_ids, slots=slots)


@dataclass(frozen=True, slots=True)
class DraftStep:
    """Views of a pass's row in `DraftPlaces.steps`, as `quire.engine.models.gpu_decoder.GpuStep` has them."""

    query_start: Tensor  # int32 [..., N + 1]
    positions: Tensor  # int32 [..., N]
    slot_mapping: Tensor  # the same
    context_lens: Tensor  # the same


def step_of(steps: Tensor, num_seqs: int) -> DraftStep:
    """Of int32 [..., four times num_seqs + 1 or more]."""
    first, *others = steps.unflatten(-1, (4, -1)).unbind(-2)
    positions, places, lengths = (column[..., :num_seqs] for column in others)
    return DraftStep(first[..., : num_seqs + 1], positions, places, lengths)


def begin_drafts(seqs: DraftingSeqs, fused: Tensor, out: DraftPlaces) -> None:
    """Where each sequence stands behind those of its drafts that were right; fused [T, H]: of the step's rows."""
    if fused.is_cuda:
        begin_drafts_triton(seqs, fused, out)
        return
    size, (num_passes,) = len(seqs.firsts), seqs.counts.shape
    ahead = torch.arange(num_passes, dtype=torch.int32, device=fused.device)
    accepted = seqs.accepted[seqs.drawing_slots[seqs.firsts].clamp_min(0)]
    draw = seqs.firsts + torch.where(seqs.verified > 0, accepted, 0)
    slots = seqs.drawing_slots[draw].clamp_min(0)
    out.hidden.copy_(fused[seqs.logit_rows[draw]])
    out.token_ids.copy_(seqs.drawn[draw].clamp_min(0))
    out.slots.copy_(slots)
    out.next_pass.zero_()
    there = torch.arange(size, dtype=torch.int32, device=fused.device) < seqs.counts[:, None]
    positions = torch.where(there, seqs.positions[draw] + ahead[:, None], 1)
    pages = seqs.block_tables[slots, positions // seqs.page_size]
    places = torch.where(there, pages * seqs.page_size + positions % seqs.page_size, seqs.nowhere)
    columns = torch.where(there, positions + 1, seqs.length - 1).clamp_max_(seqs.length - 1)
    out.targets[:, :size] = slots.to(torch.int64) * seqs.length + columns
    columns = torch.where(there, ahead[:, None], seqs.num_siblings - 1)
    out.beside[:, :size] = slots.to(torch.int64) * seqs.num_siblings + columns
    step, starts = step_of(out.steps, size), torch.arange(size + 1, dtype=torch.int32, device=fused.device)
    torch.minimum(starts, seqs.counts[:, None], out=step.query_start)
    step.positions.copy_(positions)
    step.slot_mapping.copy_(places)
    step.context_lens.copy_(positions + 1)


def begin_pass(places: DraftPlaces, step: Tensor) -> None:
    """Copies the next pass's row of `places.steps` to `step`, int32 [any]: the one after it is then the next."""
    if step.is_cuda:
        begin_pass_triton(places, step)
        return
    step.copy_(places.steps[int(places.next_pass)])
    places.next_pass.add_(1)


@jit
def _begin_kernel(
    firsts_ptr: tl.tensor,
    verified_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    drawing_slots_ptr: tl.tensor,
    logit_rows_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    drawn_ptr: tl.tensor,
    accepted_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    fused_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    steps_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    beside_ptr: tl.tensor,
    next_ptr: tl.tensor,
    tables_stride: tl.tensor,
    steps_stride: tl.tensor,
    targets_stride: tl.tensor,
    num_seqs: tl.tensor,
    num_passes: tl.tensor,
    nowhere: tl.tensor,
    length: tl.tensor,
    NUM_SIBLINGS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PASSES: tl.constexpr,
) -> None:
    """One sequence a program."""
    seq = tl.program_id(0)
    first = tl.load(firsts_ptr + seq)
    verified = tl.load(verified_ptr + seq)
    accepted = tl.load(accepted_ptr + tl.maximum(tl.load(drawing_slots_ptr + first), 0))
    draw = first + tl.where(verified > 0, accepted, 0)
    slot = tl.maximum(tl.load(drawing_slots_ptr + draw), 0)
    row = tl.load(logit_rows_ptr + draw).to(tl.int64)
    start = tl.load(positions_ptr + draw)
    tl.store(token_ids_ptr + seq, tl.maximum(tl.load(drawn_ptr + draw), 0))
    tl.store(slots_ptr + seq, slot)
    if seq == 0:
        tl.store(next_ptr, tl.cast(0, tl.int64))
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    state = tl.load(fused_ptr + row * SIZE + column, mask=inside, other=0.0)
    tl.store(hidden_ptr + seq.to(tl.int64) * SIZE + column, state, mask=inside)

    ahead = tl.arange(0, BLOCK_PASSES)
    exists = ahead < num_passes
    count = tl.load(counts_ptr + ahead, mask=exists, other=0)
    there = seq < count
    position = tl.where(there, start + ahead, 1)
    page = tl.load(tables_ptr + slot.to(tl.int64) * tables_stride + position // PAGE_SIZE, mask=there, other=0)
    place = tl.where(there, page * PAGE_SIZE + position % PAGE_SIZE, nowhere)
    target = tl.minimum(tl.where(there, position + 1, length - 1), length - 1)
    tl.store(targets_ptr + ahead * targets_stride + seq, slot.to(tl.int64) * length + target, mask=exists)
    sibling = tl.where(there, ahead, NUM_SIBLINGS - 1)
    tl.store(beside_ptr + ahead * targets_stride + seq, slot.to(tl.int64) * NUM_SIBLINGS + sibling, mask=exists)
    width = steps_stride // 4
    steps = steps_ptr + ahead * steps_stride + seq
    tl.store(steps, tl.minimum(seq, count), mask=exists)
    tl.store(steps + 1, tl.minimum(seq + 1, count), mask=exists & (seq == num_seqs - 1))
    tl.store(steps + width, position, mask=exists)
    tl.store(steps + 2 * width, place, mask=exists)
    tl.store(steps + 3 * width, position + 1, mask=exists)


@jit
def _pass_kernel(
    steps_ptr: tl.tensor, next_ptr: tl.tensor, step_ptr: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """One program: none may count on before all have read."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    index = tl.load(next_ptr)
    tl.store(step_ptr + column, tl.load(steps_ptr + index * width + column, mask=inside, other=0), mask=inside)
    tl.debug_barrier()
    tl.store(next_ptr, index + 1)


def begin_drafts_triton(seqs: DraftingSeqs, fused: Tensor, out: DraftPlaces) -> None:
    """`begin_drafts` in one launch."""
    num_seqs, num_passes, size = len(seqs.firsts), len(seqs.counts), fused.shape[1]
    if not (out.hidden.is_contiguous() and fused.is_contiguous() and out.steps.is_contiguous()):
        raise ValueError("hidden, fused and steps must be contiguous")
    if out.targets.stride() != out.beside.stride() or out.targets.stride(1) != 1:
        raise ValueError(f"targets and beside must lie alike: strides {out.targets.stride()}, {out.beside.stride()}")
    block = next_power_of_2(size)
    _begin_kernel[(num_seqs,)](
        seqs.firsts,
        seqs.verified,
        seqs.counts,
        seqs.drawing_slots,
        seqs.logit_rows,
        seqs.positions,
        seqs.drawn,
        seqs.accepted,
        seqs.block_tables,
        fused,
        out.hidden,
        out.token_ids,
        out.slots,
        out.steps,
        out.targets,
        out.beside,
        out.next_pass,
        seqs.block_tables.stride(0),
        out.steps.stride(0),
        out.targets.stride(0),
        num_seqs,
        num_passes,
        seqs.nowhere,
        seqs.length,
        NUM_SIBLINGS=seqs.num_siblings,
        PAGE_SIZE=seqs.page_size,
        SIZE=size,
        BLOCK=block,
        BLOCK_PASSES=next_power_of_2(num_passes),
        num_warps=min(16, max(1, block // 512)),
    )


def begin_pass_triton(places: DraftPlaces, step: Tensor) -> None:
    """`begin_pass` in one launch."""
    (width,) = step.shape
    if width != places.steps.shape[1] or not (step.is_contiguous() and places.steps.is_contiguous()):
        raise ValueError(f"step must be contiguous, as long as a row of {list(places.steps.shape)}, and has {width}")
    _pass_kernel[(1,)](
        places.steps, places.next_pass, step, width, BLOCK=next_power_of_2(width), num_warps=4 if width < 4096 else 16
    )
