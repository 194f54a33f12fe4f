"""Products y = x Wᵀ of few rows on a GPU, which take as long as reading W does. `quire.kernels.linear_wide` has a
kernel for more rows, `quire.kernels.linear_resident` one for small weights, and cuBLAS serves all else.

A program owns a tile of outputs and reads its rows of W once, in blocks that several stages of loads keep in flight.
Where there are fewer tiles than the GPU has multiprocessors, K is split among programs too; the last of them to finish
adds the parts, always in the same order, so the same batch gives the same bits. The gated activation (SwiGLU) can be
the end of the product in front of it: the tile then has two halves, of gate and up.

A product may be launched while the kernel before it still runs (see `quire.kernels._triton`): it asks for the start of
W in the L2 cache, which depends on nobody, and waits before it reads x.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quire.kernels._triton import (
    TensorDescriptor,
    ceil_div,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    may_overlap,
    next_power_of_2,
    overlap_option,
    tl,
)
from quire.kernels.linear_parts import SplitSpace, check_operands, check_space, prefetch
from quire.kernels.linear_resident import NormInput, linear_resident
from quire.kernels.linear_tiles import AnyTile, LinearTile, ResidentTile, WideTile, tile_for
from quire.kernels.linear_wide import aligned, linear_wide
from quire.kernels.rms_norm import add_rms_norm
from quire.kernels.silu_and_mul import silu_and_mul

__all__ = ["NormInput", "SplitSpace", "linear", "linear_silu_and_mul", "linear_triton", "normed_linear"]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    space: SplitSpace | None = None,
    dependent: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x Wᵀ + b, [M, N] of `dtype` (x's type if None), accumulated in float32 and rounded once.

    x [M, K]; weight [N, K] of x's type; bias [N] of any float type; space: without it cuBLAS does it; dependent: the
    launch may overlap the end of the kernel before it on the stream, where the GPU can do that.
    """
    tile = _tile_of(x, weight, False, space)
    if isinstance(tile, ResidentTile):
        return linear_resident(x, weight, tile, bias, dependent=dependent, dtype=dtype)[0]
    if isinstance(tile, WideTile):
        return linear_wide(x, weight, tile, bias, space, dependent=dependent, dtype=dtype)
    if tile is not None:
        return linear_triton(x, weight, tile, bias, space, dependent=dependent, dtype=dtype)
    if dtype is None or dtype is x.dtype:
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if x.is_cuda and dtype is torch.float32:
        out = torch.mm(x, weight.t(), out_dtype=dtype)
    else:
        out = F.linear(x.to(dtype), weight.to(dtype))
    return out if bias is None else out.add_(bias)


def linear_silu_and_mul(x: Tensor, weight: Tensor, space: SplitSpace | None = None, dependent: bool = False) -> Tensor:
    """silu(x Gᵀ) · (x Uᵀ) for weight = [G; U], [2 I, K]; the result is [M, I]. Otherwise as `linear`."""
    tile = _tile_of(x, weight, True, space)
    if isinstance(tile, ResidentTile):
        return linear_resident(x, weight, tile, gated=True, dependent=dependent)[0]
    if isinstance(tile, WideTile):
        out = linear_wide(x, weight, tile, None, space, gated=tile.gated, dependent=dependent)
        return out if tile.gated else silu_and_mul(out)
    if tile is None:
        return silu_and_mul(linear(x, weight, None, space, dependent))
    return linear_triton(x, weight, tile, None, space, gated=True, dependent=dependent)


def normed_linear(
    x: Tensor,
    norm: NormInput,
    weight: Tensor,
    bias: Tensor | None = None,
    space: SplitSpace | None = None,
    gated: bool = False,
    dependent: bool = False,
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` of x, and `linear` of that, or `linear_silu_and_mul` if `gated`; and the residual stream with x,
    which may or may not be `norm.residual`, changed in place."""
    tile = _tile_of(x, weight, gated, space)
    if isinstance(tile, ResidentTile):
        out, residual = linear_resident(x, weight, tile, bias, norm, gated, dependent)
        if residual is not None:
            return out, residual
    normed = add_rms_norm(norm.residual, x, norm.weight, norm.eps, x.dtype, norm.kept)
    if gated:
        return linear_silu_and_mul(normed, weight, space, dependent), norm.residual
    return linear(normed, weight, bias, space, dependent), norm.residual


def _tile_of(x: Tensor, weight: Tensor, gated: bool, space: SplitSpace | None) -> AnyTile | None:
    """What serves a product, None for cuBLAS."""
    if not x.is_cuda or space is None:
        return None
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    tile = tile_for(x.shape[0], columns, weight.shape[1], gated, x.element_size())
    return None if isinstance(tile, WideTile) and not aligned(x) else tile


def linear_triton(
    x: Tensor,
    weight: Tensor,
    tile: LinearTile,
    bias: Tensor | None = None,
    space: SplitSpace | None = None,
    gated: bool = False,
    dependent: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear`, or `linear_silu_and_mul` if `gated`, with one tile for all rows. x's rows may be strided."""
    num_rows, size = x.shape
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    check_operands(x, weight)
    out = torch.empty((num_rows, columns), dtype=dtype or x.dtype, device=x.device)
    if num_rows == 0:
        return out
    dependent = dependent and may_overlap(x.device)
    rows = max(16, next_power_of_2(num_rows)) if not tile.swap else max(8, next_power_of_2(num_rows))
    tiles = ceil_div(columns, tile.columns)
    if tile.splits > 1:
        halves = 2 if gated else 1
        needed = tiles * tile.splits * halves * rows * tile.columns
        check_space(space, needed, tiles, f"split {tile.splits} times")
    _linear_kernel[(tiles, tile.splits)](
        x,
        weight,
        TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]) if tile.bulk else weight,
        weight if bias is None else bias,
        out,
        out if space is None else space.partials,
        out if space is None else space.arrivals,
        num_rows,
        columns,
        x.stride(0),
        SIZE=size,
        ROWS=rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        SPLITS=tile.splits,
        STAGES=tile.stages,
        SWAP=tile.swap,
        BULK=tile.bulk,
        GATED=gated,
        BIAS=bias is not None,
        EVEN=columns % tile.columns == 0 and size % (tile.depth * tile.splits) == 0,
        DEPENDENT=dependent,
        PREFETCH=tile.prefetch if dependent else 0,
        num_warps=tile.warps,
        **overlap_option(dependent),
    )
    return out


