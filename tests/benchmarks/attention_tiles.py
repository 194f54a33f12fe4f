"""Finds the tiles that suit attention on this GPU: every candidate on decodes, verifications and prefill chunks.

    PYTHONPATH=kernels python tests/benchmarks/attention_tiles.py --out figures
    PYTHONPATH=kernels python tests/benchmarks/attention_tiles.py --steps --out figures
    PYTHONPATH=kernels python tests/benchmarks/attention_tiles.py --steps --only "1 new" --model qwen3-0.6b

Prints each workload's best five and the one in use; what to use is `decode_tile` and `prefill_tile` in
`quire.kernels.attention_worklist`. Candidates are compiled by several processes first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import attention_cases
import torch
from attention_cases import PagedInput, Workload
from gpu_timing import graph_us, summary
from kernel_cases import DTYPE, SHAPES, Shape

from quire.kernels.attention_worklist import Tile, decode_tile, prefill_tile
from quire.kernels.pool_type import FP8

# The load of a page's number is a stage of its own: two stages more are one block of keys and values more in flight.
_STAGES = (3, 5, 7)
DECODES = [
    Workload("1 decode at 4096", [(1, 4096)]),
    Workload("1 decode at 32768", [(1, 32768)]),
    Workload("8 decodes at 4096", [(1, 4096)] * 8),
    Workload("64 decodes at 1024", [(1, 1024)] * 64),
    Workload("256 decodes at 100-2000", [(1, length) for length in attention_cases.uneven(256)]),
]
# Steps of decodes alone, whose attention makes and writes their new keys and values, too.
STEPS = [
    Workload("1 new token at 300", [(1, 300)]),
    Workload("8 new tokens at 200-400", [(1, length) for length in attention_cases.uneven(8, 200, 400)]),
    Workload("64 new tokens at 480-720", [(1, length) for length in attention_cases.uneven(64, 480, 720)]),
    Workload("145 new tokens at 200-1900", [(1, length) for length in attention_cases.uneven(145, 200, 1900)]),
    Workload("256 new tokens at 700-1100", [(1, length) for length in attention_cases.uneven(256, 700, 1100)]),
]
VERIFICATIONS = [
    Workload("1 verification of 8 at 32768", [(8, 32768)], decode_query_len=8),
    Workload("64 verifications of 8 at 2048", [(8, 2048)] * 64, decode_query_len=8),
]
PREFILLS = [
    Workload("prefill 8192 of 8192", [(8192, 8192)]),
    Workload("prefill 2048 of 2048", [(2048, 2048)]),
    Workload("prefill 512 at 32768", [(512, 32768)]),
]


def decode_candidates(rows: int) -> Iterator[Tile]:
    for keys, warps in ((32, 2), (32, 4), (64, 2), (64, 4), (128, 4), (128, 8)):
        for stages in _STAGES:
            for programs in (2, 3, 4, 8):
                yield Tile(rows, keys, warps, stages, programs, 128)


def step_candidates(rows: int, num_seqs: int) -> Iterator[Tile]:
    """Small programs, of which more fit a multiprocessor at once: registers leave room for 12 warps, and 64 sequences
    of 8 KV heads are 512 programs, which should not be one and a half rounds. Of few sequences parts matter: each is a
    loop, and what is behind it to put them together."""
    if num_seqs <= 8:
        for keys, warps in ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8)):
            for stages in (2, 3, 5):
                for part in (64, 128, 256, 512):
                    if part >= keys:
                        yield Tile(rows, keys, warps, stages, 4, part)
        return
    for keys, warps in ((32, 1), (32, 2), (64, 2), (64, 4), (128, 2), (128, 4)):
        for stages in (3, 5):
            for programs in (4, 8, 12, 16):
                yield Tile(rows, keys, warps, stages, programs, 128)
                if stages == 3 and (keys, warps) in ((32, 2), (64, 4)):
                    # 16 warps, and nothing is spilled.
                    yield Tile(rows, keys, warps, stages, programs, 128, max_registers=128)


def prefill_candidates() -> Iterator[Tile]:
    for rows, warps in ((64, 4), (128, 8), (128, 4)):
        for keys in (32, 64, 128):
            for stages in (2, *_STAGES):
                for programs in (1, 2):
                    yield Tile(rows, keys, warps, stages, programs, 1024)


def compile_tile(task: tuple[Shape, tuple[int, ...], Tile, Tile, int, torch.dtype]) -> str:
    """Fills Triton's cache on disk: runs the tiles once on a small input of the same kind, 0 queries for new tokens."""
    shape, counts, decode, prefill, query_len, pool_type = task
    attention_cases.POOL_TOKENS = 1 << 14
    workload = Workload("", [(query_len, 4096), (query_len + 16, 4096)], decode_query_len=query_len)
    try:
        if query_len == 0:
            # Plans are compiled for the number of sequences.
            for count in counts:
                inputs = PagedInput(shape, Workload("", [(1, 32)] * count), (decode, prefill), pool_type)
                inputs.launches_with_new_tokens()[0]()
        else:
            PagedInput(shape, workload, (decode, prefill), pool_type).run(0)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - a tile that does not fit the GPU is out
        return summary(error)
    return ""


