"""Finds the tiles that suit products of few rows on this GPU, and from how many rows on cuBLAS is better.

    PYTHONPATH=kernels python tests/benchmarks/kernel_linear.py --out figures
    PYTHONPATH=kernels python tests/benchmarks/kernel_linear.py --model qwen3-0.6b --rows 1 8

For every matrix of the models and every number of rows: cuBLAS, the tile that is best where launches are dependent
(programmatic dependent launch), in µs and in TB/s of weights, and what it takes without; then the lines of
`quire.kernels.linear_tiles.TUNED`, which --table writes into that file.
Matrices take turns until several times the L2 cache has been read, in a CUDA graph. Each result is checked once.
Candidates are compiled by several processes first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from gpu_timing import graph_us, summary
from kernel_cases import DTYPE, SHAPES, Shape, error_ratio, random, turns
from torch import Tensor

from quire.kernels.linear import SplitSpace, linear_triton
from quire.kernels.linear_tiles import LinearTile
from quire.kernels.silu_and_mul import silu_and_mul

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
SHARED_BYTES = 225_000
MULTIPROCESSORS = 132
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


def candidates(matrix: Matrix, rows: int) -> Iterator[LinearTile]:
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


def compile_tile(task: tuple[Matrix, int, LinearTile]) -> str:
    """Fills Triton's cache on disk: runs the tile once."""
    matrix, rows, tile = task
    try:
        weight = torch.empty(matrix.num_bytes // 2 // matrix.size, matrix.size, device="cuda", dtype=DTYPE)
        x = torch.zeros(rows, matrix.size, device="cuda", dtype=DTYPE)
        linear_triton(x, weight, tile, space=SplitSpace.new(x.device), gated=matrix.gated, dependent=True)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - a tile that does not fit the GPU is out
        return summary(error)
    return ""


@dataclass(frozen=True, slots=True)
class Figure:
    """What one matrix takes at one number of rows."""

    model: str
    matrix: Matrix
    rows: int
    cublas_us: float
    us: float
    dependent_us: float
    tile: LinearTile | None

    def __str__(self) -> str:
        m = self.matrix
        rate = [m.num_bytes / us * 1e-6 if us else 0.0 for us in (self.cublas_us, self.us, self.dependent_us)]
        return (
            f"{self.model:11} {m.name:8} {m.columns:6}×{m.size:<6} {self.rows:4}"
            f"{self.cublas_us:9.1f} {rate[0]:5.2f}{self.us:9.1f} {rate[1]:5.2f}{self.dependent_us:9.1f} {rate[2]:5.2f}"
            f"  {self.tile}"
        )


HEADER = (
    f"{'model':11} {'matrix':8} {'N':>6}×{'K':6} {'rows':>4}{'cuBLAS µs':>10} {'TB/s':>4}{'best µs':>9} {'TB/s':>5}"
    f"{'dep. µs':>9} {'TB/s':>5}  tile"
)


def measure(model: str, matrix: Matrix, rows: int, broken: set[LinearTile], replays: int) -> Figure:
    copies = [random(matrix.num_bytes // 2 // matrix.size, matrix.size) for _ in turns(matrix.num_bytes)]
    copies = [weight.mul_(matrix.size**-0.5) for weight in copies]
    x = random(rows, matrix.size)
    space = SplitSpace.new(x.device)
    exact = matrix.cublas(x.double(), copies[0].double()) if not matrix.gated else gated_exactly(x, copies[0])
    by_torch = matrix.cublas(x, copies[0])
    cublas_us = graph_us([lambda w=w: matrix.cublas(x, w) for w in copies])

    def launches(tile: LinearTile, dependent: bool) -> list[Callable[[], object]]:
        return [
            lambda w=w: linear_triton(x, w, tile, space=space, gated=matrix.gated, dependent=dependent) for w in copies
        ]

    best: tuple[float, LinearTile | None] = (float("inf"), None)
    for tile in candidates(matrix, rows):
        if tile in broken:
            continue
        try:
            out = linear_triton(x, copies[0], tile, space=space, gated=matrix.gated, dependent=True)
            if error_ratio(out, exact, by_torch) > 2:
                print("WRONG", matrix, rows, tile, flush=True)
                continue
            us = graph_us(launches(tile, True), replays=replays, at_least=8)
        except Exception as error:  # noqa: BLE001 - as above
            print(matrix, rows, tile, summary(error), flush=True)
            continue
        best = min(best, (us, tile), key=lambda pair: pair[0])
    if best[1] is None:
        return Figure(model, matrix, rows, cublas_us, 0.0, 0.0, None)
    us, dependent_us = (graph_us(launches(best[1], dependent)) for dependent in (False, True))
    return Figure(model, matrix, rows, cublas_us, us, dependent_us, best[1])


def gated_exactly(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = F.linear(x.double(), weight.double()).chunk(2, -1)
    return F.silu(gate) * up


def tuned_lines(figures: list[Figure]) -> Iterator[str]:
    """The entries of `TUNED`: for each matrix its tiles by number of rows, cuBLAS where that is as fast."""
    by_matrix: dict[Matrix, list[Figure]] = {}
    for figure in figures:
        by_matrix.setdefault(figure.matrix, []).append(figure)
    for matrix, those in by_matrix.items():
        entries: list[tuple[int, str]] = []
        for figure in sorted(those, key=lambda figure: figure.rows):
            wins = figure.tile is not None and figure.dependent_us < figure.cublas_us * (1 - GAIN)
            text = spelled(figure.tile) if wins and figure.tile else "None"
            if entries and entries[-1][1] == text:
                entries.pop()
            entries.append((figure.rows, text))
        inner = ", ".join(f"({rows}, {text})" for rows, text in entries)
        yield f"    ({matrix.columns}, {matrix.size}, {matrix.gated}): ({inner},),"


def spelled(tile: LinearTile) -> str:
    options = "".join(
        f", {name}={getattr(tile, name)}"
        for name, default in (("splits", 1), ("swap", False), ("bulk", False))
        if getattr(tile, name) != default
    )
    return f"LinearTile({tile.columns}, {tile.depth}, {tile.stages}{options})"


def write_table(path: Path, lines: list[str]) -> None:
    """Puts the lines into `linear_tiles.py` in place of its table."""
    before, rest = path.read_text().split("] = {", 1)
    path.write_text("\n".join([before + "] = {", *lines, rest[rest.index("}\n") :]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[shape.name for shape in SHAPES], action="append")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
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
        for rows in args.rows
    ]
    # What differs for the compiler: the padded rows, and K; N only by its divisibility.
    tasks = {
        (matrix.size, matrix.gated, matrix.columns % 128 == 0, padded(rows, tile.swap), rows == 1, tile): (
            matrix,
            rows,
            tile,
        )
        for _, matrix, rows in work
        for tile in candidates(matrix, rows)
    }
    broken: dict[tuple[Matrix, int], set[LinearTile]] = {}
    with multiprocessing.get_context("spawn").Pool(args.processes) as workers:
        for task, failure in zip(tasks.values(), workers.map(compile_tile, tasks.values(), chunksize=4), strict=True):
            if failure:
                broken.setdefault(task[:2], set()).add(task[2])
                print(task, failure, flush=True)
    print(f"{len(tasks)} candidates compiled after {time.monotonic() - started:.0f} s", flush=True)
    print(HEADER, flush=True)
    figures = []
    for model, matrix, rows in work:
        figures.append(measure(model, matrix, rows, broken.get((matrix, rows), set()), args.replays))
        print(figures[-1], flush=True)
        torch.cuda.empty_cache()
    lines = list(tuned_lines(figures))
    if args.table:
        write_table(args.table, lines)
    print("\n".join(lines))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.monotonic() - started:.0f} s in all")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "kernel_linear.json").write_text(json.dumps([asdict(figure) for figure in figures], indent=1))
        (args.out / "kernel_linear.txt").write_text("\n".join([HEADER, *map(str, figures), *lines, ""]))


if __name__ == "__main__":
    main()