@jit
def _multiply(x: tl.tensor, w: tl.tensor, acc: tl.tensor, SWAP: tl.constexpr) -> tl.tensor:
    """acc plus x wᵀ [ROWS, COLUMNS], or its transpose: a matrix unit wants 64 rows of its first operand."""
    if SWAP:
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@jit
def _add_parts(partials_ptr: tl.tensor, place: tl.tensor, SPLITS: tl.constexpr, STRIDE: tl.constexpr) -> tl.tensor:
    total = tl.load(partials_ptr + place, cache_modifier=".cg")
    for part in tl.static_range(1, SPLITS):
        total += tl.load(partials_ptr + part * STRIDE + place, cache_modifier=".cg")
    return total


@jit
def _linear_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    blocks: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    arrivals_ptr: tl.tensor,
    num_rows: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    SWAP: tl.constexpr,
    BULK: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,
) -> None:
    """A tile of all rows and some columns, over a part of K, a program. The accumulator is transposed if SWAP.

    `blocks` is W's tensor descriptor if BULK: its blocks come by the tensor memory accelerator, zeros past its end.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.arange(0, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    # A multiple of DEPTH for each part.
    share: tl.constexpr = (SIZE + SPLITS * DEPTH - 1) // (SPLITS * DEPTH) * DEPTH
    begin = part * share
    w_ptrs = weight_ptr + column.to(tl.int64)[:, None] * SIZE + depth[None, :]
    up = tl.cast(columns, tl.int64) * SIZE
    if PREFETCH > 0:
        line = tl.arange(0, PREFETCH // 64)
        w_lines = weight_ptr + column.to(tl.int64)[:, None] * SIZE + begin + line[None, :] * 64
        prefetch(w_lines)
        if GATED:
            prefetch(w_lines + up)
    if DEPENDENT:
        gdc_wait()
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * x_stride + depth[None, :]
    if SWAP:
        acc = tl.zeros((COLUMNS, ROWS), tl.float32)
        acc_up = tl.zeros((COLUMNS, ROWS), tl.float32)
    else:
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        acc_up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(begin, begin + share, DEPTH, num_stages=STAGES):
        within = (start + depth < SIZE)[None, :]
        if EVEN:
            x = tl.load(x_ptrs + start, mask=(row < num_rows)[:, None], other=0.0)
        else:
            x = tl.load(x_ptrs + start, mask=(row < num_rows)[:, None] & within, other=0.0)
        if BULK:
            w = blocks.load([tile * COLUMNS, start])
        elif EVEN:
            w = tl.load(w_ptrs + start)
        else:
            w = tl.load(w_ptrs + start, mask=(column < columns)[:, None] & within, other=0.0)
        acc = _multiply(x, w, acc, SWAP)
        if GATED:
            if BULK:
                w_up = blocks.load([columns + tile * COLUMNS, start])
            elif EVEN:
                w_up = tl.load(w_ptrs + up + start)
            else:
                w_up = tl.load(w_ptrs + up + start, mask=(column < columns)[:, None] & within, other=0.0)
            acc_up = _multiply(x, w_up, acc_up, SWAP)
    if DEPENDENT:
        gdc_launch_dependents()
    if SWAP:
        r = row[None, :]
        c = column[:, None]
    else:
        r = row[:, None]
        c = column[None, :]

    ours = True
    if SPLITS > 1:
        # [tiles, half, part, COLUMNS, ROWS]
        size: tl.constexpr = COLUMNS * ROWS
        halves: tl.constexpr = 2 if GATED else 1
        first = partials_ptr + tile.to(tl.int64) * (halves * SPLITS * size)
        place = (c - tile * COLUMNS) * ROWS + r
        tl.store(first + part * size + place, acc)
        if GATED:
            tl.store(first + (SPLITS + part) * size + place, acc_up)
        # All threads' parts must be out before this program says that it is done.
        tl.debug_barrier()
        ours = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if ours:
            tl.store(arrivals_ptr + tile, 0)
            acc = _add_parts(first, place, SPLITS, size)
            if GATED:
                acc_up = _add_parts(first + SPLITS * size, place, SPLITS, size)
    if ours:
        if BIAS:
            acc += tl.load(bias_ptr + c, mask=c < columns, other=0.0).to(tl.float32)
        if GATED:
            acc = acc / (1.0 + tl.exp(-acc)) * acc_up
        out = out_ptr + r.to(tl.int64) * columns + c
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(r < num_rows) & (c < columns))
