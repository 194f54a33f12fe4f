"""`quire bench latency`: how long a token takes when few requests run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import numpy as np

from quire.cli.bench.flags import check_counts, check_fits, engine_parser
from quire.cli.bench.report import Report, Spread
from quire.cli.flags import Parser

if TYPE_CHECKING:
    from quire.cli.bench.engine import BenchEngine

_EXAMPLES = """\
  quire bench latency
      1, 8 and 64 requests of 128 tokens for 256
  quire bench latency --batch 1 --input-len 1000 --output-len 32 --rounds 10
      one long prompt
  quire bench latency ./Llama-3.1-8B --batch 16 --input-len 2048 --output-len 1
      prefill alone"""

_COLUMNS = {
    "name": "requests",
    "prefill_tokens_per_second": "prefill tok/s",
    "first_token_ms_p50": "first token ms p50",
    "first_token_ms_p99": "p99",
    "ms_per_token": "ms/token",
    "inter_token_ms_p50": "between p50",
    "inter_token_ms_p99": "p99",
    "output_tokens_per_second": "output tok/s",
}


def main(argv: list[str]) -> int:
    """Prints the table; 130 after Ctrl-C. Raises QuireError."""
    arguments = _parser().parse_args(argv)
    check_counts(arguments, "batch", "input_len", "output_len")

    def measure(engine: BenchEngine, report: Report) -> None:
        tokens = arguments.input_len + arguments.output_len
        check_fits("--input-len and --output-len", tokens, engine.ready.max_model_len)
        for batch in arguments.batch:
            _measure(engine, report, arguments, batch)

    # Torch takes its time to be imported, and --help needs none.
    from quire.cli.bench.engine import run_benchmark

    return run_benchmark("latency", argv, arguments, _COLUMNS, measure)


def _parser() -> Parser:
    parser = engine_parser("latency", "Time to first token, time per token and prefill, of few requests.", _EXAMPLES)
    add = parser.add_argument
    add(
        "--batch", type=int, nargs="+", default=[1, 8, 64], metavar="N",
        help="requests at once; a row for each (default: 1 8 64)",
    )  # fmt: skip
    add("--input-len", type=int, default=128, metavar="TOKENS", help="of a prompt (default: %(default)s)")
    add("--output-len", type=int, default=256, metavar="TOKENS", help="that follow (default: %(default)s)")
    return parser


def _measure(engine: BenchEngine, report: Report, arguments: argparse.Namespace, batch: int) -> None:
    seed, input_len, output_len = arguments.seed + batch, arguments.input_len, arguments.output_len
    engine.run(engine.workloads.fixed(batch, input_len, min(16, output_len), seed), f"{batch} requests, warm-up")
    work = engine.workloads.fixed(batch, input_len, output_len, seed)
    runs = [
        engine.run(work, f"{batch} requests, round {index + 1}/{arguments.rounds}") for index in range(arguments.rounds)
    ]
    first = np.array([seconds for run in runs for seconds in run.first_tokens])
    between = np.array([seconds for run in runs for seconds in run.decode_steps])
    report.add(
        name=str(batch),
        requests=batch,
        input_tokens=input_len,
        output_tokens=output_len,
        prefill_tokens_per_second=Spread.of(run.prefill_tokens_per_second for run in runs),
        first_token_ms_p50=_milliseconds(first, 50),
        first_token_ms_p99=_milliseconds(first, 99),
        ms_per_token=Spread.of(1e3 * run.seconds_per_token for run in runs),
        inter_token_ms_p50=_milliseconds(between, 50),
        inter_token_ms_p99=_milliseconds(between, 99),
        output_tokens_per_second=Spread.of(run.output_tokens_per_second for run in runs),
    )


def _milliseconds(seconds: np.ndarray, percentile: float) -> float | None:
    return 1e3 * float(np.percentile(seconds, percentile)) if len(seconds) else None
