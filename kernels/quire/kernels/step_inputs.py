"""A step's inputs, row by row, from what the host says of its sequences and what the batch holds on the device.

The host never names a token that was drawn: a row's token is read where the last step wrote it.
"""
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels._triton import ceil_div, jit, next_power_of_2, tl
from quire.kernels.draft_trees import DraftTrees

_BLOCK_ROWS = 16


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Where `prepare_inputs` puts them. Rows past the step's are padding: token 0 at position 0, written nowhere."""

    token_ids: Tensor  # int32 [T]
    positions: Tensor  # int32 [T], each token's index in its sequence; a leaf's is that of the draft beside it
    slot_mapping: Tensor  # int64 [T], page × page_size + offset; -1 for padding

    def rows(self, count: int) -> StepInputs:
        """The first `count` of them."""
        return StepInputs(self.token_ids[:count], self.positions[:count], self.slot_mapping[:count])


@dataclass(frozen=True, slots=True)
class StepSource:
    """Of S sequences, of which sequence i computes rows query_start[i] to query_start[i + 1] - 1."""

    query_start: Tensor  # int32 [S + 1], nondecreasing: padding sequences have no rows
    slots: Tensor  # int32 [S], rows of the tables
    starts: Tensor  # int32 [S], positions of their first tokens
    token_ids: Tensor  # int32 [slots, any]
    block_tables: Tensor  # int32 [slots, P]
    page_size: int

    def __post_init__(self) -> None:
        if self.token_ids.stride(1) != 1 or self.block_tables.stride(1) != 1:
            raise ValueError(
                f"a slot's tokens and pages must be contiguous, and the strides are {self.token_ids.stride()} and "
                f"{self.block_tables.stride()}"
            )


def prepare_inputs(source: StepSource, out: StepInputs, trees: DraftTrees | None = None, ahead: int = 0) -> None:
    """Fills `out` for the sequences of `source`, whose rows are of the tokens `ahead` positions later.

    With `trees` the last rows of a sequence are its leaves, whose tokens those name.
    """
    if source.query_start.is_cuda:
        prepare_inputs_triton(source, out, trees, ahead)
        return
    query_start, slots, starts = source.query_start, source.slots, source.starts + ahead
    token_ids, block_tables, page_size = source.token_ids, source.block_tables, source.page_size
    row = torch.arange(len(out.token_ids), dtype=torch.int32, device=query_start.device)
    sequence = torch.searchsorted(query_start[1:].contiguous(), row, right=True).clamp_max_(len(slots) - 1)
    there = row < query_start[-1]
    slot = slots[sequence].to(torch.int64)
    position = torch.where(there, starts[sequence] + row - query_start[sequence], 0)
    pages = block_tables[slot, (position // page_size).to(torch.int64)].to(torch.int64)
    tokens, depth = token_ids[slot, position.to(torch.int64)], position
    if trees is not None:
        leaf = row - query_start[1:][sequence] + trees.num_siblings[sequence]
        is_leaf = there & (leaf >= 0)
        tokens = torch.where(is_leaf, trees.siblings[slot, leaf.clamp_min(0).to(torch.int64)], tokens)
        depth = torch.where(is_leaf, position - trees.num_drafts[sequence], position)
    out.token_ids.copy_(torch.where(there, tokens, 0))
    out.positions.copy_(depth)
    out.slot_mapping.copy_(torch.where(there, pages * page_size + position % page_size, -1))


@jit
def find_rows(
    row: tl.tensor,
    query_start_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    tables_stride: tl.tensor,
    num_seqs: tl.tensor,
    ahead: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
) -> tl.tensor:
    """Of each row its sequence, whether it has one, that one's slot, the row's position and its place in the pool.

    A program looks at all sequences, which are few, to find those of its rows.
    """
    seq = tl.arange(0, BLOCK_SEQS)
    ends = tl.load(query_start_ptr + 1 + seq, mask=seq < num_seqs, other=2147483647)
    before = tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), 1)
    index = tl.minimum(before, num_seqs - 1)
    there = row < tl.load(query_start_ptr + num_seqs)
    slot = tl.load(slots_ptr + index).to(tl.int64)
    position = tl.load(starts_ptr + index) + ahead + row - tl.load(query_start_ptr + index)
    position = tl.where(there, position, 0)
    page = tl.load(tables_ptr + slot * tables_stride + position // PAGE_SIZE, mask=there, other=0).to(tl.int64)
    place = tl.where(there, page * PAGE_SIZE + position % PAGE_SIZE, -1)
    return index, there, slot, position, place


@jit
def _prepare_kernel(
    query_start_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,
    num_drafts_ptr: tl.tensor,
    num_siblings_ptr: tl.tensor,
    siblings_ptr: tl.tensor,
    tokens_stride: tl.tensor,
    tables_stride: tl.tensor,
    siblings_stride: tl.tensor,
    num_rows: tl.tensor,
    num_seqs: tl.tensor,
    ahead: tl.tensor,
    TREE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
) -> None:
    """Some rows a program."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < num_rows
    index, there, slot, position, place = find_rows(
        row, query_start_ptr, slots_ptr, starts_ptr, tables_ptr, tables_stride, num_seqs, ahead, PAGE_SIZE, BLOCK_SEQS
    )
    token = tl.load(tokens_ptr + slot * tokens_stride + position, mask=there, other=0)
    if TREE:
        leaf = row - tl.load(query_start_ptr + 1 + index) + tl.load(num_siblings_ptr + index)
        is_leaf = there & (leaf >= 0)
        token = tl.where(is_leaf, tl.load(siblings_ptr + slot * siblings_stride + leaf, mask=is_leaf, other=0), token)
        position -= tl.where(is_leaf, tl.load(num_drafts_ptr + index), 0)
    tl.store(token_ids_ptr + row, token, mask=inside)
    tl.store(positions_ptr + row, position, mask=inside)
    tl.store(slot_mapping_ptr + row, place, mask=inside)


def prepare_inputs_triton(source: StepSource, out: StepInputs, trees: DraftTrees | None = None, ahead: int = 0) -> None:
    """`prepare_inputs` in one launch."""
    num_rows, num_seqs, slots = len(out.token_ids), len(source.slots), source.slots
    _prepare_kernel[(ceil_div(num_rows, _BLOCK_ROWS),)](
        source.query_start,
        slots,
        source.starts,
        source.token_ids,
        source.block_tables,
        out.token_ids,
        out.positions,
        out.slot_mapping,
        slots if trees is None else trees.num_drafts,
        slots if trees is None else trees.num_siblings,
        slots if trees is None else trees.siblings,
        source.token_ids.stride(0),
        source.block_tables.stride(0),
        0 if trees is None else trees.siblings.stride(0),
        num_rows,
        num_seqs,
        ahead,
        TREE=trees is not None,
        PAGE_SIZE=source.page_size,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_SEQS=next_power_of_2(num_seqs),
        num_warps=4,
    )
