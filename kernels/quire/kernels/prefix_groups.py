"""Finds on the GPU which sequences of a step begin with the same pages, so that attention reads those pages once.

Sequences whose block tables have the same page at one depth (and equal pages before it) are a group, led by the first
of them; what the group shares is what all its members share with their leader, up to the pages before any of the step's
queries. Attention then runs over each group's shared keys with the queries of all members side by side, and over each
sequence's own keys after that (the idea of Hydragen, Juravsky et al., arXiv 2402.05099, and of cascade inference, Ye et
al., 2024). Lists are made anew in each step from the tables that are there, so a captured graph serves any grouping.
"""
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels._triton import jit, next_power_of_2, tl


@dataclass(frozen=True, slots=True)
class PrefixGroups:
    """Group i is led by sequence i; most are empty."""

    row_start: Tensor  # int32 [S + 1], of group i's entries in `rows`
    lengths: Tensor  # int32 [S], keys that group i shares; whole pages
    table_rows: Tensor  # int32 [S], whose block table leads to them
    rows: Tensor  # int32 [T], query rows, group by group
    prefix_lens: Tensor  # int32 [S], keys of each sequence that its group has; 0: it is in none


def group_prefixes(
    query_start: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    table_rows: Tensor | None,
    page_size: int,
    max_tokens: int,
    min_pages: int = 16,
    min_members: int = 4,
) -> PrefixGroups:
    """The groups of a step's sequences: of at least `min_members` that share at least `min_pages`.

    query_start int32 [S + 1], context_lens int32 [S], block_tables int32 [tables, P], table_rows int [S] as in
    `plan_attention_triton`; max_tokens: T.
    """
    if min_pages < 1 or min_members < 2:
        raise ValueError(f"a group shares a page or more among two or more, not {min_pages} among {min_members}")
    num_seqs, device = context_lens.shape[0], context_lens.device
    leaders, common, lengths, tables, prefix_lens = (
        torch.empty(num_seqs, dtype=torch.int32, device=device) for _ in range(5)
    )
    row_start = torch.empty(num_seqs + 1, dtype=torch.int32, device=device)
    rows = torch.empty(max_tokens, dtype=torch.int32, device=device)
    block_seqs = next_power_of_2(num_seqs)
    _match_kernel[(num_seqs,)](
        query_start,
        context_lens,
        block_tables,
        query_start if table_rows is None else table_rows,
        leaders,
        common,
        tables,
        block_tables.stride(0),
        num_seqs,
        HAS_ROWS=table_rows is not None,
        MIN_PAGES=min_pages,
        PAGE_SIZE=page_size,
        BLOCK_SEQS=block_seqs,
        BLOCK_PAGES=256,
        num_warps=4,
    )
    _measure_kernel[(num_seqs,)](
        leaders, common, prefix_lens, num_seqs, min_members, PAGE_SIZE=page_size, BLOCK_SEQS=block_seqs, num_warps=4
    )
    _gather_kernel[(num_seqs + 1,)](
        query_start, leaders, prefix_lens, row_start, lengths, rows, num_seqs, BLOCK_SEQS=block_seqs, BLOCK_ROWS=128,
        num_warps=4,
    )  # fmt: skip
    return PrefixGroups(row_start, lengths, tables, rows, prefix_lens)


