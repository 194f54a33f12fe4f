"""Causal attention of a step's queries over paged keys and values: prefill chunks and decodes in any mix.

Algorithm: softmax(q kᵀ / √D) v with grouped queries (Ainslie et al., "GQA", 2023) over block tables (Kwon et al.,
"Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023). On a CPU a gather and
two batched products serve all decodes of about the same length, and each prefill chunk runs through torch's fused
attention. Everything that does not depend on the layer (which pages, masks) is made once a step: `AttentionPlan`.

Pages past a sequence's end and slots not yet written have the weight 0; `write_pages` sees to it that they are finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# Decodes share a batch if the padding that this costs is less than this many pages in all: about what the calls of one
# more batch cost.
_MAX_PADDING_PAGES = 64

# Up to so many keys in all, over sequences and heads, decodes are computed in float32: a product in bfloat16 costs
# 10 µs more before it begins, and a copy of so few keys less than that.
_FEW_KEYS = 1536

# Up to so many pages of one head, keys and values are gathered in one go.
_FEW_ROWS = 256


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """S sequences with one query each, padded to P pages."""

    rows: Tensor | None  # int64 [S], their rows among the step's tokens; None if they are all of them, in order
    pages: Tensor  # int64 [2, S × kv_heads × P], indexes into the pool seen as [pages × 2 kv_heads, page_size × D]
    num_keys: int  # of each sequence, padding included
    dtype: torch.dtype  # to compute in
    mask: Tensor | None  # [S × kv_heads, 1, num_keys] of `dtype`: 0 where there is a token, else -inf; None: all are


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One sequence with several queries: rows `start` to `stop` of the step's tokens."""

    start: int
    stop: int
    pages: Tensor  # int64 [2, kv_heads × P], as in DecodeBatch
    context_len: int
    mask: Tensor | None  # [queries, context_len] of the pool's type; None if a query sees all up to itself


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's work, the same for every layer."""

    decodes: tuple[DecodeBatch, ...]
    prefills: tuple[PrefillChunk, ...]


