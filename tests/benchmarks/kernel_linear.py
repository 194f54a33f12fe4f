"""Finds the tiles that suit products of up to 384 rows on this GPU, and where cuBLAS is better.

    PYTHONPATH=kernels python tests/benchmarks/kernel_linear.py --out figures
    PYTHONPATH=kernels python tests/benchmarks/kernel_linear.py --model qwen3-0.6b --rows 1 2 4 8 --resident
    PYTHONPATH=kernels python tests/benchmarks/kernel_linear.py --wide --model llama-8b \\
        --matrix qkv --matrix o --matrix gate_up --matrix down --out figures

For every matrix of the models and every number of rows: cuBLAS, the tile that is best where launches are dependent
(programmatic dependent launch), in µs and in TB/s of weights, and what it takes without; the limit; then the lines of
`quire.kernels.linear_tiles.TUNED`, which --table writes into that file.
Products follow one another in a CUDA graph as in a model, of matrices that take turns until several times the L2 cache
has been read. Each result is checked once. Candidates are compiled by several processes first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing.pool import AsyncResult
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from gpu_timing import graph_us, summary
from kernel_cases import DTYPE, SHAPES, Shape, error_ratio, random, turns
from torch import Tensor
from wide_tiles import MULTIPROCESSORS, limit_s, wide_candidates

from quire.kernels.linear import SplitSpace, linear_triton
from quire.kernels.linear_resident import linear_resident
from quire.kernels.linear_tiles import TUNED, AnyTile, LinearTile, ResidentTile, tile_for
from quire.kernels.linear_wide import Cut, linear_wide
from quire.kernels.silu_and_mul import silu_and_mul

FEW_ROWS = (1, 2, 4, 8, 16, 32, 64)
WIDE_ROWS = (64, 96, 128, 192, 256, 320, 384)
SHARED_BYTES = 225_000
RESIDENT_BYTES = 24 << 20
# Seconds, for all candidates.
COMPILATION_S = 120
# So many of the fastest candidates are timed again.
FINALISTS = 3
# A tile must be faster than cuBLAS by this much to be worth an entry.
GAIN = 0.01


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight of a model; of a gated one `columns` is half of its rows."""

    name: str
    columns: int
    size: int
    gated: bool = False

    @property
    def num_bytes(self) -> int:
        return self.columns * self.size * 2 * (2 if self.gated else 1)

    def limit_us(self, rows: int) -> float:
        """What reading W takes on an H200, or the arithmetic if that is longer."""
        return self.num_bytes * limit_s(rows) * 1e6

    def cublas(self, x: Tensor, weight: Tensor) -> Tensor:
        out = F.linear(x, weight)
        return silu_and_mul(out) if self.gated else out


def matrices(shape: Shape) -> list[Matrix]:
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_size
    return [
        Matrix("qkv", heads, shape.hidden),
        Matrix("o", shape.hidden, shape.heads * shape.head_size),
        Matrix("gate_up", shape.intermediate, shape.hidden, gated=True),
        Matrix("down", shape.hidden, shape.intermediate),
        Matrix("head", shape.vocab, shape.hidden),
    ]


def padded(rows: int, swap: bool) -> int:
    return max(8 if swap else 16, 1 << (rows - 1).bit_length())


