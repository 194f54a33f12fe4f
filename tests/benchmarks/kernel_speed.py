"""Checks each Triton kernel against its definition on a GPU and times it against what the GPU can do at most.

    PYTHONPATH=kernels python tests/benchmarks/kernel_speed.py --out figures
    PYTHONPATH=kernels python tests/benchmarks/kernel_speed.py --kernel paged_attention

Needs torch with CUDA, Triton, and nothing else; attention is also compared with what other implementations are there.
Each kernel runs in a process of its own, so that one that fails, hangs or corrupts its CUDA context costs no other
kernel's figures.

A kernel is launched some dozens of times in one CUDA graph, over inputs that take turns so that large ones do not stay
in the cache, and the median replay counts. The ceiling is the largest of three times: what the bytes that must move
take at the speed of a large copy or reduction in the same process, what the operations take at the speed of a large
product, and what an empty kernel takes in such a graph.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import triton
from attention_cases import attention_plan_cases, paged_attention_cases
from gpu_timing import Ceilings, graph_us, measure_ceilings, summary
from kernel_cases import (
    SHAPES,
    Case,
    Shape,
    add_rms_norm_cases,
    rms_norm_cases,
    rotary_and_write_cases,
    silu_and_mul_cases,
    token_mask_cases,
)
from sampling_cases import adjust_cases, logprobs_cases, sample_cases

KERNELS: dict[str, Callable[[Shape], Iterator[Case]]] = {
    "rms_norm": rms_norm_cases,
    "add_rms_norm": add_rms_norm_cases,
    "silu_and_mul": silu_and_mul_cases,
    "rotary_and_write": rotary_and_write_cases,
    "token_mask": token_mask_cases,
    "sample": sample_cases,
    "adjust": adjust_cases,
    "logprobs": logprobs_cases,
    "attention_plan": attention_plan_cases,
    "paged_attention": paged_attention_cases,
}


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table."""

    kernel: str
    model: str
    detail: str
    us: float = 0.0
    ceiling_us: float = 0.0
    tb_per_s: float = 0.0
    tflop_per_s: float = 0.0
    error: float = 0.0
    peers_us: dict[str, float] = field(default_factory=dict)
    peers_failed: dict[str, str] = field(default_factory=dict)
    failure: str = ""

    def __str__(self) -> str:
        share = f"{100 * self.ceiling_us / self.us:.0f}%" if self.us else "-"
        peers = ", ".join(f"{name} {us:.1f}" for name, us in self.peers_us.items())
        return (
            f"{self.kernel:17}{self.model:12}{self.detail:36}{self.us:9.1f}{self.ceiling_us:10.1f}{share:>7}"
            f"{self.tb_per_s:7.2f}{self.tflop_per_s:9.0f}{self.error:7.2f}  {peers} {self.failure}".rstrip()
        )


HEADER = (
    f"{'kernel':17}{'model':12}{'case':36}{'µs':>9}{'ceiling':>10}{'share':>7}{'TB/s':>7}{'TFLOP/s':>9}{'error':>7}"
    "  others, µs (error: over torch's in the same precision, at most 2)"
)


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
    peers_us, peers_failed = {}, {}
    for peer, make_launches in case.peers.items():
        try:
            peers_us[peer] = graph_us(make_launches())
        except Exception as peer_error:  # noqa: BLE001 - not every implementation serves every case
            peers_failed[peer] = summary(peer_error)
    return Row(
        kernel=name,
        model=case.model,
        detail=case.detail,
        us=us,
        ceiling_us=ceilings.best_us(case.num_bytes, case.flops),
        tb_per_s=case.num_bytes / us * 1e-6,
        tflop_per_s=case.flops / us * 1e-6,
        error=error,
        peers_us=peers_us,
        peers_failed=peers_failed,
        failure="" if error <= 2 else "WRONG",
    )


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
            print(rows[-1], flush=True)
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write kernel_speed.json and .txt")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # of the process of one kernel
    parser.add_argument("--timeout", type=float, default=150, help="seconds for each kernel (default: 150)")
    args = parser.parse_args()
    if args.rows:
        for row in run_kernel(args.kernel[0]):
            print(row, flush=True)
            with args.rows.open("a") as lines:
                lines.write(json.dumps(asdict(row)) + "\n")
        return
    started = time.monotonic()
    print(HEADER, flush=True)
    rows = [row for name in args.kernel or KERNELS for row in run_apart(name, args.timeout)]
    ceilings = measure_ceilings()
    last = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}: copy "
        f"{ceilings.copy_bytes_per_s * 1e-12:.2f} TB/s, reduction {ceilings.read_bytes_per_s * 1e-12:.2f} TB/s, "
        f"product {ceilings.flops_per_s * 1e-12:.0f} TFLOP/s, empty kernel {ceilings.launch_us:.2f} µs; "
        f"{time.monotonic() - started:.0f} s in all"
    )
    print(last, flush=True)
    if args.out:
        figures = {
            "device": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "triton": triton.__version__},
            "ceilings": asdict(ceilings),
            "rows": [asdict(row) for row in rows],
        }
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "kernel_speed.json").write_text(json.dumps(figures, indent=1))
        (args.out / "kernel_speed.txt").write_text("\n".join([HEADER, *map(str, rows), last, ""]))


if __name__ == "__main__":
    main()
