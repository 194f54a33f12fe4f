"""`quire bench throughput`: many requests of random lengths, all at once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from quire.cli.bench.flags import check_counts, check_fits, engine_parser
from quire.cli.bench.report import Report, Spread
from quire.cli.bench.workloads import Lengths
from quire.cli.flags import Parser

if TYPE_CHECKING:
    from quire.cli.bench.engine import BenchEngine

_EXAMPLES = """\
  quire bench throughput
      the embedded model; prompts and outputs of 100 to 1,024 tokens
  quire bench throughput ./Llama-3.1-8B --requests 256 1024 --out run.json
      a GPU's: mixed256 and mixed1024, and the numbers as a file
  quire bench throughput ./llama-8b --load-format dummy --max-model-len 4096
      a folder with only config.json: random weights
  quire bench throughput --requests 8 --input-len 128 --output-len 32:64
      something quick"""

_COLUMNS = {
    "name": "",
    "input_tokens": "input",
    "output_tokens": "output",
    "output_tokens_per_second": "output tok/s",
    "total_tokens_per_second": "all tok/s",
    "requests_per_second": "requests/s",
    "steps": "steps",
    "preemptions": "preemptions",
}


def main(argv: list[str]) -> int:
    """Prints the table; 130 after Ctrl-C. Raises QuireError."""
    arguments = _parser().parse_args(argv)
    check_counts(arguments, "requests")
    prompt = Lengths.parse("--input-len", arguments.input_len)
    output = Lengths.parse("--output-len", arguments.output_len)

    def measure(engine: BenchEngine, report: Report) -> None:
        check_fits("--input-len and --output-len", prompt.high + output.high, engine.ready.max_model_len)
        for count in arguments.requests or [256 if engine.on_gpu else 32]:
            _measure(engine, report, arguments, count, prompt, output)

    # Torch takes its time to be imported, and --help needs none.
    from quire.cli.bench.engine import run_benchmark

    return run_benchmark("throughput", argv, arguments, _COLUMNS, measure)


def _parser() -> Parser:
    parser = engine_parser("throughput", "Tokens per second of requests that come all at once.", _EXAMPLES)
    add = parser.add_argument
    add("--requests", type=int, nargs="+", metavar="N", help="how many; a row for each (default: 32, on a GPU 256)")
    add("--input-len", default="100:1024", metavar="A:B", help="tokens of a prompt (default: %(default)s)")
    add("--output-len", default="100:1024", metavar="A:B", help="tokens that follow (default: %(default)s)")
    return parser


def _measure(
    engine: BenchEngine, report: Report, arguments: argparse.Namespace, count: int, prompt: Lengths, output: Lengths
) -> None:
    work = engine.workloads.mixed(count, prompt, output, arguments.seed)
    name = f"mixed{count}" if prompt.low < prompt.high or output.low < output.high else f"fixed{count}"
    # Compiles and captures what this shape of work needs.
    short = engine.workloads.mixed(min(count, 256), _part(prompt), _part(output), arguments.seed + 77)
    engine.meter.run(short, f"{name} warm-up")
    runs = [engine.run(work, f"{name} round {index + 1}/{arguments.rounds}") for index in range(arguments.rounds)]
    report.add(
        name=name,
        requests=count,
        input_tokens=runs[0].input_tokens,
        output_tokens=runs[0].output_tokens,
        seconds=Spread.of(run.seconds for run in runs),
        output_tokens_per_second=Spread.of(run.output_tokens_per_second for run in runs),
        total_tokens_per_second=Spread.of(run.total_tokens_per_second for run in runs),
        requests_per_second=Spread.of(run.requests_per_second for run in runs),
        steps=runs[0].steps,
        preemptions=sum(run.preemptions for run in runs),
    )


def _part(lengths: Lengths) -> Lengths:
    return Lengths(max(1, lengths.low // 6), max(1, lengths.high // 4))
