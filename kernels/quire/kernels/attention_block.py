"""Attention over parts of a context, and what becomes of the parts: device functions of `paged_attention_triton`.

Algorithm: FlashAttention-2 (Dao, 2023), and for the parts Flash-Decoding (Dao et al., 2023). Scores are in units of
ln 2, so that exp2 serves; what a query may not see gets -inf, while the running maximum starts at a large negative
number: a row that has seen nothing yet holds zeros and nothing is ever NaN. A finite score would not do for what is
hidden: it is the maximum, too, there, and the fused multiply-add that subtracts one from the other leaves the rounding
error of their product with the scale, which is larger than exp2 can bear.
"""
# ruff: noqa: N803

from __future__ import annotations

from quire.kernels._triton import jit, tl
from quire.kernels.pool_type import from_pool, unpack_pairs


@jit
def cap_scores(scores: tl.tensor, scale: tl.tensor, soft_cap: tl.tensor) -> tl.tensor:
    """soft_cap · tanh(scores · scale / soft_cap)."""
    # tanh(x) = 1 - 2 / (exp(2 x) + 1)
    return soft_cap * (1.0 - 2.0 / (tl.exp2(scores * (scale * 2.0 * 1.4426950408889634 / soft_cap)) + 1.0))


@jit
def attend_block(
    start: tl.tensor,
    end: tl.tensor,
    q: tl.tensor,
    best: tl.tensor,
    weight: tl.tensor,
    acc: tl.tensor,
    positions: tl.tensor,
    places: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    table_ptr: tl.tensor,
    kv_head: tl.tensor,
    scales: tl.tensor,
    soft_cap: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TREE: tl.constexpr,
    MASK: tl.constexpr,
) -> tl.tensor:
    """Takes the keys from `start` into account: returns the new maximum, denominator and weighted sum of values.

    A query sees keys up to its one of `positions`, and with TREE the one at its own of `places`, too; `scales` are the
    queries'. Without MASK all of a block's keys are there and all queries see them, but for the window.
    """
    fp8: tl.constexpr = keys_ptr.dtype.element_ty.is_fp8()
    # For more rows the tensor cores read keys and values from shared memory, converted: pairs would gain nothing.
    paired: tl.constexpr = fp8 and q.dtype == tl.float16 and q.shape[0] < 64 and BLOCK_SIZE >= 32
    width: tl.constexpr = HEAD_SIZE // 2 if paired else HEAD_SIZE
    block_width: tl.constexpr = BLOCK_SIZE // 2 if paired else BLOCK_SIZE
    if paired:
        keys_ptr = keys_ptr.to(tl.pointer_type(tl.int16))
        values_ptr = values_ptr.to(tl.pointer_type(tl.int16))
    key = start + tl.arange(0, BLOCK_KEYS)
    element = tl.arange(0, block_width)
    inside = key < end
    if MASK:
        page = tl.load(table_ptr + key // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    else:
        page = tl.load(table_ptr + key // PAGE_SIZE).to(tl.int64)
    offset = ((page * NUM_KV_HEADS + kv_head) * PAGE_SIZE + key % PAGE_SIZE) * width
    place = offset[:, None] + element[None, :]
    if MASK:
        there = inside[:, None] & (element < width)[None, :]
        k = tl.load(keys_ptr + place, mask=there, other=0.0)
        v = tl.load(values_ptr + place, mask=there, other=0.0)
    elif HEAD_SIZE != BLOCK_SIZE:
        k = tl.load(keys_ptr + place, mask=(element < width)[None, :], other=0.0)
        v = tl.load(values_ptr + place, mask=(element < width)[None, :], other=0.0)
    else:
        k = tl.load(keys_ptr + place)
        v = tl.load(values_ptr + place)

    if paired:
        first_q, second_q = tl.split(tl.reshape(q, (q.shape[0], block_width, 2)))
        first_k, second_k = unpack_pairs(k)
        scores = tl.dot(second_q, tl.trans(second_k), tl.dot(first_q, tl.trans(first_k)))
    else:
        scores = tl.dot(q, tl.trans(from_pool(k, q)), input_precision="ieee")
    units = scales
    if SOFT_CAP:
        scores = cap_scores(scores, scales[:, None], soft_cap)
        units = tl.full(scales.shape, 1.0, tl.float32)
    if MASK:
        seen = key[None, :] <= positions[:, None]
        if TREE:
            seen |= key[None, :] == places[:, None]
        scores = tl.where(inside[None, :] & seen, scores, -float("inf"))
    if WINDOW > 0:
        last = positions
        if TREE:
            # A leaf's own position is the next one.
            last = tl.minimum(positions + 1, places)
        scores = tl.where(key[None, :] > last[:, None] - WINDOW, scores, -float("inf"))
    new_best = tl.maximum(best, tl.max(scores, 1) * units)
    # One fused multiply-add an element.
    p = tl.exp2(scores * units[:, None] - new_best[:, None])
    fade = tl.exp2(best - new_best)
    if paired:
        first, second = tl.split(tl.reshape(acc, (q.shape[0], block_width, 2)))
        first_v, second_v = unpack_pairs(v)
        first = tl.dot(p.to(q.dtype), first_v, first * fade[:, None])
        second = tl.dot(p.to(q.dtype), second_v, second * fade[:, None])
        acc = tl.reshape(tl.join(first, second), (q.shape[0], BLOCK_SIZE))
    else:
        weights: tl.constexpr = tl.float16 if fp8 and q.dtype == tl.bfloat16 else q.dtype
        acc = tl.dot(p.to(weights), v.to(weights), acc * fade[:, None], input_precision="ieee")
    return new_best, weight * fade + tl.sum(p, 1), acc


@jit
def turn_heads(
    head_ptrs: tl.tensor,
    weight_ptr: tl.tensor,
    turn_ptr: tl.tensor,
    element: tl.tensor,
    there: tl.tensor,
    eps: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    NORM: tl.constexpr,
) -> tl.tensor:
    """Heads as `quire.kernels.rotary_and_write` makes them, float32: head_ptrs [rows], turn_ptr: their position's."""
    inside = element < HEAD_SIZE
    partner = (element + HEAD_SIZE // 2) % HEAD_SIZE
    x = tl.load(head_ptrs[:, None] + element[None, :], mask=there, other=0.0).to(tl.float32)
    other = tl.load(head_ptrs[:, None] + partner[None, :], mask=there, other=0.0).to(tl.float32)
    cos = tl.load(turn_ptr + element, mask=inside, other=0.0)
    sin = tl.load(turn_ptr + HEAD_SIZE + element, mask=inside, other=0.0)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD_SIZE + eps)[:, None]
        x = x * scale * tl.load(weight_ptr + element, mask=inside, other=0.0).to(tl.float32)[None, :]
        other = other * scale * tl.load(weight_ptr + partner, mask=inside, other=0.0).to(tl.float32)[None, :]
    return x * cos[None, :] + other * sin[None, :]


@jit
def store_rows(
    out_ptr: tl.tensor,
    prefix_ptr: tl.tensor,
    prefix_lses_ptr: tl.tensor,
    head: tl.tensor,
    element: tl.tensor,
    acc: tl.tensor,
    lse: tl.tensor,
    there: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    PREFIX: tl.constexpr,
) -> None:
    """Writes the results of some rows, whose places are `head`, with what is known of a shared prefix (see PREFIX).

    acc, there [rows, BLOCK_SIZE]; lse, head [rows]. 1: these are the results over a prefix, so the logarithms of their
    denominators are written too; 2: those of the prefix are merged in, where there is one.
    """
    place = head[:, None] * HEAD_SIZE + element[None, :]
    first = there & (element == 0)[None, :]
    if PREFIX == 1:
        tl.store(prefix_lses_ptr + head, lse, mask=tl.max(first.to(tl.int32), 1) > 0)
    if PREFIX == 2:
        other_lse = tl.load(prefix_lses_ptr + head, mask=tl.max(first.to(tl.int32), 1) > 0, other=-1e30)
        known = (other_lse > -1e29)[:, None]
        other = tl.load(prefix_ptr + place, mask=there & known, other=0.0)
        best = tl.maximum(lse, other_lse)
        share = tl.exp2(lse - best)
        other_share = tl.exp2(other_lse - best)
        acc = (acc * share[:, None] + other * other_share[:, None]) / (share + other_share)[:, None]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=there)


@jit
def combine_parts(
    partials_ptr: tl.tensor,
    lses_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    prefix_ptr: tl.tensor,
    prefix_lses_ptr: tl.tensor,
    first_slot: tl.tensor,
    parts: tl.tensor,
    first_row: tl.tensor,
    num_queries: tl.tensor,
    kv_head: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    PREFIX: tl.constexpr,
) -> None:
    """Weighs the results of a tile's parts and writes the tile's output: some rows of many parts at a time.

    So that the loads of many parts are in flight together, and registers suffice.
    """
    element = tl.arange(0, BLOCK_SIZE)
    slot = (first_slot * NUM_KV_HEADS + kv_head).to(tl.int64)
    for begin in range(0, num_queries * GROUP, BLOCK_ROWS):
        row = begin + tl.arange(0, BLOCK_ROWS)
        inside = row < num_queries * GROUP
        best = tl.full((BLOCK_ROWS,), -1e30, tl.float32)
        weight = tl.zeros((BLOCK_ROWS,), tl.float32)
        acc = tl.zeros((BLOCK_ROWS, BLOCK_SIZE), tl.float32)
        for first_part in range(0, parts, BLOCK_PARTS):
            part = first_part + tl.arange(0, BLOCK_PARTS)
            place = (slot + part * NUM_KV_HEADS)[:, None] * TILE_ROWS + row[None, :]
            real = (part < parts)[:, None] & inside[None, :]
            lse = tl.load(lses_ptr + place, mask=real, other=-1e30)
            x = tl.load(
                partials_ptr + place[:, :, None] * HEAD_SIZE + element[None, None, :],
                mask=real[:, :, None] & (element < HEAD_SIZE)[None, None, :],
                other=0.0,
            )
            new_best = tl.maximum(best, tl.max(lse, 0))
            fade = tl.exp2(best - new_best)
            share = tl.exp2(lse - new_best[None, :])
            acc = acc * fade[:, None] + tl.sum(x * share[:, :, None], 0)
            weight = weight * fade + tl.sum(share, 0)
            best = new_best
        query = first_row + row // GROUP
        if PREFIX == 1:
            query = tl.load(rows_ptr + query, mask=inside, other=0).to(tl.int64)
        head = query * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + row % GROUP
        store_rows(
            out_ptr, prefix_ptr, prefix_lses_ptr, head, element, acc / weight[:, None], best + tl.log2(weight),
            inside[:, None] & (element < HEAD_SIZE)[None, :], HEAD_SIZE, PREFIX,
        )  # fmt: skip
