"""How many of a step's drafts are right, counted on the device, and where the next step's tokens so begin.

The host plans a step before it knows: of each sequence it says where its tokens begin if all drafts of the step before
are wrong. Called by `quire.engine.gpu.batch` and `quire.engine.gpu.runner`, between a step's draws and the next step's
inputs.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
from torch import Tensor

from quire.kernels._triton import ceil_div, jit, tl

_BLOCK = 256
# Drafts of a sequence in a step, and one more.
_MOST = 128


def count_accepted(
    slots: Tensor,
    first_draws: Tensor,
    num_drafts: Tensor,
    logit_rows: Tensor,
    drawn: Tensor,
    token_ids: Tensor,
    accepted: Tensor,
) -> None:
    """Writes to `accepted[slots[i]]`, int32 [slots], how many of sequence i's drafts are as drawn before the first that
    is not, for each i that has drafts.

    slots, first_draws, num_drafts int32 [S]: where in `drawn` the draws of sequence i begin, one in front of each draft
    and one more, and how many drafts there are, fewer than 128; logit_rows int32 [N], of each draw, and its row in
    token_ids, int32 [T]: the next row is the draft; drawn int64 [N].
    """
    if slots.is_cuda:
        count_accepted_triton(slots, first_draws, num_drafts, logit_rows, drawn, token_ids, accepted)
        return
    sequences = num_drafts.nonzero().squeeze(-1)
    place = torch.arange(_MOST, dtype=torch.int32)
    draws = (first_draws[sequences, None] + place).clamp_max(len(drawn) - 1)
    drafts = token_ids[(logit_rows[first_draws[sequences], None] + 1 + place).clamp_max(len(token_ids) - 1)]
    right = (drawn[draws] == drafts) & (place < num_drafts[sequences, None])
    accepted[slots[sequences]] = right.to(torch.int32).cumprod(1).sum(1).to(torch.int32)


def follow_drafts(
    num_open: Tensor,
    slots: Tensor,
    accepted: Tensor,
    starts: Tensor,
    context_lens: Tensor,
    draw_items: Tensor,
    positions: Tensor,
) -> None:
    """Moves sequence i of a step, in place, by the `accepted[slots[i]]` drafts that the step before kept, where
    num_open[i] is not 0.

    num_open, slots, starts, context_lens int32 [S]; positions int32 [N], of the tokens to be drawn, and draw_items
    int32 [N], each one's sequence in this step.
    """
    if slots.is_cuda:
        follow_drafts_triton(num_open, slots, accepted, starts, context_lens, draw_items, positions)
        return
    kept = torch.where(num_open > 0, accepted[slots], 0)
    starts += kept
    context_lens += kept
    positions += kept[draw_items]


@jit
def _count_kernel(
    slots_ptr: tl.tensor,
    first_draws_ptr: tl.tensor,
    num_drafts_ptr: tl.tensor,
    logit_rows_ptr: tl.tensor,
    drawn_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    accepted_ptr: tl.tensor,
    MOST: tl.constexpr,
) -> None:
    """A sequence a program."""
    sequence = tl.program_id(0)
    num_drafts = tl.load(num_drafts_ptr + sequence)
    if num_drafts == 0:
        return
    place = tl.arange(0, MOST)
    first = tl.load(first_draws_ptr + sequence)
    there = place < num_drafts
    drawn = tl.load(drawn_ptr + first + place, mask=there, other=-1)
    drafts = tl.load(tokens_ptr + tl.load(logit_rows_ptr + first) + 1 + place, mask=there, other=-2)
    right = there & (drawn == drafts)
    count = tl.min(tl.where(right, MOST, place), 0)
    tl.store(accepted_ptr + tl.load(slots_ptr + sequence), count)


def count_accepted_triton(
    slots: Tensor,
    first_draws: Tensor,
    num_drafts: Tensor,
    logit_rows: Tensor,
    drawn: Tensor,
    token_ids: Tensor,
    accepted: Tensor,
) -> None:
    """`count_accepted` in one launch."""
    _count_kernel[(len(slots),)](
        slots, first_draws, num_drafts, logit_rows, drawn, token_ids, accepted, MOST=_MOST, num_warps=1
    )


@jit
def _follow_kernel(
    num_open_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    accepted_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    draw_items_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    num_seqs: tl.tensor,
    num_draws: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Some sequences and some draws a program: neither writes what the other reads."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_seqs
    moves = inside & (tl.load(num_open_ptr + index, mask=inside, other=0) > 0)
    slot = tl.load(slots_ptr + index, mask=moves, other=0)
    kept = tl.load(accepted_ptr + slot, mask=moves, other=0)
    tl.store(starts_ptr + index, tl.load(starts_ptr + index, mask=moves, other=0) + kept, mask=moves)
    tl.store(context_lens_ptr + index, tl.load(context_lens_ptr + index, mask=moves, other=0) + kept, mask=moves)
    inside = index < num_draws
    sequence = tl.load(draw_items_ptr + index, mask=inside, other=0)
    moves = inside & (tl.load(num_open_ptr + sequence, mask=inside, other=0) > 0)
    slot = tl.load(slots_ptr + sequence, mask=moves, other=0)
    kept = tl.load(accepted_ptr + slot, mask=moves, other=0)
    tl.store(positions_ptr + index, tl.load(positions_ptr + index, mask=moves, other=0) + kept, mask=moves)


def follow_drafts_triton(
    num_open: Tensor,
    slots: Tensor,
    accepted: Tensor,
    starts: Tensor,
    context_lens: Tensor,
    draw_items: Tensor,
    positions: Tensor,
) -> None:
    """`follow_drafts` in one launch."""
    num_seqs, num_draws = len(slots), len(positions)
    _follow_kernel[(ceil_div(max(num_seqs, num_draws), _BLOCK),)](
        num_open,
        slots,
        accepted,
        starts,
        context_lens,
        draw_items,
        positions,
        num_seqs,
        num_draws,
        BLOCK=_BLOCK,
        num_warps=4,
    )