def sweep(
    shape: Shape,
    workloads: list[Workload],
    tiles: list[tuple[Tile, Tile]],
    which: int,
    pool_type: torch.dtype,
    new: bool = False,
) -> Iterator[dict[str, object]]:
    for workload in workloads:
        inputs = PagedInput(shape, workload, pool_type=pool_type)
        launches = inputs.launches_with_new_tokens() if new else inputs.launches()
        figures = []
        for index, pair in enumerate(tiles):
            try:
                inputs.use(pair)
                us = graph_us(launches, replays=5, at_least=12)
            except Exception as error:  # noqa: BLE001 - as above
                print(pair[which], summary(error), flush=True)
                continue
            figures.append((us, index))
        in_use = next(us for us, index in figures if index == 0)
        print(f"{workload.detail}: {in_use:.1f} µs in use, {inputs.num_bytes * 1e-6:.0f} MB", flush=True)
        for us, index in sorted(figures)[:5]:
            print(f"    {us:9.1f} µs  {tiles[index][which]}", flush=True)
        for us, index in figures:
            yield {"workload": workload.detail, "us": us, "in_use": index == 0, **asdict(tiles[index][which])}
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write attention_tiles.json")
    parser.add_argument("--steps", action="store_true", help="only steps of decodes, with their new tokens")
    parser.add_argument("--model", default=SHAPES[0].name, choices=[shape.name for shape in SHAPES])
    parser.add_argument("--fp8", action="store_true", help="keys and values in the pool as FP8")
    parser.add_argument("--only", default="", help="part of the workloads' names (default: all)")
    parser.add_argument("--processes", type=int, default=12, help="that compile (default: %(default)s)")
    args = parser.parse_args()
    started = time.monotonic()
    shape = next(shape for shape in SHAPES if shape.name == args.model)
    group, head_size, pool_type = shape.heads // shape.kv_heads, shape.head_size, FP8 if args.fp8 else DTYPE
    prefill, drafts = prefill_tile(head_size), decode_tile(group, 8)
    decode = decode_tile(group, 1)
    of_decodes = [(tile, prefill) for tile in (decode, *decode_candidates(decode.rows))]
    of_verifications = [(tile, prefill) for tile in (drafts, *decode_candidates(drafts.rows))]
    of_prefills = [(decode, tile) for tile in (prefill, *prefill_candidates())]
    # Workloads, tiles, which of a pair differs, queries of a sequence (see `compile_tile`)
    parts = []
    for step in STEPS:
        count = len(step.seqs)
        tiles = (decode_tile(group, 1, num_seqs=count), *step_candidates(decode.rows, count))
        parts.append(([step], [(tile, prefill) for tile in tiles], 0, 0))
    if not args.steps:
        parts += [(DECODES, of_decodes, 0, 1), (VERIFICATIONS, of_verifications, 0, 8), (PREFILLS, of_prefills, 1, 1)]
    parts = [([each for each in part[0] if args.only in each.detail], *part[1:]) for part in parts]
    parts = [part for part in parts if part[0]]
    tasks = {}
    for workloads, tiles, which, query_len in parts:
        counts = tuple(len(each.seqs) for each in workloads)
        for pair in tiles:
            kept = pair[which] if query_len == 0 else replace(pair[which], programs_per_sm=1, min_part=1024)
            tasks[counts, which, query_len, kept] = (shape, counts, *pair, query_len, pool_type)
    with multiprocessing.get_context("spawn").Pool(args.processes) as workers:
        for task, failure in zip(tasks.values(), workers.map(compile_tile, tasks.values(), chunksize=1), strict=True):
            if failure:
                print(task, failure, flush=True)
    print(f"{len(tasks)} candidates compiled after {time.monotonic() - started:.0f} s", flush=True)
    rows = [
        row
        for workloads, tiles, which, query_len in parts
        for row in sweep(shape, workloads, tiles, which, pool_type, new=query_len == 0)
    ]
    print(f"{time.monotonic() - started:.0f} s in all", flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "attention_tiles.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
