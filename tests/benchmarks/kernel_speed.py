"""Checks each Triton kernel against its definition on a GPU and times it against the memory's speed.

    PYTHONPATH=kernels python tests/benchmarks/kernel_speed.py --json kernel_speed.json
    PYTHONPATH=kernels python tests/benchmarks/kernel_speed.py --kernel rms_norm

Needs torch with CUDA, Triton, and nothing else. Each kernel runs in a process of its own, so that one that fails, hangs
or corrupts its CUDA context costs no other kernel's figures.

A kernel is launched some dozens of times in one CUDA graph, over inputs that take turns so that large ones do not stay
in the cache, and the median replay counts. The ceiling is the larger of two times: what the bytes that must move take
at the speed of a large copy in the same process, and what an empty kernel takes in such a graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from quire.kernels.rms_norm import add_rms_norm, rms_norm
from quire.kernels.rotary import rotary_table
from quire.kernels.rotary_and_write import HeadNorm, rotary_and_write
from quire.kernels.silu_and_mul import silu_and_mul
from quire.kernels.token_mask import apply_token_mask

PAGE_SIZE = 16
DTYPE = torch.bfloat16
EPS = 1e-5
# Inputs of a kernel take turns until this much has been touched: several times any GPU's L2 cache.
ROTATED_BYTES = 400e6
TOKENS = (1, 16, 256, 2048, 8192)


@dataclass(frozen=True, slots=True)
class Shape:
    """A published model's sizes, in elements."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    qk_norm: bool = False


