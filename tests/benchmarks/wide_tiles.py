"""Which tiles `kernel_linear.py` tries for products of more than 32 rows: few, as arithmetic leaves few that may win.

What a multiprocessor has bounds them: 227 KiB of shared memory, of which a block of K takes (rows + columns) · depth
elements a stage; 64 Ki registers, of which the result takes rows · columns. Fewer than three stages leave no block on
its way while two are multiplied. And what the L2 cache can bring: W once for each row of tiles, x once for each column.
"""

from __future__ import annotations

from collections.abc import Iterator

from quire.kernels.linear_tiles import WideTile

MULTIPROCESSORS = 132
# Shared memory of a program where so many have to fit a multiprocessor.
SHARED_BYTES = {1: 230_000, 2: 114_000, 3: 75_000}
# Rows that tiles would have to have at most, of those that there are.
MOST_PADDING = 1.4

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
    seen: set[WideTile] = set()
    for fused in (True, False) if gated else (True,):
        of_tiles = columns if fused or not gated else 2 * columns
        halves = 2 if gated and fused else 1
        for shape in _GATED if halves == 2 else _PLAIN:
            if not _suits(shape, rows, plain_gate=gated and not fused):
                continue
            for tile in _cuts(shape, halves, of_tiles, size, rows, fused):
                if tile not in seen:
                    seen.add(tile)
                    yield tile


def _suits(shape: tuple[int, int, int], rows: int, plain_gate: bool) -> bool:
    tile_rows, columns, _ = shape
    row_tiles = -(-rows // tile_rows)
    if row_tiles * tile_rows > max(64, rows * MOST_PADDING):
        # W once beats rows for nothing, where rows are few.
        return tile_rows == 128 and 64 < rows <= 128
    # Small tiles of many rows read more from the L2 cache than it can bring.
    if rows > 128 and tile_rows * columns < 128 * 128:
        return tile_rows == 64 and columns == 128 and rows <= 192
    # An activation of its own costs two more trips of the result: only with large tiles.
    return not plain_gate or (tile_rows * columns >= 128 * 128 or (rows <= 64 and columns >= 128))


def _cuts(
    shape: tuple[int, int, int], halves: int, columns: int, size: int, rows: int, fused: bool
) -> Iterator[WideTile]:
    """The ways to divide the work among one or two programs a multiprocessor, or whole tiles among programs."""
    tile_rows, tile_columns, warps = shape
    row_tiles, tiles = -(-rows // tile_rows), -(-columns // tile_columns)
    lines = tile_rows + halves * tile_columns
    # Next to each other fit 16 warps of 128 registers a thread, of which the result takes most where four warps have
    # more than 64 columns.
    most = 1 if warps == 8 else 3 if tile_rows * tile_columns * halves <= 64 * 64 else 2
    # One program with the memory for two: the next launch's begin while it ends.
    ways = [(1, SHARED_BYTES[1]), (1, SHARED_BYTES[2])] + [(fit, SHARED_BYTES[fit]) for fit in range(2, most + 1)]
    for fit, budget in ways:
        depth, stages = _stages(lines, budget)
        if stages >= 3:
            yield WideTile(tile_rows, tile_columns, depth, stages, warps, fit * MULTIPROCESSORS, fused)
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
