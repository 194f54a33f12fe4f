"""What lies between a layer's QKV product and its attention, in one pass on a GPU.

Queries and keys are normalized per head where the model does that (Qwen3's QK-norm) and turned by their positions
(`quire.kernels.rotary`); keys and values go into the KV pool's pages (`quire.kernels.write_pages`). The CPU engine
calls those two itself, with what they share between layers made once a step.
"""
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels._triton import (
    ceil_div,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    may_overlap,
    next_power_of_2,
    overlap_option,
    tl,
)
from quire.kernels.pool_type import as_stored, query_type, to_pool
from quire.kernels.rms_norm import rms_norm
from quire.kernels.rotary import rotary
from quire.kernels.write_pages import plan_writes, write_pages


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMS norm over each head of queries and keys."""

    query_weight: Tensor  # [D], of any float type on a GPU, float32 on a CPU
    key_weight: Tensor  # the same
    eps: float


def rotary_and_write(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor,
    slot_mapping: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    norm: HeadNorm | None = None,
) -> Tensor:
    """The turned queries, [T, heads, D] in the pool's type, or in qkv's if that is FP8 (see `quire.kernels.pool_type`);
    keys and values are written into their slots.

    qkv [T, heads + 2 kv_heads, D] of any float type: queries, keys, values; positions int [T]; table float32
    [positions, 2, 1, D] from `rotary_table`; slot_mapping int [T]: page × page_size + offset;
    *_pages [pages, kv_heads, page_size, D], written in place.
    """
    if qkv.is_cuda:
        return rotary_and_write_triton(qkv, positions, table, slot_mapping, key_pages, value_pages, norm)
    num_kv_heads, page_size = key_pages.shape[1:3]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    queries, keys, values = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norm is not None:
        queries = rms_norm(queries.float(), norm.query_weight, norm.eps, torch.float32)
        keys = rms_norm(keys.float(), norm.key_weight, norm.eps, torch.float32)
    cos, sin = table[positions].unbind(1)
    plan = plan_writes(slot_mapping.to(torch.int64), num_kv_heads, page_size)
    write_pages(*as_stored(rotary(keys, cos, sin), key_pages), plan)
    write_pages(*as_stored(values, value_pages), plan)
    return rotary(queries, cos, sin).to(query_type(key_pages, qkv))


@jit
def _rotary_and_write_kernel(
    qkv_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    table_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    query_weight_ptr: tl.tensor,
    key_weight_ptr: tl.tensor,
    queries_ptr: tl.tensor,
    key_pages_ptr: tl.tensor,
    value_pages_ptr: tl.tensor,
    qkv_stride: tl.tensor,
    eps: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """Some heads of one token a program. A head's halves, which turn into each other, are two tiles."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    element = tl.arange(0, BLOCK_HALF)
    within = element < HALF
    inside = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & within[None, :]
    is_query = (head < NUM_HEADS)[:, None]
    is_value = (head >= NUM_HEADS + NUM_KV_HEADS)[:, None]

    slot = tl.load(slots_ptr + token).to(tl.int64)
    turn = table_ptr + tl.load(positions_ptr + token).to(tl.int64) * (4 * HALF) + element
    cos = tl.load(turn, mask=within, other=0.0)[None, :]
    # The table's first half of sines is negated, its second half is not.
    sin = tl.load(turn + 3 * HALF, mask=within, other=0.0)[None, :]
    x = qkv_ptr + token * qkv_stride + head[:, None] * (2 * HALF) + element[None, :]
    raw_low, raw_high = tl.load(x, mask=inside, other=0.0), tl.load(x + HALF, mask=inside, other=0.0)

    low, high = raw_low.to(tl.float32), raw_high.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
        query_low = tl.load(query_weight_ptr + element, mask=within, other=0.0).to(tl.float32)[None, :]
        query_high = tl.load(query_weight_ptr + HALF + element, mask=within, other=0.0).to(tl.float32)[None, :]
        key_low = tl.load(key_weight_ptr + element, mask=within, other=0.0).to(tl.float32)[None, :]
        key_high = tl.load(key_weight_ptr + HALF + element, mask=within, other=0.0).to(tl.float32)[None, :]
        low = low * scale * tl.where(is_query, query_low, key_low)
        high = high * scale * tl.where(is_query, query_high, key_high)
    query_type: tl.constexpr = queries_ptr.dtype.element_ty
    pool: tl.constexpr = key_pages_ptr.dtype.element_ty
    turned_low = low * cos - high * sin
    turned_high = high * cos + low * sin

    query = queries_ptr + (token * NUM_HEADS + head[:, None]) * (2 * HALF) + element[None, :]
    tl.store(query, turned_low.to(query_type), mask=inside & is_query)
    tl.store(query + HALF, turned_high.to(query_type), mask=inside & is_query)

    written = inside & (slot >= 0)
    kv_head = head - tl.where(head < NUM_HEADS + NUM_KV_HEADS, NUM_HEADS, NUM_HEADS + NUM_KV_HEADS)
    place = ((slot // PAGE_SIZE) * NUM_KV_HEADS + kv_head[:, None]) * PAGE_SIZE + slot % PAGE_SIZE
    place = place * (2 * HALF) + element[None, :]
    is_key = written & ~is_query & ~is_value
    tl.store(key_pages_ptr + place, to_pool(turned_low, pool), mask=is_key)
    tl.store(key_pages_ptr + place + HALF, to_pool(turned_high, pool), mask=is_key)
    tl.store(value_pages_ptr + place, to_pool(raw_low, pool), mask=written & is_value)
    tl.store(value_pages_ptr + place + HALF, to_pool(raw_high, pool), mask=written & is_value)


def rotary_and_write_triton(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor,
    slot_mapping: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    norm: HeadNorm | None = None,
) -> Tensor:
    """`rotary_and_write`; a token with a negative slot is not written: it pads a captured graph.

    Unlike the reference this does not clear a fresh page: attention on a GPU reads no slot that is not written.
    """
    _check_layout(qkv, table, key_pages, value_pages)
    num_tokens, num_all_heads, head_size = qkv.shape
    num_kv_heads, page_size = key_pages.shape[1:3]
    num_heads = num_all_heads - 2 * num_kv_heads
    dtype = query_type(key_pages, qkv)
    queries = torch.empty((num_tokens, num_heads, head_size), dtype=dtype, device=qkv.device)
    # Few tokens: more programs, each with little to wait for. Many: fewer, as each reads its token's angles.
    block_heads = 4 if num_tokens <= 32 else 16
    overlaps = may_overlap(qkv.device)
    _rotary_and_write_kernel[(num_tokens, ceil_div(num_all_heads, block_heads))](
        qkv,
        positions,
        table,
        slot_mapping,
        table if norm is None else norm.query_weight,
        table if norm is None else norm.key_weight,
        queries,
        key_pages,
        value_pages,
        qkv.stride(0),
        0.0 if norm is None else norm.eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_size // 2,
        PAGE_SIZE=page_size,
        NORM=norm is not None,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=next_power_of_2(head_size // 2),
        DEPENDENT=overlaps,
        num_warps=1 if num_tokens <= 32 else 4,
        **overlap_option(overlaps),
    )
    return queries


def _check_layout(qkv: Tensor, table: Tensor, key_pages: Tensor, value_pages: Tensor) -> None:
    head_size = qkv.shape[2]
    if qkv.stride()[1:] != (head_size, 1):
        raise ValueError(f"a token's heads in qkv must be contiguous, and its strides are {qkv.stride()}")
    if not (key_pages.is_contiguous() and value_pages.is_contiguous() and table.is_contiguous()):
        raise ValueError("key_pages, value_pages and table must be contiguous")
    if table.shape[1:] != (2, 1, head_size):
        raise ValueError(f"table must be [positions, 2, 1, {head_size}], and it is {list(table.shape)}")
