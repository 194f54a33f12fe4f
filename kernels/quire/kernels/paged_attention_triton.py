"""Causal attention over paged keys and values on a GPU: prefill chunks, verifications and decodes in any mix.

Algorithm: FlashAttention-2 (Dao, 2023) over block tables, with the query heads that share a KV head packed into the
rows of one product; long contexts are cut into parts among programs, whose results the last of them to finish combines
(Flash-Decoding, Dao et al., 2023).

All that depends on the batch is on the device. Once a step a small kernel turns lengths into lists of work
(`quire.kernels.attention_worklist`), and the grid of each layer's attention is the longest list that there can be:
programs past its end leave at once. So one captured graph serves any batch within its `AttentionLimits`. Chunks and
decodes are two launches, of which the second does not wait for the first where launches overlap.

Slots past a sequence's end are never read. The same batch gives the same bits; another mix of sequences may cut a
context elsewhere, and so may round elsewhere.
"""
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels._triton import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    may_overlap,
    next_power_of_2,
    overlap_option,
    register_option,
    tl,
)
from quire.kernels.attention_block import attend_block, cap_scores, combine_parts, store_rows, turn_heads
from quire.kernels.attention_worklist import (
    ITEM_FIELDS,
    AttentionLimits,
    AttentionShape,
    Tile,
    WorkList,
    list_prefix_work,
    list_work,
    prefix_tile,
)
from quire.kernels.draft_trees import DraftTrees
from quire.kernels.pool_type import as_half, to_pool
from quire.kernels.prefix_groups import PrefixGroups
from quire.kernels.rotary_and_write import HeadNorm

_LOG2_E = 1.4426950408889634
# Elements that a combining program holds at a time: 64 registers of each of its threads.
_COMBINED_PER_WARP = 2048


@dataclass(frozen=True, slots=True)
class TritonAttentionPlan:
    """One step's work, the same for every layer of one `AttentionShape`."""

    shape: AttentionShape
    block_tables: Tensor  # int32 [tables, P]
    lists: tuple[WorkList, ...]
    prefixes: PrefixWork | None = None
    # A launch that waits for all before it lies between the lists and the attention: these may be read without waiting.
    listed: bool = False


@dataclass(frozen=True, slots=True)
class PrefixWork:
    """What groups of sequences share in a step, and where its results lie until they are merged; T as of the limits."""

    work: WorkList
    rows: Tensor  # int32 [T]
    out: Tensor  # float32 [T, heads, D]
    lses: Tensor  # float32 [T, heads]; -1e30 where a row is in no group


def plan_attention_triton(
    query_start: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    shape: AttentionShape,
    limits: AttentionLimits,
    table_rows: Tensor | None = None,
    tiles: tuple[Tile, Tile] | None = None,
    groups: PrefixGroups | None = None,
    group_tile: Tile | None = None,
    trees: DraftTrees | None = None,
    listed: bool = False,
) -> TritonAttentionPlan:
    """Launches the kernels that list a step's work; capture it in front of the layers.

    query_start int32 [S + 1], S ≤ max_seqs: sequence i's queries are rows query_start[i] to query_start[i + 1] - 1, and
    one without any is skipped, whatever else is said of it; context_lens int32 [S], keys that there are once the step's
    are written; block_tables int32 [tables, P]; table_rows int [S]: each sequence's row in block_tables, i if None;
    tiles, group_tile: those of decodes and prefill chunks, and of groups, for tuning; groups: of the sequences, from
    `quire.kernels.prefix_groups`: what they share is read once. Layers with a window have no use for them. `trees`: of
    the sequences, whose last rows are leaves, if any has some. `listed`: the caller has another launch between this and
    the first layer's attention, of the kind that waits until all before it are done.
    """
    if context_lens.shape[0] > limits.max_seqs:
        raise ValueError(f"there are {context_lens.shape[0]} sequences, and the limit is {limits.max_seqs}")
    if block_tables.stride(1) != 1:
        raise ValueError(f"a block table must be contiguous, and the strides are {block_tables.stride()}")
    if groups is not None and (shape.window > 0 or groups.rows.shape[0] < limits.max_tokens):
        raise ValueError(f"groups must have room for {limits.max_tokens} rows, and none are for windows: {shape}")
    prefix_lens = None if groups is None else groups.prefix_lens
    lists = list_work(query_start, context_lens, shape, limits, table_rows, tiles, prefix_lens, trees)
    if groups is None:
        return TritonAttentionPlan(shape, block_tables, lists, listed=listed)
    work = list_prefix_work(groups, shape, limits, group_tile or prefix_tile(shape.head_size))
    rows = (limits.max_tokens, shape.num_heads)
    prefixes = PrefixWork(
        work,
        groups.rows,
        torch.empty((*rows, shape.head_size), dtype=torch.float32, device=query_start.device),
        torch.full(rows, -1e30, dtype=torch.float32, device=query_start.device),
    )
    return TritonAttentionPlan(shape, block_tables, lists, prefixes, listed)


