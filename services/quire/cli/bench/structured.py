"""`quire bench structured`: what it costs that every token must obey a JSON schema."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from quire.cli.bench.flags import check_counts, check_fits, engine_parser
from quire.cli.bench.report import Report, Spread
from quire.cli.flags import Parser
from quire.service.checkpoint import load_text, locate
from quire.service.errors import ConfigError
from quire.service.request import Constraint, ConstraintKind

if TYPE_CHECKING:
    from quire.cli.bench.engine import BenchEngine
    from quire.cli.bench.meter import Run

_EXAMPLES = """\
  quire bench structured
      64 and 256 requests, free and as JSON by a schema, in turns
  quire bench structured --concurrency 16 --output-len 64
      fewer and shorter ones
  quire bench structured --schema person.json
      a schema of one's own; an answer that it lets end ends there"""

_COLUMNS = {
    "name": "requests",
    "free": "free tok/s",
    "constrained": "constrained tok/s",
    "cost_percent": "slower %",
    "grammar_seconds": "grammar s",
}

# An array that is never long enough to end: all answers have the length that was asked for.
_ENDLESS = {
    "type": "array",
    "minItems": 1 << 20,
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["name", "age", "tags", "active"],
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
            "active": {"type": "boolean"},
        },
    },
}


def main(argv: list[str]) -> int:
    """Prints the table; 130 after Ctrl-C. Raises QuireError."""
    arguments = _parser().parse_args(argv)
    check_counts(arguments, "concurrency", "input_len", "output_len")
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, _schema(arguments.schema))
    # Torch takes its time to be imported, and --help needs none.
    from quire.cli.bench.engine import run_benchmark
    from quire.llm.masks import LazyMasks

    text = load_text(locate(arguments.model))

    def measure(engine: BenchEngine, report: Report) -> None:
        tokens = arguments.input_len + arguments.output_len
        check_fits("--input-len and --output-len", tokens, engine.ready.max_model_len)
        for count in arguments.concurrency:
            _measure(engine, report, arguments, count, constraint, grammar_seconds)

    with closing(LazyMasks(text)) as masks:
        # Before the model is loaded: a package may be missing, the schema wrong.
        began = time.perf_counter()
        masks.compile(constraint)
        grammar_seconds = time.perf_counter() - began
        return run_benchmark("structured", argv, arguments, _COLUMNS, measure, lambda _: masks)


def _parser() -> Parser:
    parser = engine_parser("structured", "JSON by a schema against free text, in turns in one process.", _EXAMPLES)
    add = parser.add_argument
    add(
        "--concurrency", type=int, nargs="+", default=[64, 256], metavar="N",
        help="requests at once; a row for each (default: 64 256)",
    )  # fmt: skip
    add("--input-len", type=int, default=128, metavar="TOKENS", help="of a prompt (default: %(default)s)")
    add("--output-len", type=int, default=256, metavar="TOKENS", help="that follow (default: %(default)s)")
    add("--schema", default="", metavar="FILE", help="a JSON schema (default: an array of objects without an end)")
    return parser


def _schema(path: str) -> str:
    if not path:
        return json.dumps(_ENDLESS)
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--schema {path} can't be read ({error}): name a file that holds a JSON schema") from error


def _measure(
    engine: BenchEngine,
    report: Report,
    arguments: argparse.Namespace,
    count: int,
    constraint: Constraint,
    grammar_seconds: float,
) -> None:
    work = engine.workloads.fixed(count, arguments.input_len, arguments.output_len, arguments.seed + count)
    short = [job._replace(output_len=min(16, job.output_len)) for job in work]
    runs: dict[bool, list[Run]] = {False: [], True: []}
    for masked in (False, True):
        engine.run(short, f"{count} requests, warm-up", constraint if masked else None)
    for index in range(2 * arguments.rounds):
        masked = index % 4 in (1, 2)
        label = f"{count} requests, {'JSON' if masked else 'free'}, round {index // 2 + 1}/{arguments.rounds}"
        runs[masked].append(engine.run(work, label, constraint if masked else None))
    free, constrained = ([run.output_tokens_per_second for run in runs[masked]] for masked in (False, True))
    report.add(
        name=str(count),
        requests=count,
        output_tokens=runs[True][0].output_tokens,
        free=Spread.of(free),
        constrained=Spread.of(constrained),
        cost_percent=Spread.of(100 * (1 - slow / fast) for fast, slow in zip(free, constrained, strict=True)),
        grammar_seconds=grammar_seconds,
    )
