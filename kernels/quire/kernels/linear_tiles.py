"""Which tile serves a product of few rows best, and from how many rows on cuBLAS does.

The table holds what tests/benchmarks/kernel_linear.py found and prints in this form; other shapes get a rule that suits
most of those in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from quire.kernels._triton import next_power_of_2


@dataclass(frozen=True, slots=True)
class LinearTile:
    """How `quire.kernels.linear` cuts a product."""

    columns: int  # outputs of a program
    depth: int  # of K, read at a time
    stages: int  # of `depth` each, in flight
    warps: int = 4
    splits: int = 1  # programs that share K
    swap: bool = False  # whether W is the first operand: its rows fill the matrix unit where x's are few
    bulk: bool = False  # whether blocks of W come by the tensor memory accelerator
    prefetch: int = 256  # elements of each row of W asked for before the wait, where the launch is dependent

    def __post_init__(self) -> None:
        for name, value in (("columns", self.columns), ("depth", self.depth), ("splits", self.splits)):
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} of a tile must be a power of two, and they are {self}")
        if self.bulk and max(self.columns, self.depth) > 256:
            raise ValueError(f"the tensor memory accelerator moves at most 256 rows of 256 elements: {self}")
        if self.columns < 16 or self.depth < 16:
            raise ValueError(f"columns and depth of a tile must be at least 16, and they are {self}")


@dataclass(frozen=True, slots=True)
class WideTile:
    """How `quire.kernels.linear_wide` cuts a product. Both operands come by the tensor memory accelerator."""

    rows: int  # of x, and so of the result
    columns: int  # of the result; of each half of a gated one
    depth: int  # of K, read at a time: a block
    stages: int  # of `depth` each, in flight
    warps: int
    programs: int  # that share the blocks evenly, about as many as the GPU has room for
    gated: bool = True  # whether the activation of a gated product is its end, and not another launch
    prefetch: int = 256  # elements of each row of W asked for before the wait, where the launch is dependent

    def __post_init__(self) -> None:
        for name, value in (("rows", self.rows), ("columns", self.columns), ("depth", self.depth)):
            if not 16 <= value <= 256 or value & (value - 1):
                raise ValueError(f"{name} of a tile must be a power of two from 16 to 256, and they are {self}")
        if self.programs < 1:
            raise ValueError(f"there must be programs: {self}")


@dataclass(frozen=True, slots=True)
class ResidentTile:
    """How `quire.kernels.linear_resident` cuts a product."""

    columns: int  # outputs of a program
    warps: int = 8
    dots: bool = False  # whether the matrix unit multiplies, for which there must be 16 columns or more

    def __post_init__(self) -> None:
        if self.columns < (16 if self.dots else 1) or self.columns & (self.columns - 1):
            raise ValueError(f"columns of a tile must be a power of two, and they are {self}")


AnyTile: TypeAlias = LinearTile | WideTile | ResidentTile

# (N, K, gated; N is of the result) → (most rows, tile) in ascending order; None: cuBLAS. For elements of two bytes.
TUNED: Mapping[tuple[int, int, bool], tuple[tuple[int, AnyTile | None], ...]] = {
    (6144, 4096, False): (
        (16, LinearTile(64, 256, 3, swap=True)),
        (32, LinearTile(64, 128, 6, swap=True, bulk=True)),
        (64, WideTile(64, 64, 128, 6, 4, 96)),
        (256, None),
        (320, WideTile(64, 256, 64, 5, 8, 120)),
        (384, None),
    ),
    (4096, 4096, False): (
        (16, LinearTile(64, 256, 4, splits=2, swap=True)),
        (64, LinearTile(32, 128, 6)),
        (384, None),
    ),
    (14336, 4096, True): (
        (16, LinearTile(64, 128, 4, swap=True, bulk=True)),
        (32, LinearTile(64, 128, 4, bulk=True)),
        (64, WideTile(64, 64, 128, 4, 4, 224)),
        (96, None),
        (128, WideTile(128, 128, 64, 4, 8, 112)),
        (384, None),
    ),
    (4096, 14336, False): (
        (16, LinearTile(64, 256, 4, splits=2, swap=True, bulk=True)),
        (64, LinearTile(32, 128, 6)),
        (384, None),
    ),
    (4096, 1024, False): (
        (1, ResidentTile(32)),
        (16, LinearTile(64, 128, 6, splits=2, swap=True)),
        (64, LinearTile(32, 128, 6)),
    ),
    (1024, 2048, False): (
        (1, ResidentTile(8)),
        (16, LinearTile(32, 256, 6, splits=4)),
        (64, LinearTile(16, 256, 4, splits=2)),
    ),
    (3072, 1024, True): (
        (1, ResidentTile(16)),
        (64, LinearTile(32, 128, 6)),
    ),
    (1024, 3072, False): (
        (1, ResidentTile(8)),
        (16, LinearTile(64, 128, 6, splits=8, swap=True)),
        (64, LinearTile(32, 256, 4, splits=4)),
    ),
}
# More rows than that are left to cuBLAS where nobody looked for a tile.
_UNTUNED_ROWS = 64
# Where a weight has less elements than that and nobody looked for its tile, cuBLAS is ahead from a few rows on.
_LARGE = 8 << 20
_FEW_ROWS = 4
# A GPU has about so many multiprocessors; fewer programs leave memory idle.
_FULL = 128
# Up to so many elements of K and bytes of a weight, all of it is in registers at once, so many bytes a thread. Each row
# takes its time there, and the rows of a small weight least.
_RESIDENT_SIZE, _RESIDENT_BYTES, _RESIDENT_THREAD = 8192, 16 << 20, 256
_RESIDENT_ROWS, _RESIDENT_SMALL_ROWS, _SMALL_BYTES = 1, 2, 4 << 20
# More rows of a small weight are for the matrix unit, with so many elements of K, of both halves if it is gated.
_DOTS_ROWS, _DOTS_SIZE, _DOTS = 16, 2048, ResidentTile(16, 4, dots=True)
# What stages of loads may take of the 227 KiB of shared memory that a program can have on a Hopper GPU.
_STAGE_BYTES = 192 << 10


def tile_for(rows: int, columns: int, size: int, gated: bool, element_size: int = 2) -> AnyTile | None:
    """The tile for [rows, size] × [columns, size]ᵀ of elements of so many bytes, None where cuBLAS is to be used."""
    for most, tile in TUNED.get((columns, size, gated), ()) if element_size == 2 else ():
        if rows <= most:
            return tile
    num_bytes = columns * size * element_size * (2 if gated else 1)
    is_small = num_bytes <= _SMALL_BYTES
    few_rows = _RESIDENT_SMALL_ROWS if is_small else _RESIDENT_ROWS
    if rows <= few_rows and size <= _RESIDENT_SIZE and num_bytes <= _RESIDENT_BYTES:
        return resident_tile(columns, size, gated, element_size)
    halves = 2 if gated else 1
    if rows <= _DOTS_ROWS and is_small and next_power_of_2(size) * halves <= _DOTS_SIZE and element_size == 2:
        return _DOTS
    if rows > _UNTUNED_ROWS or size < 512:
        return None
    if rows > _FEW_ROWS and columns * size * (2 if gated else 1) < _LARGE:
        return None
    width = 128 if columns >= 64 * _FULL else 64 if columns >= 64 * _FULL // 2 else 32
    if gated:
        width //= 2
    width = max(16, width)
    splits = 1
    while splits < 8 and -(-columns // width) * splits < _FULL and size // (2 * splits) >= 512:
        splits *= 2
    depth = 256 if width < 64 and element_size <= 2 else 128
    lines = max(16, next_power_of_2(rows)) + (2 if gated else 1) * width
    return LinearTile(width, depth, min(4, _STAGE_BYTES // (lines * depth * element_size)), splits=splits)


def resident_tile(columns: int, size: int, gated: bool, element_size: int = 2) -> ResidentTile:
    """As many outputs as registers have room for, less where that would leave multiprocessors without work."""
    warps = 8
    output_bytes = next_power_of_2(size) * element_size * (2 if gated else 1)
    width = max(1, 32 * warps * _RESIDENT_THREAD // output_bytes)
    while width > 1 and -(-columns // width) < _FULL:
        width //= 2
    return ResidentTile(width, warps)
