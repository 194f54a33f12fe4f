"""The engine that `quire bench` measures, and one benchmark of it from start to end."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from quire.cli.bench.meter import Meter, Run
from quire.cli.bench.report import Report, begin, finish
from quire.cli.bench.workloads import Work, Workloads
from quire.engine.core import EngineCore
from quire.engine.flags import core_config
from quire.engine.loading import MakeMasks, load_core
from quire.engine.messages import Ready
from quire.engine.runner import DeviceInfo
from quire.llm.suffix_drafts import SuffixDrafts
from quire.service.request import Constraint

# Requests of one benchmark come at once, and there may be any number.
MAX_WAITING = 1 << 30


@dataclass(slots=True)
class BenchEngine:
    """A core in this process, ready to be measured."""

    core: EngineCore
    ready: Ready
    meter: Meter
    workloads: Workloads
    _shifts: int = 0

    @property
    def on_gpu(self) -> bool:
        """Whether the model runs on one."""
        return self.ready.device.device != "cpu"

    def run(self, work: Work, label: str, constraint: Constraint | None = None) -> Run:
        """Measures `work` with prompts that no cache holds: as it is the first time, then with other tokens."""
        fresh = self.fresh(work)
        return self.meter.run(fresh, label, constraint)

    def fresh(self, work: Work) -> Work:
        """`work` with other tokens than before."""
        self._shifts += 1
        return self.workloads.shifted(work, self._shifts - 1)


@contextmanager
def open_engine(
    arguments: argparse.Namespace, make_masks: MakeMasks | None = None, *, capture: bool = True
) -> Generator[BenchEngine]:
    """Loads the model, under a progress bar; if `capture`, with all CUDA graphs. Raises ConfigError, ModelError."""
    config = core_config(arguments, model=arguments.model, max_waiting=MAX_WAITING)
    make_drafts = None if config.speculative_model else SuffixDrafts
    with tqdm(total=1.0, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}", leave=False, disable=None) as bar:

        def show(done: float, activity: str) -> None:
            bar.set_description(activity, refresh=False)
            bar.update(done - bar.n)

        loaded = load_core(config, show, make_masks, make_drafts)
        core, ready = loaded.core, loaded.ready
        try:
            if capture:
                bar.set_description("capturing graphs")
                began = time.perf_counter()
                while core.prepare():
                    pass
                ready.start_seconds["graphs"] = time.perf_counter() - began
            bar.close()
            yield BenchEngine(core, ready, Meter(core), Workloads(core.vocab_size))
        finally:
            core.close()


def run_benchmark(
    action: str,
    argv: Sequence[str],
    arguments: argparse.Namespace,
    columns: Mapping[str, str],
    measure: Callable[[BenchEngine, Report], None],
    make_masks: MakeMasks | None = None,
) -> int:
    """Has `measure` add rows to a report and prints it, what there is of it after Ctrl-C, too; the exit status.

    Raises QuireError.
    """
    report, out = begin(action, argv, arguments, columns)
    with open_engine(arguments, make_masks) as engine:
        report.model, report.device = engine.ready.model, describe(engine.ready.device)
        report.start_seconds = engine.ready.start_seconds
        try:
            measure(engine, report)
        except KeyboardInterrupt:
            report.stopped = True
    return finish(report, out)


def describe(info: DeviceInfo) -> dict[str, Any]:
    """The device, as a reader of numbers wants to know it."""
    about: dict[str, Any] = {"kind": "cpu", "name": _processor(), "dtype": info.dtype, "threads": info.threads}
    about["cores"] = os.cpu_count()
    if info.device != "cpu":
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        about |= {"kind": "cuda", "name": gpu.name, "memory_bytes": gpu.total_memory, "cuda": torch.version.cuda}
    return about


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
