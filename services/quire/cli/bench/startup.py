"""`quire bench startup`: how long it takes from the start of a process to the first token, and where the time goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from quire.cli.bench.flags import check_counts, engine_parser
from quire.cli.bench.report import JsonFile, Report, Spread, begin, finish
from quire.cli.flags import Parser
from quire.service.errors import ConfigError, ModelError
from quire.service.interrupts import DeferredInterrupt

# The process's exit status for a ConfigError.
CONFIG_STATUS = 2

_EXAMPLES = """\
  quire bench startup
      the embedded model, three processes one after another
  quire bench startup ./llama-8b --load-format dummy --max-model-len 4096
      on a GPU each with an empty kernel cache, then each with a filled one"""

_DESCRIPTION = """\
Starts processes that load the model and draw one token. On a GPU first each
with an empty kernel cache (cold), then with what the last of them has left
(warm); your own cache is not touched. The model's file may be in the system's
memory from the second process on."""

_COLUMNS = {"name": "", "cold": "cold, s", "warm": "warm, s"}
_CPU_COLUMNS = {"name": "", "warm": "s"}


def main(argv: list[str]) -> int:
    """Prints the table; 130 after Ctrl-C. Raises QuireError."""
    arguments = startup_parser().parse_args(argv)
    check_counts(arguments, "input_len")
    report, out = begin("startup", argv, arguments, _COLUMNS)
    return _run(argv, arguments.rounds, report, out)


def startup_parser() -> Parser:
    """Its flags, which the processes are given, too."""
    parser = engine_parser("startup", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("--input-len", type=int, default=8, metavar="TOKENS", help="of the prompt (default: 8)")
    return parser


def _run(argv: Sequence[str], rounds: int, report: Report, out: JsonFile | None) -> int:
    cold: list[dict[str, float]] = []
    warm: list[dict[str, float]] = []
    try:
        with (
            tempfile.TemporaryDirectory(prefix="quire-bench-") as folder,
            tqdm(total=2 * rounds, desc="processes", leave=False, disable=None) as bar,
        ):
            while len(warm) < rounds:
                is_cold = len(cold) < rounds
                found = _first_token(argv, Path(folder, f"kernels-{min(len(cold), rounds - 1)}"))
                report.model, report.device = found["model"], found["device"]
                if report.device["kind"] == "cpu":
                    # There are no kernels to compile.
                    is_cold, bar.total, report.columns = False, rounds, _CPU_COLUMNS
                (cold if is_cold else warm).append(found["phases"])
                bar.update()
    except KeyboardInterrupt:
        report.stopped = True
    for phase in [*cold, *warm][0] if cold or warm else ():
        report.add(name=phase, cold=_spread(phase, cold), warm=_spread(phase, warm))
    return finish(report, out)


def _spread(phase: str, runs: Sequence[dict[str, float]]) -> Spread | None:
    return Spread.of(run[phase] for run in runs) if runs else None


def _first_token(argv: Sequence[str], kernels: Path) -> dict[str, Any]:
    """What a process says that keeps its kernels in `kernels`. Raises ConfigError or ModelError with its reason."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(kernels / "triton"), "CUDA_CACHE_PATH": str(kernels / "cuda")}
    command = [sys.executable, "-m", "quire.cli.bench.first_token", str(time.monotonic()), *argv]
    with DeferredInterrupt() as interrupt:
        # Cut in two this would leave a process that nobody knows of.
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        if interrupt.requested:
            raise KeyboardInterrupt
        said, errors = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        reason = errors.strip().splitlines()
        kind = ConfigError if process.returncode == CONFIG_STATUS else ModelError
        raise kind(reason[-1] if reason else f"the process ended with status {process.returncode}")
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found
