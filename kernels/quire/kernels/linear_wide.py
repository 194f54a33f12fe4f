"""Products y = x Wᵀ of more rows than one tile has: from some 64 to 384 of them, where W is still most of the time.

A tile of outputs is some rows by some columns. Tiles by their number seldom fill the GPU evenly, so what is divided
evenly is the work: the programs of a row of tiles each take as many blocks of K, wherever tiles begin and end
(Stream-K: Osama et al., 2023). The last of those that share a tile adds the parts, always in the same order, so the
same batch gives the same bits. Programs that need the same part of W are next to each other, so W is read once.

Launches overlap as in `quire.kernels.linear`.
"""
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels._triton import (
    TensorDescriptor,
    ceil_div,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    may_overlap,
    overlap_option,
    tl,
)
from quire.kernels.linear_parts import SplitSpace, check_operands, check_space, prefetch
from quire.kernels.linear_tiles import WideTile

# The tensor memory accelerator wants addresses and strides to be multiples of so many bytes.
_ALIGNMENT = 16


def aligned(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can bring blocks of x, [M, K]."""
    row_bytes = x.stride(0) * x.element_size()
    return x.stride(1) == 1 and row_bytes % _ALIGNMENT == 0 and x.data_ptr() % _ALIGNMENT == 0


@dataclass(frozen=True, slots=True)
class Cut:
    """What becomes of a product with a tile."""

    row_tiles: int
    tiles: int  # in each of the rows of tiles
    share: int  # blocks of K that a program has
    programs: int  # of each row of tiles
    parts: bool  # whether programs meet within a tile

    @classmethod
    def of(cls, tile: WideTile, num_rows: int, columns: int, size: int) -> Cut:
        """For [num_rows, size] × [columns, size]ᵀ, or that twice where it is gated."""
        row_tiles, tiles = ceil_div(num_rows, tile.rows), ceil_div(columns, tile.columns)
        blocks = ceil_div(size, tile.depth)
        share = ceil_div(tiles * blocks, max(1, tile.programs // row_tiles))
        return cls(row_tiles, tiles, share, ceil_div(tiles * blocks, share), share % blocks != 0)

    def partials(self, tile: WideTile, gated: bool) -> int:
        """Elements for parts: a program may begin and end within a tile."""
        return 2 * self.row_tiles * self.programs * (2 if gated else 1) * tile.rows * tile.columns


def linear_wide(
    x: Tensor,
    weight: Tensor,
    tile: WideTile,
    bias: Tensor | None = None,
    space: SplitSpace | None = None,
    gated: bool = False,
    dependent: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`quire.kernels.linear.linear`, or `linear_silu_and_mul` if `gated`, by this kernel. x's rows may be strided.

    Raises ValueError where rows do not begin at multiples of 16 bytes, and where `space` does not hold the parts.
    """
    num_rows, size = x.shape
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    check_operands(x, weight)
    if not (aligned(x) and aligned(weight)):
        raise ValueError(f"rows must begin at multiples of {_ALIGNMENT} bytes: strides {x.stride()}, {weight.stride()}")
    out = torch.empty((num_rows, columns), dtype=dtype or x.dtype, device=x.device)
    if num_rows == 0:
        return out
    dependent = dependent and may_overlap(x.device)
    cut = Cut.of(tile, num_rows, columns, size)
    if cut.parts:
        how = f"cut among {cut.row_tiles} x {cut.programs} programs"
        check_space(space, cut.partials(tile, gated), cut.row_tiles * cut.tiles, how)
    _wide_kernel[(cut.row_tiles, cut.programs)](
        TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]),
        weight,
        weight if bias is None else bias,
        out,
        out if space is None else space.partials,
        out if space is None else space.arrivals,
        num_rows,
        columns,
        cut.tiles,
        cut.share,
        SIZE=size,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        STAGES=tile.stages,
        PARTS=cut.parts,
        GATED=gated,
        BIAS=bias is not None,
        DEPENDENT=dependent,
        PREFETCH=tile.prefetch if dependent else 0,
        num_warps=tile.warps,
        **overlap_option(dependent),
    )
    return out