def paged_attention_triton(
    queries: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    plan: TritonAttentionPlan,
    scale: float | None = None,
    soft_cap: float = 0.0,
) -> Tensor:
    """The attention output of every row that belongs to a sequence, [T, heads, D] in the queries' type.

    queries [T, heads, D]; *_pages [pages, kv_heads, page_size, D], which hold the step's own keys and values already;
    scale: of the products, positive, 1 / √D if None; soft_cap: bounds the scaled products by cap · tanh(x / cap), 0 is
    off. Rows of no sequence are left as they were allocated.
    """
    shape = plan.shape
    check_layout(queries, key_pages, value_pages, shape)
    if scale is None:
        scale = shape.head_size**-0.5
    if scale <= 0:
        raise ValueError(f"scale must be positive, and is {scale}")
    out = torch.empty_like(queries)
    prefixes = plan.prefixes
    if prefixes is not None:
        launch_attention(prefixes.work, queries, key_pages, value_pages, prefixes.out, plan, scale, soft_cap, True, 1)
    merge = 0 if prefixes is None else 2
    decodes, chunks = plan.lists[0], plan.lists[1:]
    # Chunks first: beside their few programs, which compute, the many of the decodes read memory.
    for work in chunks:
        launch_attention(work, queries, key_pages, value_pages, out, plan, scale, soft_cap, True, merge, followed=True)
    launch_attention(
        decodes, queries, key_pages, value_pages, out, plan, scale, soft_cap, False, merge, beside=bool(chunks)
    )
    return out


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What a launch turns and writes itself: see `quire.kernels.attention_new_tokens`."""

    qkv: Tensor  # [T, heads + 2 kv_heads, D]
    table: Tensor  # float32 [positions, 2, 1, D]
    norm: HeadNorm | None


def launch_attention(
    work: WorkList,
    queries: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    out: Tensor,
    plan: TritonAttentionPlan,
    scale: float,
    soft_cap: float,
    bulk: bool,
    prefix: int,
    new: NewTokens | None = None,
    followed: bool = False,
    beside: bool = False,
) -> None:
    """Launches one list's work; `bulk`, `prefix`, `followed` and `beside` are the kernel's."""
    shape, tile, prefixes = plan.shape, work.tile, plan.prefixes
    block_size = max(16, next_power_of_2(shape.head_size))
    combine_rows = min(4, next_power_of_2(shape.group))
    overlaps, norm = may_overlap(queries.device), None if new is None else new.norm
    _attend_kernel[(shape.num_kv_heads, work.items.shape[0])](
        queries if new is None else new.qkv,
        key_pages,
        value_pages,
        out,
        work.items if prefixes is None else prefixes.rows,
        work.lses if prefixes is None else prefixes.out,
        work.lses if prefixes is None else prefixes.lses,
        plan.block_tables,
        work.items,
        work.count,
        work.partials,
        work.lses,
        work.arrivals,
        work.lses if new is None else new.table,
        work.lses if norm is None else norm.query_weight,
        work.lses if norm is None else norm.key_weight,
        0 if new is None else new.qkv.stride(0),
        0.0 if norm is None else norm.eps,
        plan.block_tables.stride(0),
        scale * _LOG2_E,
        soft_cap * _LOG2_E,
        NUM_KV_HEADS=shape.num_kv_heads,
        GROUP=shape.group,
        HEAD_SIZE=shape.head_size,
        PAGE_SIZE=key_pages.shape[2],
        WINDOW=shape.window,
        SOFT_CAP=soft_cap != 0.0,
        FIELDS=work.items.shape[1],
        TREE=work.items.shape[1] > ITEM_FIELDS,
        TILE_ROWS=tile.rows,
        BLOCK_KEYS=tile.keys,
        BLOCK_SIZE=block_size,
        COMBINE_ROWS=combine_rows,
        COMBINE_PARTS=max(2, _COMBINED_PER_WARP * tile.num_warps // (combine_rows * block_size)),
        STAGES=tile.num_stages,
        BULK=bulk,
        PREFIX=prefix,
        NEW=new is not None,
        NORM=norm is not None,
        DEPENDENT=overlaps,
        FOLLOWED=followed,
        BESIDE=beside,
        LISTED=plan.listed,
        num_warps=tile.num_warps,
        **register_option(tile.max_registers),
        **overlap_option(overlaps),
    )


def check_layout(queries: Tensor, key_pages: Tensor, value_pages: Tensor, shape: AttentionShape) -> None:
    """Raises ValueError where the kernel would read other elements than were meant."""
    if queries.shape[1:] != (shape.num_heads, shape.head_size):
        raise ValueError(f"queries must be [T, {shape.num_heads}, {shape.head_size}], and are {list(queries.shape)}")
    pages = (shape.num_kv_heads, key_pages.shape[2], shape.head_size)
    if key_pages.shape[1:] != pages or value_pages.shape != key_pages.shape:
        raise ValueError(f"pages must be [pages, {pages[0]}, page_size, {pages[2]}], and are {list(key_pages.shape)}")
    if not (queries.is_contiguous() and key_pages.is_contiguous() and value_pages.is_contiguous()):
        raise ValueError("queries, key_pages and value_pages must be contiguous")


@jit
def wait_for_others(item: tl.tensor, DEPENDENT: tl.constexpr, FOLLOWED: tl.constexpr, BESIDE: tl.constexpr) -> None:
    """For the launches before this one; the next ones may begin."""
    if DEPENDENT:
        if FOLLOWED:
            gdc_wait()
            gdc_launch_dependents()
        else:
            # With few sequences most of the GPU is free to ask for the weights of the product that follows.
            gdc_launch_dependents()
            if not BESIDE:
                gdc_wait()
            elif item == tl.num_programs(1) - 1:
                # One program does it for all: this launch is not done before the one beside it is.
                gdc_wait()


@jit
def _attend_kernel(
    queries_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    prefix_ptr: tl.tensor,
    prefix_lses_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    items_ptr: tl.tensor,
    count_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    lses_ptr: tl.tensor,
    arrivals_ptr: tl.tensor,
    turns_ptr: tl.tensor,
    query_weight_ptr: tl.tensor,
    key_weight_ptr: tl.tensor,
    qkv_stride: tl.tensor,
    eps: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FIELDS: tl.constexpr,
    TREE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    COMBINE_ROWS: tl.constexpr,
    COMBINE_PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    BULK: tl.constexpr,
    PREFIX: tl.constexpr,
    NEW: tl.constexpr,
    NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
    FOLLOWED: tl.constexpr,
    BESIDE: tl.constexpr,
    LISTED: tl.constexpr,
) -> None:
    """One item of the list for one KV head a program. Row r is query r // GROUP, head r mod GROUP of the KV head's.

    PREFIX 1: the queries are those that `rows_ptr` names, which all see all keys; see `store_rows`. NEW: `queries_ptr`
    has queries, keys and values as the product made them, and who has the part with a sequence's end begins with its
    new token's key and value, which it writes into their page. TREE: see `quire.kernels.draft_trees`. FOLLOWED: the
    next launch is BESIDE this one: it begins once all programs of this one have what they need of those before, and so
    what it needs itself; what follows it waits for both.
    """
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    fields = items_ptr + item * FIELDS
    if not LISTED:
        wait_for_others(item, DEPENDENT, FOLLOWED, BESIDE)
    table_ptr = tables_ptr + tl.load(fields).to(tl.int64) * table_stride
    first_row = tl.load(fields + 1).to(tl.int64)
    position = tl.load(fields + 2)
    num_queries = tl.load(fields + 3)
    begin = tl.load(fields + 4)
    end = tl.load(fields + 5)
    first_slot = tl.load(fields + 6)
    part = tl.load(fields + 7)
    parts = tl.load(fields + 8)
    first_leaf = position
    num_drafts = position
    if TREE:
        first_leaf = tl.load(fields + 9)
        num_drafts = tl.load(fields + 10)
    count = tl.load(count_ptr)
    if LISTED:
        wait_for_others(item, DEPENDENT, FOLLOWED, BESIDE)
    # Here, so that it does not delay the loads above; what those find past the list's end is not used.
    if item >= count:
        return

    row = tl.arange(0, TILE_ROWS)
    element = tl.arange(0, BLOCK_SIZE)
    query = row // GROUP
    there = (query < num_queries)[:, None] & (element < HEAD_SIZE)[None, :]
    token = first_row + query
    if PREFIX == 1:
        token = tl.load(rows_ptr + token, mask=query < num_queries, other=0).to(tl.int64)
    head = token * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + row % GROUP
    place = head[:, None] * HEAD_SIZE + element[None, :]
    places = position + query
    positions = places
    if TREE:
        positions = tl.where(places >= first_leaf, places - num_drafts - 1, places)
    best = tl.full((TILE_ROWS,), -1e30, tl.float32)
    weight = tl.zeros((TILE_ROWS,), tl.float32)
    acc = tl.zeros((TILE_ROWS, BLOCK_SIZE), tl.float32)
    if NEW:
        # [TILE_ROWS], all of them where the new key is: each row's score needs it.
        key_ptrs = queries_ptr + token * 0 + first_row * qkv_stride + (NUM_KV_HEADS * GROUP + kv_head) * HEAD_SIZE
        head_ptrs = queries_ptr + token * qkv_stride + (kv_head * GROUP + row % GROUP) * HEAD_SIZE
        turn_ptr = turns_ptr + position.to(tl.int64) * (2 * HEAD_SIZE)
        pool: tl.constexpr = keys_ptr.dtype.element_ty
        query_type: tl.constexpr = out_ptr.dtype.element_ty
        q = turn_heads(head_ptrs, query_weight_ptr, turn_ptr, element, there, eps, HEAD_SIZE, NORM).to(query_type)
        inside = (row >= 0)[:, None] & (element < HEAD_SIZE)[None, :]
        k = to_pool(turn_heads(key_ptrs, key_weight_ptr, turn_ptr, element, inside, eps, HEAD_SIZE, NORM), pool)
        v = tl.load(key_ptrs[:, None] + NUM_KV_HEADS * HEAD_SIZE + element[None, :], mask=inside, other=0.0)
        v = to_pool(v, pool)
        scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
        scores = cap_scores(scores, scale, soft_cap) if SOFT_CAP else scores * scale
        # Not always the last part: behind a window there may be one without a key.
        if (begin <= position) & (position < end):
            best = scores
            weight += 1.0
            acc = v.to(tl.float32)
            end -= 1
            page = tl.load(table_ptr + position // PAGE_SIZE).to(tl.int64)
            slot = ((page * NUM_KV_HEADS + kv_head) * PAGE_SIZE + position % PAGE_SIZE) * HEAD_SIZE
            once = inside & (row == 0)[:, None]
            tl.store(keys_ptr + slot + row[:, None] * 0 + element[None, :], k, mask=once)
            tl.store(values_ptr + slot + row[:, None] * 0 + element[None, :], v, mask=once)
    else:
        q = tl.load(queries_ptr + place, mask=there, other=0.0)
    scales = tl.full((TILE_ROWS,), scale, tl.float32)
    # For more rows the tensor cores read queries from shared memory, but not what was computed from them.
    if keys_ptr.dtype.element_ty.is_fp8() and q.dtype == tl.bfloat16 and TILE_ROWS < 64:
        q, scales = as_half(q, scale)
    rest = begin
    if BULK:
        # All queries see all of these keys.
        seen = position + 1
        if TREE:
            seen = tl.minimum(seen, first_leaf - num_drafts)
        rest = begin + tl.maximum(tl.minimum(end, seen) - begin, 0) // BLOCK_KEYS * BLOCK_KEYS
        for start in tl.range(begin, rest, BLOCK_KEYS, num_stages=STAGES):
            best, weight, acc = attend_block(
                start, end, q, best, weight, acc, positions, places, keys_ptr, values_ptr, table_ptr, kv_head, scales,
                soft_cap, NUM_KV_HEADS, HEAD_SIZE, PAGE_SIZE, WINDOW, SOFT_CAP, BLOCK_KEYS, BLOCK_SIZE, TREE, False,
            )  # fmt: skip
    for start in tl.range(rest, end, BLOCK_KEYS, num_stages=STAGES):
        best, weight, acc = attend_block(
            start, end, q, best, weight, acc, positions, places, keys_ptr, values_ptr, table_ptr, kv_head, scales,
            soft_cap, NUM_KV_HEADS, HEAD_SIZE, PAGE_SIZE, WINDOW, SOFT_CAP, BLOCK_KEYS, BLOCK_SIZE, TREE, True,
        )  # fmt: skip

    weight = tl.where(weight > 0.0, weight, 1.0)  # a part without a key, before the tile's first or after its last
    acc = acc / weight[:, None]
    if first_slot < 0:
        store_rows(
            out_ptr, prefix_ptr, prefix_lses_ptr, head, element, acc, best + tl.log2(weight), there, HEAD_SIZE, PREFIX
        )
    else:
        slot = ((first_slot + part) * NUM_KV_HEADS + kv_head).to(tl.int64) * TILE_ROWS
        tl.store(partials_ptr + (slot + row)[:, None] * HEAD_SIZE + element[None, :], acc, mask=there)
        tl.store(lses_ptr + slot + row, best + tl.log2(weight), mask=query < num_queries)
        # All threads' results must be out before this program says that it is done.
        tl.debug_barrier()
        arrivals = arrivals_ptr + first_slot * NUM_KV_HEADS + kv_head
        if tl.atomic_add(arrivals, 1, sem="acq_rel") == parts - 1:
            tl.store(arrivals, 0)
            combine_parts(
                partials_ptr, lses_ptr, out_ptr, rows_ptr, prefix_ptr, prefix_lses_ptr, first_slot, parts, first_row,
                num_queries, kv_head, NUM_KV_HEADS, GROUP, HEAD_SIZE, TILE_ROWS, BLOCK_SIZE, COMBINE_ROWS,
                COMBINE_PARTS, PREFIX,
            )  # fmt: skip
