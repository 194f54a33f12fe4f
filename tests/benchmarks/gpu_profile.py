"""Where the GPU's time goes in some steps of a run."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch


class Profile:
    """A meter's `each_step`: prints which kernels `steps` steps after the first `skip` ran, and how much of their time
    the GPU was idle."""

    def __init__(self, skip: int, steps: int) -> None:
        self._skip, self._steps = skip, steps
        self._seen = 0
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        self._profiler = torch.profiler.profile(activities=activities)

    def __call__(self) -> None:
        self._seen += 1
        if self._seen == self._skip:
            self._profiler.start()
        elif self._seen == self._skip + self._steps:
            torch.cuda.synchronize()
            self._profiler.stop()
            self._print()

    def _print(self) -> None:
        events, steps = self._profiler.events(), self._steps
        kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
        busy, end = 0.0, spans[0][0]
        for start, stop_at in spans:
            busy += max(0.0, stop_at - max(start, end))
            end = max(end, stop_at)
        whole = end - spans[0][0]
        print(f"GPU: {whole / steps / 1e3:.3f} ms a step, idle {100 * (1 - busy / whole):.1f}%")
        print_gaps(kernels, steps)
        by_name: dict[str, tuple[float, int]] = {}
        for event in kernels:
            total, count = by_name.get(event.name, (0.0, 0))
            by_name[event.name] = (total + event.time_range.elapsed_us(), count + 1)
        for name, (total, count) in sorted(by_name.items(), key=lambda item: -item[1][0])[:22]:
            print(f"  {total / steps:9.1f} µs a step {count / steps:7.1f} × {total / count:8.2f} µs  {name[:100]}")


def print_gaps(kernels: list[Any], steps: int) -> None:
    """Between which kernels the GPU waits."""
    gaps: dict[tuple[str, str], tuple[float, int]] = {}
    ordered = sorted(kernels, key=lambda event: event.time_range.start)
    for before, after in pairwise(ordered):
        gap = after.time_range.start - before.time_range.end
        if gap > 0:
            names = (before.name[:40], after.name[:40])
            total, count = gaps.get(names, (0.0, 0))
            gaps[names] = (total + gap, count + 1)
    for names, (total, count) in sorted(gaps.items(), key=lambda item: -item[1][0])[:8]:
        print(f"  waits {total / steps:8.1f} µs a step {count / steps:6.1f} × {total / count:7.2f} µs  {names}")