@jit
def _multiply_blocks(
    x: tl.tensor,
    weight: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    up: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
) -> tl.tensor:
    """Products over blocks `begin` to `end` of K, [ROWS, COLUMNS] from `row` and `column` on, and from `up` if GATED.

    x and weight are tensor descriptors: past their ends are zeros.
    """
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc_up = acc
    for block in tl.range(begin, end, num_stages=STAGES):
        part = x.load([row, block * DEPTH])
        acc = tl.dot(part, weight.load([column, block * DEPTH]).T, acc, input_precision="ieee")
        if GATED:
            acc_up = tl.dot(part, weight.load([up, block * DEPTH]).T, acc_up, input_precision="ieee")
    return acc, acc_up


@jit
def _add_parts(ptrs: tl.tensor, parts: tl.tensor, STRIDE: tl.constexpr) -> tl.tensor:
    """A tile's parts, of which `ptrs` are the first program's slots: it ends there, and the others begin there."""
    total = tl.load(ptrs + STRIDE, cache_modifier=".cg")
    for part in tl.range(1, parts):
        total += tl.load(ptrs + part * (2 * STRIDE), cache_modifier=".cg")
    return total


@jit
def _wide_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    arrivals_ptr: tl.tensor,
    num_rows: tl.tensor,
    columns: tl.tensor,
    tiles: tl.tensor,
    share: tl.tensor,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,
) -> None:
    """Program p has blocks p · share to (p + 1) · share - 1 of a row of tiles, in the order of tiles, then of K."""
    row = tl.program_id(0) * ROWS
    program = tl.program_id(1)
    blocks: tl.constexpr = (SIZE + DEPTH - 1) // DEPTH
    halves: tl.constexpr = 2 if GATED else 1
    size: tl.constexpr = ROWS * COLUMNS
    first = program * share
    last = tl.minimum(first + share, tiles * blocks)
    r = row + tl.arange(0, ROWS)[:, None]
    if PREFETCH > 0:  # noqa: SIM102 - one of the two is known to the compiler
        # For all programs that need it.
        if row == 0:
            column = first // blocks * COLUMNS + tl.arange(0, COLUMNS)
            line = first % blocks * DEPTH + tl.arange(0, PREFETCH // 64) * 64
            lines = weight_ptr + tl.minimum(column, columns - 1).to(tl.int64)[:, None] * SIZE + line[None, :]
            prefetch(lines)
            if GATED:
                prefetch(lines + columns.to(tl.int64) * SIZE)
    if DEPENDENT:
        gdc_wait()
    # Addresses of results are not computed ahead of the loop: they would take 100 registers through all of it.
    for tile in tl.range(first // blocks, (last + blocks - 1) // blocks, disable_licm=True):
        begin = tl.maximum(first - tile * blocks, 0)
        end = tl.minimum(last - tile * blocks, blocks)
        column = tile * COLUMNS
        acc, acc_up = _multiply_blocks(
            x, weight, row, column, columns + column, begin, end,
            ROWS, COLUMNS, DEPTH, STAGES, GATED,
        )  # fmt: skip
        if DEPENDENT:  # noqa: SIM102 - as above
            if (tile + 1) * blocks >= last:
                gdc_launch_dependents()
        ours = True
        if PARTS:
            ours = end - begin == blocks
            if end - begin < blocks:
                first_program = tile * blocks // share
                parts = ((tile + 1) * blocks - 1) // share - first_program + 1
                # Two slots a program: of the tile that it begins within, and of the one that it ends within.
                slots = partials_ptr + tl.program_id(0).to(tl.int64) * tl.num_programs(1) * (2 * halves * size)
                slots += tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
                slot = 2 * program + (program == first_program).to(tl.int32)
                mine = slots + slot * (halves * size)
                tl.store(mine, acc)
                if GATED:
                    tl.store(mine + size, acc_up)
                # All threads' parts must be out before this program says that it is done.
                tl.debug_barrier()
                arrivals = arrivals_ptr + tl.program_id(0) * tiles + tile
                ours = tl.atomic_add(arrivals, 1, sem="acq_rel") == parts - 1
                if ours:
                    tl.store(arrivals, 0)
                    theirs = slots + first_program * (2 * halves * size)
                    acc = _add_parts(theirs, parts, halves * size)
                    if GATED:
                        acc_up = _add_parts(theirs + size, parts, halves * size)
        if ours:
            c = column + tl.arange(0, COLUMNS)[None, :]
            if BIAS:
                acc += tl.load(bias_ptr + c, mask=c < columns, other=0.0).to(tl.float32)
            if GATED:
                acc = acc / (1.0 + tl.exp(-acc)) * acc_up
            out = out_ptr + r.to(tl.int64) * columns + c
            tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(r < num_rows) & (c < columns))
