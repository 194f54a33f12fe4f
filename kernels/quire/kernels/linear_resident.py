"""Products y = x Wᵀ of very few rows whose W fits the GPU's registers: small models' at one or a few sequences.

There a product takes a few microseconds, most of which it waits: for its launch, for x, for W. Here each program has
all of K for some outputs and asks for its rows of W at its very beginning, while the kernels before it still run; what
follows its wait is a load of x, some sums and a store. Launches overlap as in `quire.kernels.linear`.

One or two rows are summed up one after another, more of them in the matrix unit.

The residual addition and norm in front of a product can be its beginning: each program has all of x anyway.
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
from quire.kernels.linear_parts import check_operands
from quire.kernels.linear_tiles import ResidentTile
from quire.kernels.rms_norm import check_kept


@dataclass(frozen=True, slots=True)
class NormInput:
    """What `quire.kernels.rms_norm.add_rms_norm` takes beside x."""

    residual: Tensor  # [M, K], contiguous
    weight: Tensor  # float32 [K]
    eps: float
    kept: Tensor | None = None  # [M, K], rows may be strided: filled with the residual stream with x in it


def linear_resident(
    x: Tensor,
    weight: Tensor,
    tile: ResidentTile,
    bias: Tensor | None = None,
    norm: NormInput | None = None,
    gated: bool = False,
    dependent: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`quire.kernels.linear.linear`, or `linear_silu_and_mul` if `gated`, and None; with `norm` of
    `add_rms_norm(residual, x)`, and then the sum [M, K] in place of None: `norm.residual` is left as it is, since all
    programs read it. x's rows may be strided."""
    num_rows, size = x.shape
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    check_operands(x, weight)
    residual = None
    if norm is not None:
        if norm.residual.shape != x.shape or not norm.residual.is_contiguous():
            raise ValueError(f"residual must be contiguous, {list(x.shape)}: it is {list(norm.residual.shape)}")
        check_kept(norm.kept, norm.residual)
        residual = torch.empty_like(norm.residual)
    out = torch.empty((num_rows, columns), dtype=dtype or x.dtype, device=x.device)
    if num_rows == 0:
        return out, residual
    dependent = dependent and may_overlap(x.device)
    kept = None if norm is None else norm.kept
    kernel, block, shape = _rows_kernel, next_power_of_2(size), {"ROWS": num_rows}
    if tile.dots:
        # Of each part of K the matrix unit wants 16 elements, and of the rows 8.
        kernel, block = _dots_kernel, max(16 * tile.warps, block)
        shape = {"ROWS": max(8, next_power_of_2(num_rows)), "PARTS": tile.warps}
    kernel[(ceil_div(columns, tile.columns),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        x if norm is None else norm.residual,
        x if residual is None else residual,
        weight if norm is None else norm.weight,
        x if kept is None else kept,
        num_rows,
        columns,
        x.stride(0),
        0 if kept is None else kept.stride(0),
        0.0 if norm is None else norm.eps,
        SIZE=size,
        BLOCK=block,
        COLUMNS=tile.columns,
        GATED=gated,
        BIAS=bias is not None,
        NORM=norm is not None,
        KEEP=kept is not None,
        EVEN=columns % tile.columns == 0,
        DEPENDENT=dependent,
        num_warps=tile.warps,
        **shape,
        **overlap_option(dependent),
    )
    return out, residual


@jit
def _rows_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    num_rows: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    kept_stride: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """All rows of some columns a program, one row after another."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, BLOCK)
    inside = depth < SIZE
    there = inside[None, :] if EVEN else (column < columns)[:, None] & inside[None, :]
    w_ptrs = weight_ptr + column.to(tl.int64)[:, None] * SIZE + depth[None, :]
    w = tl.load(w_ptrs, mask=there, other=0.0)
    w_up = w
    if GATED:
        w_up = tl.load(w_ptrs + tl.cast(columns, tl.int64) * SIZE, mask=there, other=0.0)
    bias = tl.zeros((COLUMNS,), tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    factor = tl.zeros((BLOCK,), tl.float32)
    if NORM:
        factor = tl.load(norm_ptr + depth, mask=inside, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    for row in tl.static_range(ROWS):
        x = tl.load(x_ptr + row * x_stride + depth, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            place = row * SIZE + depth
            total = tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32) + x
            total = total.to(residual_ptr.dtype.element_ty)
            if tl.program_id(0) == 0:
                tl.store(sum_ptr + place, total, mask=inside)
                if KEEP:
                    tl.store(kept_ptr + row * kept_stride + depth, total, mask=inside)
            x = total.to(tl.float32)
            # Rounded as the norm's own kernel does, so that both give the same.
            x = (x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps) * factor).to(x_ptr.dtype.element_ty).to(tl.float32)
        y = tl.sum(w.to(tl.float32) * x[None, :], 1) + bias
        if GATED:
            y = y / (1.0 + tl.exp(-y)) * tl.sum(w_up.to(tl.float32) * x[None, :], 1)
        tl.store(out_ptr + row * columns + column, y.to(out_ptr.dtype.element_ty), mask=column < columns)


@jit
def _dots_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    num_rows: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    kept_stride: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """All rows of some columns a program, in its matrix unit: a part of K for each warp."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, PARTS)[:, None, None] * (BLOCK // PARTS) + tl.arange(0, BLOCK // PARTS)[None, None, :]
    inside = depth < SIZE
    there = inside if EVEN else inside & (column < columns)[None, :, None]
    w_ptrs = weight_ptr + column.to(tl.int64)[None, :, None] * SIZE + depth
    w = tl.load(w_ptrs, mask=there, other=0.0)
    w_up = w
    if GATED:
        w_up = tl.load(w_ptrs + tl.cast(columns, tl.int64) * SIZE, mask=there, other=0.0)
    bias = tl.zeros((COLUMNS,), tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    factor = tl.zeros((PARTS, 1, BLOCK // PARTS), tl.float32)
    if NORM:
        factor = tl.load(norm_ptr + depth, mask=inside, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.arange(0, ROWS)[None, :, None]
    taken = inside & (row < num_rows)
    x = tl.load(x_ptr + row * x_stride + depth, mask=taken, other=0.0)
    if NORM:
        place = row * SIZE + depth
        total = tl.load(residual_ptr + place, mask=taken, other=0.0).to(tl.float32) + x.to(tl.float32)
        total = total.to(residual_ptr.dtype.element_ty)
        if tl.program_id(0) == 0:
            tl.store(sum_ptr + place, total, mask=taken)
            if KEEP:
                tl.store(kept_ptr + row * kept_stride + depth, total, mask=taken)
        h = total.to(tl.float32)
        scale = tl.rsqrt(tl.sum(tl.sum(h * h, 2), 0) / SIZE + eps)
        # Rounded as the norm's own kernel does, so that both give the same.
        x = (h * scale[None, :, None] * factor).to(x_ptr.dtype.element_ty)
    x = tl.trans(x, 0, 2, 1)
    y = tl.sum(tl.dot(w, x, input_precision="ieee"), 0) + bias[:, None]
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * tl.sum(tl.dot(w_up, x, input_precision="ieee"), 0)
    line = tl.arange(0, ROWS)[None, :]
    out = out_ptr + line * columns + column[:, None]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=(line < num_rows) & (column < columns)[:, None])