def few_candidates(matrix: Matrix, rows: int) -> Iterator[LinearTile]:
    """Tiles with 60 to 220 KB in flight on a multiprocessor, and programs enough to fill the GPU but no more parts."""
    halves = 2 if matrix.gated else 1
    for columns, depth in ((16, 256), (16, 512), (32, 128), (32, 256), (64, 128), (64, 256), (128, 128)):
        for stages in (3, 4, 6):
            for swap in (False, True):
                used = (halves * columns + padded(rows, swap)) * depth * 2 * (stages - 1)
                if not 60_000 <= used <= SHARED_BYTES or (swap and columns < 64):
                    continue
                for splits in (1, 2, 4, 8):
                    programs = -(-matrix.columns // columns) * splits
                    if matrix.size // splits < 2 * depth or programs < MULTIPROCESSORS * 0.7:
                        continue
                    if splits > 1 and programs > 4 * MULTIPROCESSORS:
                        continue
                    # The accelerator pays where tiles are wide.
                    for bulk in (False, True) if columns >= 64 else (False,):
                        yield LinearTile(columns, depth, stages, splits=splits, swap=swap, bulk=bulk)


def resident_candidates(matrix: Matrix, rows: int) -> Iterator[ResidentTile]:
    """Tiles of up to 256 elements of W a thread, if all of W fits the registers."""
    if rows > 16 or matrix.num_bytes > RESIDENT_BYTES:
        return
    row = (1 << (matrix.size - 1).bit_length()) * (2 if matrix.gated else 1)
    for warps in (1, 2, 4, 8):
        for columns in (1, 2, 4, 8, 16, 32):
            if columns * row > 256 * 32 * warps:
                continue
            if rows <= 8 and matrix.columns // columns >= MULTIPROCESSORS // 2:
                yield ResidentTile(columns, warps)
            if columns >= 16:
                yield ResidentTile(columns, warps, dots=True)


def candidates(matrix: Matrix, rows: int, wide_only: bool, resident_only: bool) -> list[AnyTile]:
    """The tile in use first, then those for few rows, and those for more; or only the last, or only those whose weights
    are in registers."""
    found: list[AnyTile | None] = [tile_for(rows, matrix.columns, matrix.size, matrix.gated)]
    if rows <= 64 and not wide_only:
        found += [*(() if resident_only else few_candidates(matrix, rows)), *resident_candidates(matrix, rows)]
    if resident_only:
        return list(dict.fromkeys(tile for tile in found if tile is not None))
    if 32 < rows <= 64:
        # All of x at once and two warp groups.
        splits = 1 << (2 * MULTIPROCESSORS * 128 // matrix.columns).bit_length() - 1
        found += [
            LinearTile(128, 64, stages, 8, splits=max(1, splits // fewer), swap=swap, bulk=True)
            for fewer, stages in ((2, 8), (1, 4))
            for swap in (False, True)
            if not matrix.gated
        ]
    if rows > 32:
        found += wide_candidates(matrix.columns, matrix.size, matrix.gated, rows)
    return list(dict.fromkeys(tile for tile in found if tile is not None))


def multiply(
    matrix: Matrix, x: Tensor, weight: Tensor, tile: AnyTile, space: SplitSpace, dependent: bool = True
) -> Tensor:
    if isinstance(tile, LinearTile):
        return linear_triton(x, weight, tile, space=space, gated=matrix.gated, dependent=dependent)
    if isinstance(tile, ResidentTile):
        return linear_resident(x, weight, tile, gated=matrix.gated, dependent=dependent)[0]
    out = linear_wide(x, weight, tile, space=space, gated=matrix.gated and tile.gated, dependent=dependent)
    return silu_and_mul(out) if matrix.gated and not tile.gated else out


def compiled_for(matrix: Matrix, rows: int, tile: AnyTile) -> tuple[object, ...]:
    """What differs for the compiler; of sizes that are arguments only whether they are 1 or multiples of 16."""
    if isinstance(tile, LinearTile):
        return matrix.size, matrix.gated, matrix.columns % 128 == 0, padded(rows, tile.swap), rows == 1, tile
    if isinstance(tile, ResidentTile):
        return matrix.size, matrix.gated, matrix.columns % tile.columns == 0, rows, tile
    fused = matrix.gated and tile.gated
    cut = Cut.of(tile, rows, matrix.columns if fused or not matrix.gated else 2 * matrix.columns, matrix.size)
    counts = tuple((count % 16 == 0, count == 1) for count in (rows, cut.tiles, cut.share))
    return matrix.size, fused, cut.parts, counts, replace(tile, programs=1)


def compile_tile(task: tuple[Matrix, int, AnyTile]) -> str:
    """Fills Triton's cache on disk: runs the tile once."""
    matrix, rows, tile = task
    try:
        weight = torch.empty(matrix.num_bytes // 2 // matrix.size, matrix.size, device="cuda", dtype=DTYPE)
        x = torch.zeros(rows, matrix.size, device="cuda", dtype=DTYPE)
        multiply(matrix, x, weight, tile, SplitSpace.new(x.device))
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - a tile that does not fit the GPU is out
        return summary(error)
    return ""


def outcomes(results: dict[tuple[object, ...], AsyncResult[str]]) -> dict[tuple[object, ...], str]:
    """Why each did not compile, "" where it did: one that takes its process with it never answers."""
    stop = time.monotonic() + COMPILATION_S
    failures = {}
    for name, result in results.items():
        try:
            failures[name] = result.get(max(0.0, stop - time.monotonic()))
        except multiprocessing.TimeoutError:
            failures[name] = "not compiled in time"
    return failures


@dataclass(frozen=True, slots=True)
class Figure:
    """What one matrix takes at one number of rows."""

    model: str
    matrix: Matrix
    rows: int
    cublas_us: float
    us: float
    dependent_us: float
    tile: AnyTile
    tried: list[tuple[float, AnyTile]]  # all tiles' µs where launches are dependent, the fastest first

    def __str__(self) -> str:
        m = self.matrix
        rate = [m.num_bytes / us * 1e-6 if us else 0.0 for us in (self.cublas_us, self.us, self.dependent_us)]
        return (
            f"{self.model:11} {m.name:8} {m.columns:6}×{m.size:<6} {self.rows:4}"
            f"{self.cublas_us:9.1f} {rate[0]:5.2f}{self.us:9.1f} {rate[1]:5.2f}{self.dependent_us:9.1f} {rate[2]:5.2f}"
            f"{m.limit_us(self.rows):9.1f}  {self.tile}"
        )


HEADER = (
    f"{'model':11} {'matrix':8} {'N':>6}×{'K':6} {'rows':>4}{'cuBLAS µs':>10} {'TB/s':>4}{'best µs':>9} {'TB/s':>5}"
    f"{'dep. µs':>9} {'TB/s':>5}{'limit µs':>9}  tile"
)


def measure(model: str, matrix: Matrix, rows: int, tiles: list[AnyTile], replays: int) -> Figure:
    copies = [random(matrix.num_bytes // 2 // matrix.size, matrix.size) for _ in turns(matrix.num_bytes)]
    copies = [weight.mul_(matrix.size**-0.5) for weight in copies]
    x = random(rows, matrix.size)
    space = SplitSpace.new(x.device)
    exact = matrix.cublas(x.double(), copies[0].double()) if not matrix.gated else gated_exactly(x, copies[0])
    by_torch = matrix.cublas(x, copies[0])
    cublas_us = graph_us([lambda w=w: matrix.cublas(x, w) for w in copies])

    def launches(tile: AnyTile, dependent: bool) -> list[Callable[[], object]]:
        return [lambda w=w: multiply(matrix, x, w, tile, space, dependent) for w in copies]

    tried: list[tuple[float, AnyTile]] = []
    for tile in tiles:
        try:
            out = multiply(matrix, x, copies[0], tile, space)
            if error_ratio(out, exact, by_torch) > 2:
                print("WRONG", matrix, rows, tile, flush=True)
                continue
            tried.append((graph_us(launches(tile, True), replays=replays, at_least=16), tile))
        except Exception as error:  # noqa: BLE001 - as above
            print(matrix, rows, tile, summary(error), flush=True)
    tried.sort(key=lambda pair: pair[0])
    best = min(((graph_us(launches(tile, True)), tile) for _, tile in tried[:FINALISTS]), key=lambda pair: pair[0])
    us = graph_us(launches(best[1], False))
    return Figure(model, matrix, rows, cublas_us, us, best[0], best[1], tried)


def gated_exactly(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = F.linear(x.double(), weight.double()).chunk(2, -1)
    return F.silu(gate) * up


def tuned_lines(figures: list[Figure]) -> Iterator[str]:
    """The lines of `TUNED`: for each matrix its tiles by number of rows, cuBLAS where that is as fast.

    For fewer rows than were measured, down to half, and for other matrices they are what is in the table already.
    """
    table = {key: list(entries) for key, entries in TUNED.items()}
    by_matrix: dict[Matrix, list[Figure]] = {}
    for figure in figures:
        by_matrix.setdefault(figure.matrix, []).append(figure)
    for matrix, those in by_matrix.items():
        key = matrix.columns, matrix.size, matrix.gated
        entries = fewer_rows(table.get(key, []), min(figure.rows for figure in those))
        for figure in sorted(those, key=lambda figure: figure.rows):
            tile = figure.tile if figure.dependent_us < figure.cublas_us * (1 - GAIN) else None
            if entries and entries[-1][1] == tile:
                entries.pop()
            entries.append((figure.rows, tile))
        table[key] = entries
    for key, entries in table.items():
        yield f"    {key}: ("
        for rows, tile in entries:
            yield f"        ({rows}, {spelled(tile) if tile else None}),"
        yield "    ),"


def fewer_rows(entries: list[tuple[int, AnyTile | None]], rows: int) -> list[tuple[int, AnyTile | None]]:
    """What a table has for at most rows / 2."""
    kept: list[tuple[int, AnyTile | None]] = []
    for most, tile in entries:
        kept.append((min(most, rows // 2), tile))
        if most >= rows // 2:
            break
    return kept if rows > 1 else []


def spelled(tile: AnyTile) -> str:
    """How the table has a tile: its sizes by place, and by name what differs from the default."""
    values = {
        field.name: getattr(tile, field.name) for field in fields(tile) if getattr(tile, field.name) != field.default
    }
    by_place = ("columns", "depth", "stages") if isinstance(tile, LinearTile) else tuple(values)[:6]
    places = [str(values.pop(name)) for name in by_place]
    return f"{type(tile).__name__}({', '.join(places + [f'{name}={value}' for name, value in values.items()])})"


def write_table(path: Path, lines: list[str]) -> None:
    """Puts the lines into `linear_tiles.py` in place of its table."""
    before, rest = path.read_text().split("] = {", 1)
    path.write_text("\n".join([before + "] = {", *lines, rest[rest.index("}\n") :]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[shape.name for shape in SHAPES], action="append")
    parser.add_argument("--rows", type=int, nargs="+", help="(default: 1 to 384, with --wide 64 to 384)")
    parser.add_argument("--wide", action="store_true", help="only the tiles in use, and those for more than 32 rows")
    parser.add_argument("--resident", action="store_true", help="only the tiles in use, and those of registers")
    parser.add_argument("--matrix", action="append", help="qkv, o, gate_up, down, head; may be repeated")
    parser.add_argument("--replays", type=int, default=5, help="of a candidate (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write kernel_linear.json and .txt")
    parser.add_argument("--table", type=Path, help="linear_tiles.py, to write the lines into")
    parser.add_argument("--processes", type=int, default=14, help="that compile (default: %(default)s)")
    args = parser.parse_args()
    models = args.model or ["llama-8b", "qwen3-0.6b"]
    started = time.monotonic()
    work = [
        (shape.name, matrix, rows)
        for shape in SHAPES
        if shape.name in models
        for matrix in matrices(shape)
        if not args.matrix or matrix.name in args.matrix
        for rows in args.rows or (WIDE_ROWS if args.wide else sorted({*FEW_ROWS, *WIDE_ROWS}))
    ]
    tiles = {(matrix, rows): candidates(matrix, rows, args.wide, args.resident) for _, matrix, rows in work}
    tasks = {compiled_for(*key, tile): (*key, tile) for key, some in tiles.items() for tile in some}
    with multiprocessing.get_context("spawn").Pool(args.processes) as workers:
        failures = outcomes({name: workers.apply_async(compile_tile, (task,)) for name, task in tasks.items()})
    for name, failure in failures.items():
        if failure:
            print(tasks[name], failure, flush=True)
    print(f"{len(tasks)} candidates compiled after {time.monotonic() - started:.0f} s", flush=True)
    print(HEADER, flush=True)
    figures = []
    for model, matrix, rows in work:
        usable = [tile for tile in tiles[matrix, rows] if not failures[compiled_for(matrix, rows, tile)]]
        try:
            figures.append(measure(model, matrix, rows, usable, args.replays))
        except Exception as error:  # noqa: BLE001 - no tile fits, or the GPU is lost: what there is counts
            print(matrix, rows, summary(error), flush=True)
            continue
        print(figures[-1], flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "kernel_linear.json").write_text(json.dumps([asdict(figure) for figure in figures], indent=1))
        torch.cuda.empty_cache()
    lines = list(tuned_lines(figures))
    if args.table:
        write_table(args.table, lines)
    print("\n".join(lines))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.monotonic() - started:.0f} s in all")
    if args.out:
        (args.out / "kernel_linear.txt").write_text("\n".join([HEADER, *map(str, figures), *lines, ""]))


if __name__ == "__main__":
    main()
