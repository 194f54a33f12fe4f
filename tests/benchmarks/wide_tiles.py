"""Which tiles `kernel_linear.py` tries for products of more than 32 rows: few, as arithmetic leaves few that may win.

What a multiprocessor has bounds them: 227 KiB of shared memory, of which a block of K takes (rows + columns) · depth
elements a stage; 64 Ki registers, of which the result takes rows · columns. Fewer than three stages leave no block on
its way while two are multiplied. And what the L2 cache can bring: W once for each row of tiles, x once for each column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from quire.kernels.linear_tiles import WideTile

MULTIPROCESSORS = 132
# Shared memory of a program where so many have to fit a multiprocessor.
SHARED_BYTES = {1: 230_000, 2: 114_000, 3: 75_000}
# What an H200 reads from memory, and from its L2 cache, and multiplies at most.
READ_BYTES_PER_S, CACHE_BYTES_PER_S, FLOPS_PER_S = 4.14e12, 6.5e12, 751e12
# How many times the limit a tile may take by what the cache brings, and by arithmetic with rows that are not there.
MOST_CACHE, MOST_PADDING = 2.3, 1.5

# (rows, columns of a half, warps)
_PLAIN = (
    (64, 64, 4),
    (64, 128, 4),
    (64, 128, 8),
    (64, 256, 8),
    (128, 64, 4),
    (128, 128, 4),
    (128, 128, 8),
    (128, 256, 8),
    (256, 64, 8),
    (256, 128, 8),
)
_GATED = ((64, 64, 4), (64, 64, 8), (64, 128, 8), (128, 64, 4), (128, 64, 8), (128, 128, 8), (256, 64, 8))


def wide_candidates(columns: int, size: int, gated: bool, rows: int) -> Iterator[WideTile]:
    """For [rows, size] × [columns, size]ᵀ; `columns` are those of a half where it is gated."""
    found: dict[WideTile, None] = {}
    for shape in _GATED if gated else _PLAIN:
        if _suits(shape[0], shape[1] * (2 if gated else 1), rows):
            found |= dict.fromkeys(_cuts(shape, 2 if gated else 1, columns, size, rows, True))
    # An activation of its own costs two more trips of the result: only with the largest tiles.
    for shape in _PLAIN if gated else ():
        if shape[0] * shape[1] >= min(128, rows) * 256 and _suits(*shape[:2], rows):
            found |= dict.fromkeys(_cuts(shape, 1, 2 * columns, size, rows, False))
    yield from found


def limit_s(rows: int) -> float:
    """Seconds a byte of W takes at least."""
    return max(1 / READ_BYTES_PER_S, rows / FLOPS_PER_S)


def _suits(tile_rows: int, columns: int, rows: int) -> bool:
    row_tiles = -(-rows // tile_rows)
    if tile_rows >= 2 * max(rows, 64):
        return False
    from_cache = (row_tiles + rows / columns) / CACHE_BYTES_PER_S
    arithmetic = row_tiles * tile_rows / FLOPS_PER_S
    return from_cache <= MOST_CACHE * limit_s(rows) and arithmetic <= MOST_PADDING * limit_s(rows)


def _cuts(
    shape: tuple[int, int, int], halves: int, columns: int, size: int, rows: int, fused: bool
) -> Iterator[WideTile]:
    """The ways to divide the work among one or two programs a multiprocessor, or whole tiles among programs."""
    tile_rows, tile_columns, warps = shape
    row_tiles, tiles = -(-rows // tile_rows), -(-columns // tile_columns)
    lines = tile_rows + halves * tile_columns
    # How many fit next to each other: threads of up to 32 outputs of a half, or 64 of a plain product's four warps,
    # have some 130 registers, others up to 255.
    few = tile_rows * tile_columns // (32 * warps) <= (64 if warps == 4 and halves == 1 else 32)
    most = {4: 3, 8: 2}[warps] if few else {4: 2, 8: 1}[warps]
    # One program with the memory for two: the next launch's begin while it ends.
    ways = [(1, SHARED_BYTES[1]), (1, SHARED_BYTES[2])] + [(fit, SHARED_BYTES[fit]) for fit in range(2, most + 1)]
    for fit, budget in ways:
        depth, stages = _stages(lines, budget)
        if stages >= 3:
            tile = WideTile(tile_rows, tile_columns, depth, stages, warps, fit * MULTIPROCESSORS, fused)
            yield tile
            if rows <= 128 and budget == SHARED_BYTES[2] and tile_columns >= 128:
                yield replace(tile, prefetch=512)
    whole = row_tiles * tiles
    for fit in range(most, 0, -1):
        depth, stages = _stages(lines, SHARED_BYTES[fit])
        rounds = -(-whole // (fit * MULTIPROCESSORS))
        if stages >= 3 and whole >= 0.7 * rounds * fit * MULTIPROCESSORS:
            yield WideTile(tile_rows, tile_columns, depth, stages, warps, whole, fused)


def _stages(lines: int, budget: int) -> tuple[int, int]:
    """Depth of a block and how many of them fit; long rows of W are read better."""
    for depth in (128, 64):
        stages = budget // (lines * depth * 2)
        if stages >= 4:
            return depth, min(stages, 6)
    return 64, budget // (lines * 64 * 2)