@jit
def _match_kernel(
    query_start_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    table_rows_ptr: tl.tensor,
    leaders_ptr: tl.tensor,
    common_ptr: tl.tensor,
    group_tables_ptr: tl.tensor,
    table_stride: tl.tensor,
    num_seqs: tl.tensor,
    HAS_ROWS: tl.constexpr,
    MIN_PAGES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
) -> None:
    """One sequence a program: its leader, -1 if it is alone, and how many pages they have in common."""
    seq = tl.program_id(0)
    other = tl.arange(0, BLOCK_SEQS)
    starts = tl.load(query_start_ptr + other, mask=other < num_seqs, other=0)
    queries = tl.load(query_start_ptr + other + 1, mask=other < num_seqs, other=0) - starts
    lengths = tl.load(context_lens_ptr + other, mask=other < num_seqs, other=0)
    # Whole pages in front of a sequence's queries, all of which see them.
    pages = tl.where(queries > 0, (lengths - queries) // PAGE_SIZE, 0)
    able = pages >= MIN_PAGES
    table_rows = other
    if HAS_ROWS:
        table_rows = tl.load(table_rows_ptr + other, mask=able, other=0).to(tl.int32)
    place = table_rows.to(tl.int64) * table_stride
    own_pages = tl.sum(tl.where(other == seq, pages, 0), 0)
    own_row = tl.sum(tl.where((other == seq) & able, table_rows, 0), 0)
    tl.store(group_tables_ptr + seq, own_row)
    leader = -1
    shared = 0
    if own_pages >= MIN_PAGES:
        keys = tl.load(tables_ptr + place + (MIN_PAGES - 1), mask=able, other=-1)
        own_ptr = tables_ptr + own_row.to(tl.int64) * table_stride
        key = tl.load(own_ptr + (MIN_PAGES - 1))
        leader = tl.min(tl.where(able & (keys == key), other, BLOCK_SEQS - 1), 0)
        leader_row = tl.sum(tl.where(other == leader, table_rows, 0), 0)
        leader_ptr = tables_ptr + leader_row.to(tl.int64) * table_stride
        shared = tl.minimum(own_pages, tl.sum(tl.where(other == leader, pages, 0), 0))
        for first in range(0, shared, BLOCK_PAGES):
            page = first + tl.arange(0, BLOCK_PAGES)
            ours = tl.load(own_ptr + page, mask=page < shared, other=0)
            theirs = tl.load(leader_ptr + page, mask=page < shared, other=0)
            shared = tl.minimum(shared, tl.min(tl.where(ours == theirs, shared, page), 0))
        leader = tl.where(shared >= MIN_PAGES, leader, -1)
    tl.store(leaders_ptr + seq, leader)
    tl.store(common_ptr + seq, shared)


@jit
def _measure_kernel(
    leaders_ptr: tl.tensor,
    common_ptr: tl.tensor,
    prefix_lens_ptr: tl.tensor,
    num_seqs: tl.tensor,
    min_members: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
) -> None:
    """One sequence a program: how many keys all of its group have in common."""
    seq = tl.program_id(0)
    other = tl.arange(0, BLOCK_SEQS)
    leaders = tl.load(leaders_ptr + other, mask=other < num_seqs, other=-2)
    common = tl.load(common_ptr + other, mask=other < num_seqs, other=0)
    leader = tl.load(leaders_ptr + seq)
    mine = leaders == leader
    members = tl.sum(mine.to(tl.int32), 0)
    shared = tl.min(tl.where(mine, common, 1 << 24), 0) * PAGE_SIZE
    tl.store(prefix_lens_ptr + seq, tl.where((leader >= 0) & (members >= min_members), shared, 0))


@jit
def _gather_kernel(
    query_start_ptr: tl.tensor,
    leaders_ptr: tl.tensor,
    prefix_lens_ptr: tl.tensor,
    row_start_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    num_seqs: tl.tensor,
    BLOCK_SEQS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    """One sequence a program, as a group's leader and as a member; the last writes where the lists end."""
    seq = tl.program_id(0)
    other = tl.arange(0, BLOCK_SEQS)
    inside = other < num_seqs
    grouped = tl.load(prefix_lens_ptr + other, mask=inside, other=0) > 0
    leaders = tl.load(leaders_ptr + other, mask=inside, other=0)
    starts = tl.load(query_start_ptr + other, mask=inside, other=0)
    queries = tl.load(query_start_ptr + other + 1, mask=inside, other=0) - starts
    queries = tl.where(grouped, queries, 0)
    tl.store(row_start_ptr + seq, tl.sum(tl.where(leaders < seq, queries, 0), 0))
    if seq < num_seqs:
        shared = tl.load(prefix_lens_ptr + seq)
        leader = tl.load(leaders_ptr + seq)
        tl.store(lengths_ptr + seq, tl.where(leader == seq, shared, 0))
        if shared > 0:
            before = (leaders < leader) | ((leaders == leader) & (other < seq))
            place = tl.sum(tl.where(before, queries, 0), 0)
            start = tl.load(query_start_ptr + seq)
            count = tl.load(query_start_ptr + seq + 1) - start
            for first in range(0, count, BLOCK_ROWS):
                row = first + tl.arange(0, BLOCK_ROWS)
                tl.store(rows_ptr + place + row, start + row, mask=row < count)