SHAPES = (
    Shape("llama-8b", 4096, 14336, 32, 8, 128, 128256),
    Shape("llama-1b", 2048, 8192, 32, 8, 64, 128256),
    Shape("qwen3-0.6b", 1024, 3072, 16, 8, 128, 151936, qk_norm=True),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel on one input: what must move, how to launch it on each of several inputs, and whether it is right."""

    model: str
    detail: str
    num_bytes: float
    launches: list[Callable[[], object]]
    check: Callable[[], float]  # its error over torch's in the same precision: at most 2, or it is wrong


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table."""

    kernel: str
    model: str
    detail: str
    us: float = 0.0
    ceiling_us: float = 0.0
    tb_per_s: float = 0.0
    error: float = 0.0
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this GPU can do at most, measured."""

    copy_bytes_per_s: float  # read plus written
    launch_us: float

    def best_us(self, num_bytes: float) -> float:
        return max(num_bytes / self.copy_bytes_per_s * 1e6, self.launch_us)


def turns(num_bytes: float) -> range:
    """How many sets of inputs take turns."""
    return range(max(1, min(48, int(ROTATED_BYTES / num_bytes) + 1)))


def error_ratio(out: Tensor, exact: Tensor, by_torch: Tensor) -> float:
    """The greatest error of `out` over that of torch in the same type; NaN and unwritten elements make it infinite."""
    error = (out.double() - exact).abs().max().item()
    allowed = (by_torch.double() - exact).abs().max().item()
    slack = 1e-6 * exact.abs().max().item()
    return error / (allowed + slack) if error == error else float("inf")


def random(*size: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*size, device="cuda", dtype=dtype)


def rms_norm_cases(shape: Shape) -> Iterator[Case]:
    weight = random(shape.hidden)
    for tokens in TOKENS:
        num_bytes = tokens * shape.hidden * (4 + 2)
        inputs = [random(tokens, shape.hidden, dtype=torch.float32) for _ in turns(num_bytes)]

        def check(x: Tensor = inputs[0]) -> float:
            def norm(x: Tensor) -> Tensor:
                return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.to(x.dtype)

            return error_ratio(rms_norm(x, weight, EPS, DTYPE), norm(x.double()), norm(x).to(DTYPE))

        launches = [lambda x=x: rms_norm(x, weight, EPS, DTYPE) for x in inputs]
        yield Case(shape.name, f"{tokens} tokens", num_bytes, launches, check)


def add_rms_norm_cases(shape: Shape) -> Iterator[Case]:
    weight = random(shape.hidden)
    for residual_dtype in (torch.float32, DTYPE) if shape is SHAPES[0] else (torch.float32,):
        for tokens in TOKENS:
            num_bytes = tokens * shape.hidden * (2 * residual_dtype.itemsize + 2 + 2)
            inputs = [
                (random(tokens, shape.hidden, dtype=residual_dtype), random(tokens, shape.hidden))
                for _ in turns(num_bytes)
            ]

            def check(residual: Tensor = inputs[0][0], x: Tensor = inputs[0][1]) -> float:
                def norm(x: Tensor) -> Tensor:
                    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.to(x.dtype)

                total = (residual.float() + x.float()).to(residual.dtype)
                kept = residual.clone()
                out = add_rms_norm(kept, x, weight, EPS, DTYPE)
                ratio = error_ratio(out, norm(total.double()), norm(total.float()).to(DTYPE))
                return ratio if torch.equal(kept, total) else float("inf")

            launches = [lambda r=r, x=x: add_rms_norm(r, x, weight, EPS, DTYPE) for r, x in inputs]
            residual_name = "f32" if residual_dtype is torch.float32 else "bf16"
            yield Case(shape.name, f"{tokens} tokens, {residual_name} residual", num_bytes, launches, check)


def silu_and_mul_cases(shape: Shape) -> Iterator[Case]:
    for tokens in TOKENS:
        num_bytes = tokens * shape.intermediate * 3 * 2
        inputs = [random(tokens, 2 * shape.intermediate) for _ in turns(num_bytes)]

        def check(x: Tensor = inputs[0]) -> float:
            def activate(x: Tensor) -> Tensor:
                gate, up = x.chunk(2, -1)
                return torch.nn.functional.silu(gate) * up

            return error_ratio(silu_and_mul(x), activate(x.double()), activate(x.float()).to(DTYPE))

        launches = [lambda x=x: silu_and_mul(x) for x in inputs]
        yield Case(shape.name, f"{tokens} tokens", num_bytes, launches, check)


def rotary_and_write_cases(shape: Shape) -> Iterator[Case]:
    size, num_positions = shape.head_size, 8192
    table = rotary_table(num_positions, 1.0 / 5e5 ** (torch.arange(0, size, 2) / size)).cuda()
    norm = HeadNorm(random(size), random(size), EPS) if shape.qk_norm else None
    for tokens in TOKENS:
        num_bytes = tokens * 2 * (shape.heads + 2 * shape.kv_heads) * size * 2
        pages = torch.empty(2, tokens // PAGE_SIZE + 4, shape.kv_heads, PAGE_SIZE, size, device="cuda", dtype=DTYPE)
        inputs = [random(tokens, shape.heads + 2 * shape.kv_heads, size) for _ in turns(num_bytes)]
        positions = torch.randint(0, num_positions, (tokens,), device="cuda")
        slots = torch.randperm(pages.shape[1] * PAGE_SIZE, device="cuda")[:tokens]

        def launch(x: Tensor, pages: Tensor = pages, positions: Tensor = positions, slots: Tensor = slots) -> Tensor:
            return rotary_and_write(x, positions, table, slots, pages[0], pages[1], norm)

        def check(
            x: Tensor = inputs[0],
            pages: Tensor = pages,
            positions: Tensor = positions,
            slots: Tensor = slots,
            launch: Callable[[Tensor], Tensor] = launch,
        ) -> float:
            pages.fill_(float("nan"))
            queries = launch(x)
            keys, values = (part[slots // PAGE_SIZE, :, slots % PAGE_SIZE] for part in pages)
            out = torch.cat((queries, keys, values), 1)
            exact, by_torch = (turned(x.to(dtype), table[positions].to(dtype), norm, shape) for dtype in PRECISIONS)
            return error_ratio(out, exact, by_torch.to(DTYPE))

        launches = [lambda x=x, launch=launch: launch(x) for x in inputs]
        yield Case(shape.name, f"{tokens} tokens", num_bytes, launches, check)


PRECISIONS = (torch.float64, torch.float32)


def turned(x: Tensor, turn: Tensor, norm: HeadNorm | None, shape: Shape) -> Tensor:
    """Queries, keys and values [T, heads + 2 kv_heads, D] as attention wants them, in x's type."""
    rotated, values = x[:, : shape.heads + shape.kv_heads], x[:, shape.heads + shape.kv_heads :]
    if norm is not None:
        weights = (norm.query_weight, norm.key_weight)
        weight = torch.cat(
            [w.to(x.dtype).expand(n, -1) for w, n in zip(weights, (shape.heads, shape.kv_heads), strict=True)]
        )
        rotated = rotated * torch.rsqrt(rotated.square().mean(-1, keepdim=True) + norm.eps) * weight
    rotated = rotated * turn[:, 0] + rotated.roll(shape.head_size // 2, -1) * turn[:, 1]
    return torch.cat((rotated, values), 1)


def token_mask_cases(shape: Shape) -> Iterator[Case]:
    words = -(-shape.vocab // 32)
    for rows in (1, 16, 64, 256):
        # A grammar forbids nearly everything, so nearly all logits are written; none is read.
        num_bytes = rows * (words * 4 + shape.vocab * 4)
        masks = torch.randint(-(2**31), 2**31, (3, rows, words), device="cuda", dtype=torch.int32)
        masks = masks[0] & masks[1] & masks[2] & (torch.rand(rows, words, device="cuda") < 0.05)
        index = torch.arange(rows, device="cuda")
        inputs = [random(rows, shape.vocab, dtype=torch.float32) for _ in turns(num_bytes)]

        def check(logits: Tensor = inputs[0], masks: Tensor = masks, index: Tensor = index) -> float:
            expected = logits.cpu()
            apply_token_mask(expected, index.cpu(), masks.cpu())
            apply_token_mask(logits, index, masks)
            return 0.0 if torch.equal(logits.cpu(), expected) else float("inf")

        launches = [lambda x=x, masks=masks, index=index: apply_token_mask(x, index, masks) for x in inputs]
        yield Case(shape.name, f"{rows} rows", num_bytes, launches, check)


KERNELS: dict[str, Callable[[Shape], Iterator[Case]]] = {
    "rms_norm": rms_norm_cases,
    "add_rms_norm": add_rms_norm_cases,
    "silu_and_mul": silu_and_mul_cases,
    "rotary_and_write": rotary_and_write_cases,
    "token_mask": token_mask_cases,
}


@triton.jit
def _nothing() -> None:
    pass


def graph_us(launches: list[Callable[[], object]], replays: int = 15) -> float:
    """Microseconds per launch, of the median replay of a graph of at least 24 launches."""
    launches = launches * -(-24 // len(launches))
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(launches))
    return statistics.median(times)


def measure_ceilings() -> Ceilings:
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = graph_us([lambda: target.copy_(source)]) * 1e-6
    return Ceilings(2 * source.numel() / seconds, graph_us([lambda: _nothing[(1,)]()] * 100))


def run_kernel(name: str) -> Iterator[Row]:
    """Every case of a kernel, in this process."""
    ceilings = measure_ceilings()
    for shape in SHAPES:
        try:
            for case in KERNELS[name](shape):
                yield run_case(name, case, ceilings)
                torch.cuda.empty_cache()
        except Exception as error:  # noqa: BLE001 - whatever a kernel's compiler raises belongs into the table
            traceback.print_exc()
            yield Row(name, shape.name, "", failure=summary(error))


def run_case(name: str, case: Case, ceilings: Ceilings) -> Row:
    try:
        error = case.check()
        us = graph_us(case.launches)
    except Exception as error:  # noqa: BLE001 - as above
        traceback.print_exc()
        return Row(name, case.model, case.detail, failure=summary(error))
    return Row(
        kernel=name,
        model=case.model,
        detail=case.detail,
        us=us,
        ceiling_us=ceilings.best_us(case.num_bytes),
        tb_per_s=case.num_bytes / us * 1e-6,
        error=error,
        failure="" if error <= 2 else "WRONG",
    )


def summary(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"[:100]


def print_row(row: Row) -> None:
    share = f"{100 * row.ceiling_us / row.us:4.0f}%" if row.us else "    -"
    print(
        f"{row.kernel:17}{row.model:12}{row.detail:32}{row.us:9.1f}{row.ceiling_us:10.1f}{share:>8}{row.tb_per_s:8.2f}"
        f"{row.error:8.2f}  {row.failure}",
        flush=True,
    )


def print_header() -> None:
    head = f"{'kernel':17}{'model':12}{'case':32}{'µs':>9}{'ceiling':>10}{'share':>8}{'TB/s':>8}{'error':>8}"
    print(f"{head}  (error over torch's: at most 2)", flush=True)


def run_apart(name: str, timeout: float) -> list[Row]:
    """A kernel's cases in a process of their own; what it finished counts, however it ended."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        path.touch()
        command = [sys.executable, __file__, "--kernel", name, "--rows", str(path)]
        failure = ""
        try:
            code = subprocess.run(command, timeout=timeout, check=False).returncode
            failure = f"its process ended with {code}" if code else ""
        except subprocess.TimeoutExpired:
            failure = f"not done after {timeout:.0f} s"
        rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()]
        if failure:
            rows.append(Row(name, "", "", failure=failure))
            print_row(rows[-1])
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=KERNELS, help="only this one")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # of the process of one kernel
    parser.add_argument("--timeout", type=float, default=60, help="seconds for each kernel (default: 60)")
    args = parser.parse_args()
    started = time.monotonic()
    rows = []
    if args.rows:
        for row in run_kernel(args.kernel):
            print_row(row)
            with args.rows.open("a") as lines:
                lines.write(json.dumps(asdict(row)) + "\n")
        return
    print_header()
    for name in [args.kernel] if args.kernel else KERNELS:
        rows += run_apart(name, args.timeout)
    ceilings = measure_ceilings()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}: copy "
        f"{ceilings.copy_bytes_per_s * 1e-12:.2f} TB/s, empty kernel {ceilings.launch_us:.2f} µs; "
        f"{time.monotonic() - started:.0f} s in all",
        flush=True,
    )
    if args.json:
        figures = {
            "device": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "triton": triton.__version__},
            "ceilings": asdict(ceilings),
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