def plan_attention(
    query_start: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    num_kv_heads: int,
    page_size: int,
    dtype: torch.dtype,
    window: int = 0,
) -> AttentionPlan:
    """Sorts a step's sequences into batches.

    query_start int32 [S + 1]; context_lens int32 [S]; block_tables int32 [S, P]; `dtype` is the pool's. A query sees
    itself and the `window` - 1 tokens before it, or all of them if that is 0.
    """
    tables = block_tables.to(torch.int64)
    if window:
        context_lens, tables = _leave_out_unseen_pages(query_start, context_lens, tables, page_size, window)
    starts, lengths = query_start.tolist(), context_lens.tolist()
    decodes, prefills = [], []
    for index, length in enumerate(lengths):
        start, stop = starts[index], starts[index + 1]
        if stop - start == 1:
            decodes.append(index)
        else:
            table = tables[index : index + 1, : -(-length // page_size)]
            sees_all = stop - start == length and not 0 < window < length
            mask = None if sees_all else _causal_mask(stop - start, length, window, dtype)
            prefills.append(PrefillChunk(start, stop, _head_pages(table, num_kv_heads), length, mask))
    groups = _group_by_length(decodes, lengths, page_size)
    alone = not prefills and len(groups) == 1
    return AttentionPlan(
        tuple(
            _decode_batch(group, alone, query_start, context_lens, tables, num_kv_heads, page_size, dtype, window)
            for group in groups
        ),
        tuple(prefills),
    )


def paged_attention(queries: Tensor, pages: Tensor, plan: AttentionPlan) -> Tensor:
    """The attention output of every row, [T, heads, D] in the pool's type, or in float32.

    queries [T, heads, D] in the pool's type; pages [pages, 2 × kv_heads, page_size, D], first keys, then values, which
    hold the step's own already.
    """
    if len(plan.decodes) == 1 and plan.decodes[0].rows is None:
        return _decode(queries, pages, plan.decodes[0])
    out = torch.empty_like(queries)
    for batch in plan.decodes:
        if batch.rows is None:
            raise ValueError("a plan of several parts must say which rows belong to each")
        found = _decode(queries.index_select(0, batch.rows), pages, batch)
        out.index_copy_(0, batch.rows, found.to(out.dtype))
    for chunk in plan.prefills:
        _prefill(queries[chunk.start : chunk.stop], pages, chunk, out[chunk.start : chunk.stop])
    return out


def _decode(queries: Tensor, pages: Tensor, batch: DecodeBatch) -> Tensor:
    num_batches, head_size = queries.shape[0] * pages.shape[1] // 2, queries.shape[-1]
    # The heads of a group share keys: together they are the rows of one product.
    grouped = queries.type(batch.dtype).reshape(num_batches, -1, head_size)
    keys, values = _gather(pages, batch.pages, batch.dtype, num_batches, batch.num_keys)
    scale = 1.0 / math.sqrt(head_size)
    if batch.mask is None:
        scores = torch.bmm(grouped * scale, keys.transpose(1, 2))
    else:
        scores = torch.baddbmm(batch.mask, grouped, keys.transpose(1, 2), alpha=scale)
    return torch.bmm(torch.softmax(scores, dim=-1), values).view_as(queries)


def _prefill(queries: Tensor, pages: Tensor, chunk: PrefillChunk, out: Tensor) -> None:
    num_tokens, num_heads, head_size = queries.shape
    num_kv_heads = pages.shape[1] // 2
    # Each KV head is a batch entry and its group of query heads are that entry's heads: keys are shared, not copied.
    keys, values = (
        part.unsqueeze(1).expand(-1, num_heads // num_kv_heads, -1, -1)
        for part in _gather(pages, chunk.pages, pages.dtype, num_kv_heads, chunk.context_len)
    )
    grouped = queries.view(num_tokens, num_kv_heads, -1, head_size).permute(1, 2, 0, 3)
    result = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=chunk.mask, is_causal=chunk.mask is None)
    out.view(num_tokens, num_kv_heads, -1, head_size).copy_(result.permute(2, 0, 1, 3))


def _gather(pages: Tensor, rows: Tensor, dtype: torch.dtype, num_batches: int, num_keys: int) -> tuple[Tensor, Tensor]:
    """Keys and values, [num_batches, num_keys, D] each, for rows int64 [2, num_batches × P] of a plan."""
    rows_of = pages.view(pages.shape[0] * pages.shape[1], -1)
    if rows.numel() <= _FEW_ROWS:
        both = rows_of.index_select(0, rows.view(-1)).type(dtype)
        keys, values = both.view(2, num_batches, -1, pages.shape[-1]).narrow(2, 0, num_keys).unbind(0)
        return keys, values
    # One after the other, so that the first product finds its half in the cache.
    keys, values = (
        rows_of.index_select(0, half).type(dtype).view(num_batches, -1, pages.shape[-1]).narrow(1, 0, num_keys)
        for half in rows
    )
    return keys, values


def _head_pages(tables: Tensor, num_kv_heads: int) -> Tensor:
    """Page numbers [S, P] to rows of the pool seen by page and head, [2, S × kv_heads × P]: keys, then values."""
    heads = torch.arange(2 * num_kv_heads).view(2, 1, num_kv_heads, 1)
    return (tables.unsqueeze(1) * (2 * num_kv_heads) + heads).view(2, -1)


def _leave_out_unseen_pages(
    query_start: Tensor, context_lens: Tensor, tables: Tensor, page_size: int, window: int
) -> tuple[Tensor, Tensor]:
    """Context lengths and block tables without the pages that lie before the window of each sequence's first query."""
    first_queries = context_lens - query_start.diff()
    unseen = (first_queries - window + 1).clamp_min(0) // page_size
    pages = torch.arange(tables.shape[1]) + unseen.unsqueeze(1)
    return context_lens - unseen * page_size, tables.gather(1, pages.clamp_max(tables.shape[1] - 1))


def _causal_mask(num_queries: int, context_len: int, window: int, dtype: torch.dtype) -> Tensor:
    ones = torch.ones(num_queries, context_len, dtype=torch.bool)
    unseen = ones.triu(context_len - num_queries + 1)
    if window:
        unseen |= ones.tril(context_len - num_queries - window)
    return torch.zeros(num_queries, context_len, dtype=dtype).masked_fill_(unseen, -torch.inf)


def _group_by_length(decodes: list[int], lengths: list[int], page_size: int) -> list[list[int]]:
    """Cuts the decodes into batches of about equal length; in the step's order if they are one."""
    longest_first = sorted(decodes, key=lambda index: -lengths[index])
    groups: list[list[int]] = []
    rest = len(longest_first)
    for index in longest_first:
        # Starting a batch here spares this one and all shorter ones the padding to the batch's longest.
        if not groups or (lengths[groups[-1][0]] - lengths[index]) // page_size * rest > _MAX_PADDING_PAGES:
            groups.append([])
        groups[-1].append(index)
        rest -= 1
    return [decodes] if len(groups) == 1 else groups


def _decode_batch(
    group: list[int],
    alone: bool,
    query_start: Tensor,
    context_lens: Tensor,
    tables: Tensor,
    num_kv_heads: int,
    page_size: int,
    dtype: torch.dtype,
    window: int,
) -> DecodeBatch:
    if not alone:
        members = torch.tensor(group)
        context_lens, tables = context_lens[members], tables[members]
    num_keys = int(context_lens.max())
    num_pages = -(-num_keys // page_size)
    tables = tables[:, :num_pages]
    if len(group) * num_kv_heads * num_keys <= _FEW_KEYS:
        dtype = torch.float32
    sees_all = len(group) == 1 and not window and dtype is torch.float32
    if dtype is not torch.float32:
        # oneDNN copies what has gaps between its batches.
        num_keys = num_pages * page_size
    ends = context_lens.unsqueeze(1)
    # What stands past a sequence's end in its table may be another's page, which may hold anything.
    tables = torch.where(torch.arange(num_pages) * page_size < ends, tables, tables[:, :1])
    mask = None
    if not sees_all:
        mask = _padding_mask(ends, num_keys, window, dtype).repeat_interleave(num_kv_heads, dim=0).unsqueeze(1)
    return DecodeBatch(
        rows=None if alone else query_start[:-1][members].to(torch.int64),
        pages=_head_pages(tables, num_kv_heads),
        num_keys=num_keys,
        dtype=dtype,
        mask=mask,
    )


def _padding_mask(ends: Tensor, num_keys: int, window: int, dtype: torch.dtype) -> Tensor:
    slots = torch.arange(num_keys)
    unseen = slots >= ends
    if window:
        unseen |= slots < ends - window
    return torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)
