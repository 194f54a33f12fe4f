"""Batches of paged attention for the tests of its kernels, and what attention over them is by the textbook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from triton_testing import DEVICE, poison

from quire.kernels.attention_worklist import AttentionShape, Tile

PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences as (queries, context length), on pages scattered over a pool that is poison elsewhere."""

    seqs: list[tuple[int, int]]
    queries: Tensor
    key_pages: Tensor
    value_pages: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    table_rows: Tensor


def make_batch(seqs: list[tuple[int, int]], shape: AttentionShape, dtype: torch.dtype, seed: int) -> Batch:
    torch.manual_seed(seed)
    num_pages = [-(-length // PAGE_SIZE) for _, length in seqs]
    order = torch.randperm(sum(num_pages) + 3)
    pool = (len(order), shape.num_kv_heads, PAGE_SIZE, shape.head_size)
    keys, values = poison(*pool, dtype=dtype), poison(*pool, dtype=dtype)
    table_rows = torch.randperm(len(seqs) + 2)[: len(seqs)]
    # Entries past a sequence's end are valid pages of others, or of nobody.
    tables = torch.randint(0, len(order), (len(seqs) + 2, max(num_pages) + 2))
    taken = 0
    for row, (_, length), pages in zip(table_rows.tolist(), seqs, num_pages, strict=True):
        own = order[taken : taken + pages]
        taken += pages
        tables[row, :pages] = own
        at = torch.arange(length)
        for pool_part in (keys, values):
            new = torch.randn(length, shape.num_kv_heads, shape.head_size)
            pool_part[own[at // PAGE_SIZE].to(DEVICE), :, (at % PAGE_SIZE).to(DEVICE)] = new.to(dtype).to(DEVICE)
    starts = torch.tensor([0, *(count for count, _ in seqs)]).cumsum(0)
    return Batch(
        seqs=seqs,
        queries=torch.randn(int(starts[-1]), shape.num_heads, shape.head_size).to(dtype).to(DEVICE),
        key_pages=keys,
        value_pages=values,
        query_start=starts.to(torch.int32).to(DEVICE),
        context_lens=torch.tensor([length for _, length in seqs], dtype=torch.int32, device=DEVICE),
        block_tables=tables.to(torch.int32).to(DEVICE),
        table_rows=table_rows.to(DEVICE),
    )


def definition(
    batch: Batch,
    shape: AttentionShape,
    precision: torch.dtype,
    soft_cap: float,
    trees: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Attention as a textbook has it, sequence by sequence. `trees`: the trunk and the leaves of each."""
    outs = []
    for index, (count, length) in enumerate(batch.seqs):
        start = int(batch.query_start[index])
        pages = batch.block_tables[batch.table_rows[index], : -(-length // PAGE_SIZE)]
        keys, values = (
            part[pages].transpose(1, 2).flatten(0, 1)[:length].to(precision).repeat_interleave(shape.group, 1)
            for part in (batch.key_pages, batch.value_pages)
        )
        scores = torch.einsum("qhd,khd->hqk", batch.queries[start : start + count].to(precision), keys)
        scores *= shape.head_size**-0.5
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        position = torch.arange(length - count, length, device=DEVICE)[:, None]
        key = torch.arange(length, device=DEVICE)[None, :]
        trunk, leaves = trees[index] if trees is not None else (0, 0)
        is_leaf = position >= length - leaves
        # Of a leaf: what the trunk's token beside it sees but that, and itself.
        depth = torch.where(is_leaf, position - trunk, position)
        hidden = torch.where(is_leaf, (key >= depth) & (key != position), key > position)
        if shape.window:
            hidden |= key <= depth - shape.window
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(outs)


def by_torch(
    batch: Batch, shape: AttentionShape, soft_cap: float, trees: Sequence[tuple[int, int]] | None = None
) -> Tensor:
    """What torch makes of it in the pool's type: products of that type, softmax rounded to it."""
    if batch.queries.dtype is torch.float32:
        return definition(batch, shape, torch.float32, soft_cap, trees)
    return definition(batch, shape, batch.queries.dtype, soft_cap, trees)


def small_tiles(splits: int, rows: int = 16) -> tuple[Tile, Tile]:
    """Tiles that make short sequences show what long ones do: parts of 16 keys, as many as `splits` items want."""
    return Tile(rows, 16, 1, 2, splits, 16), Tile(16, 16, 1, 2, splits, 16)
