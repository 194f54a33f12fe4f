"""`quire bench prefix`: what prefix caching is worth where prompts begin alike, and what it costs where they don't."""

from __future__ import annotations

import argparse
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

from quire.cli.bench.flags import check_counts, check_fits, engine_parser
from quire.cli.bench.report import Report, Spread
from quire.cli.bench.workloads import Lengths, Work
from quire.cli.flags import Parser
from quire.service.errors import ConfigError

if TYPE_CHECKING:
    from quire.cli.bench.engine import BenchEngine
    from quire.cli.bench.meter import Run
    from quire.engine.core import EngineCore

_EXAMPLES = """\
  quire bench prefix
      requests that share 2,048 tokens, without caching, with it, and again
  quire bench prefix --requests 64 --prefix-len 500 --suffix-len 30
      a system prompt of 500 tokens
  quire bench prefix --rounds 10
      its cost without hits is small: more rounds tell it from noise"""

_COLUMNS = {
    "name": "",
    "output_tokens_per_second": "output tok/s",
    "total_tokens_per_second": "all tok/s",
    "first_token_ms": "first token ms",
    "hit_rate": "hit rate",
    "ratio": "speed",
}


def main(argv: list[str]) -> int:
    """Prints the table; 130 after Ctrl-C. Raises QuireError."""
    arguments = _parser().parse_args(argv)
    check_counts(arguments, "requests", "prefix_len", "suffix_len", "output_len")
    if not arguments.prefix_caching:
        raise ConfigError("--no-prefix-caching is set, and this measures prefix caching: leave it out")

    def measure(engine: BenchEngine, report: Report) -> None:
        tokens = arguments.prefix_len + arguments.suffix_len + arguments.output_len
        check_fits("--prefix-len, --suffix-len and --output-len", tokens, engine.ready.max_model_len)
        count = arguments.requests or (256 if engine.on_gpu else 16)
        _shared(engine, report, arguments, count)
        _apart(engine, report, arguments, count)

    # Torch takes its time to be imported, and --help needs none.
    from quire.cli.bench.engine import run_benchmark

    return run_benchmark("prefix", argv, arguments, _COLUMNS, measure)


def _parser() -> Parser:
    parser = engine_parser("prefix", "Prefix caching, with prompts that begin alike and without.", _EXAMPLES)
    add = parser.add_argument
    add("--requests", type=int, metavar="N", help="at once (default: 16, on a GPU 256)")
    add("--prefix-len", type=int, default=2048, metavar="TOKENS", help="that all share (default: %(default)s)")
    add("--suffix-len", type=int, default=64, metavar="TOKENS", help="of each prompt's own (default: %(default)s)")
    add("--output-len", type=int, default=64, metavar="TOKENS", help="that follow (default: %(default)s)")
    return parser


@contextmanager
def prefix_caching(core: EngineCore, *, enabled: bool) -> Generator[None]:
    """An idle core with or without prefix caching."""
    config = core.scheduler.config
    core.scheduler.config = replace(config, enable_prefix_caching=enabled)
    try:
        yield
    finally:
        core.scheduler.config = config


def compare_caching(engine: BenchEngine, work: Work, rounds: int) -> tuple[list[Run], list[Run]]:
    """Runs of prompts that share nothing, without prefix caching and with it; who goes first takes turns."""
    found: dict[bool, list[Run]] = {False: [], True: []}
    for index in range(2 * rounds):
        enabled = index % 4 in (1, 2)
        with prefix_caching(engine.core, enabled=enabled):
            label = f"nothing shared, caching {'on' if enabled else 'off'}, round {index // 2 + 1}/{rounds}"
            found[enabled].append(engine.run(work, label))
    return found[False], found[True]


def _shared(engine: BenchEngine, report: Report, arguments: argparse.Namespace, count: int) -> None:
    work = engine.workloads.shared_prefix(
        count, arguments.prefix_len, arguments.suffix_len, arguments.output_len, arguments.seed + 2
    )
    # The first compiles and captures, and is not counted.
    engine.run([job._replace(output_len=min(16, job.output_len)) for job in work], "shared prefix, warm-up")
    off, cold, warm = [], [], []
    for index in range(arguments.rounds):
        told = f"round {index + 1}/{arguments.rounds}"
        with prefix_caching(engine.core, enabled=False):
            off.append(engine.run(work, f"shared prefix, caching off, {told}"))
        fresh = engine.fresh(work)
        cold.append(engine.meter.run(fresh, f"shared prefix, cold, {told}"))
        warm.append(engine.meter.run(fresh, f"shared prefix, warm, {told}"))
    for name, runs in (("caching off", off), ("cold", cold), ("warm: the same again", warm)):
        report.add(part="shared", **_row(f"{count} that share {arguments.prefix_len}, {name}", runs, off))


def _apart(engine: BenchEngine, report: Report, arguments: argparse.Namespace, count: int) -> None:
    # Prefill weighs more than in most loads, and with it what caching costs.
    prompt = Lengths(max(1, arguments.prefix_len // 10), max(1, arguments.prefix_len // 2))
    output = Lengths(max(1, arguments.output_len // 2), arguments.output_len)
    work = engine.workloads.mixed(count, prompt, output, arguments.seed)
    engine.run(work, "nothing shared, warm-up")
    off, on = compare_caching(engine, work, arguments.rounds)
    for name, runs in (("caching off", off), ("caching on", on)):
        report.add(part="apart", **_row(f"{count} that share nothing, {name}", runs, off))


def _row(name: str, runs: list[Run], base: list[Run]) -> dict[str, str | float | Spread]:
    """`base` are the runs, round by round, that count as speed 1."""
    return {
        "name": name,
        "seconds": Spread.of(run.seconds for run in runs),
        "output_tokens_per_second": Spread.of(run.output_tokens_per_second for run in runs),
        "total_tokens_per_second": Spread.of(run.total_tokens_per_second for run in runs),
        "first_token_ms": Spread.of(1e3 * median(run.first_tokens) for run in runs),
        "hit_rate": sum(run.cached_tokens for run in runs) / sum(run.input_tokens for run in runs),
        "ratio": Spread.of(before.seconds / run.seconds for before, run in zip(base, runs, strict=True)),
    }
