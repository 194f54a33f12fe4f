"""How the benchmarks of GPU kernels time, and what they compare with."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this GPU can do at most, measured."""

    copy_bytes_per_s: float  # read plus written
    read_bytes_per_s: float
    flops_per_s: float  # of a large bf16 product of random numbers
    launch_us: float

    def best_us(self, num_bytes: float, flops: float = 0.0) -> float:
        moved = num_bytes / max(self.copy_bytes_per_s, self.read_bytes_per_s)
        return max(moved * 1e6, flops / self.flops_per_s * 1e6, self.launch_us)


def graph_us(launches: list[Callable[[], object]], replays: int = 15, at_least: int = 24) -> float:
    """Microseconds per launch, of the median replay of a graph of `at_least` launches, which take turns."""
    launches = launches * -(-at_least // len(launches))
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


@triton.jit
def _nothing() -> None:
    pass


def measure_ceilings() -> Ceilings:
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_us = graph_us([lambda: target.copy_(source)])
    numbers = source.view(torch.int32)
    # The maximum of whole numbers is the cheapest thing to compute over all of them.
    read_us = graph_us([lambda: numbers.amax()])
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_us = graph_us([lambda: a @ b], replays=3)
    return Ceilings(
        copy_bytes_per_s=2 * source.numel() / copy_us * 1e6,
        read_bytes_per_s=source.numel() / read_us * 1e6,
        flops_per_s=2 * size**3 / product_us * 1e6,
        launch_us=graph_us([lambda: _nothing[(1,)]()] * 100),
    )


def summary(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"[:100]
