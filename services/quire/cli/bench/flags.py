"""The flags of the benchmarks that run the engine in this process."""

from __future__ import annotations

import argparse

from quire.cli.flags import Parser, at_least
from quire.engine.config import Speculation
from quire.engine.flags import add_core_flags
from quire.service.errors import ConfigError


def engine_parser(action: str, description: str, examples: str, *, rounds: int = 3) -> Parser:
    """With the model, the engine's flags, --rounds, --seed and --out."""
    parser = Parser(f"bench {action}", description, examples)
    add = parser.add_argument
    add(
        "model", nargs="?", default="", metavar="MODEL",
        help="a .gguf file, a folder, or a hub name (default: the embedded model)",
    )  # fmt: skip
    add("--rounds", type=int, default=rounds, metavar="N", help="times that all is measured (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the prompts (default: %(default)s)")
    add("--out", default="", metavar="FILE", help="where to write the numbers as JSON")
    add_core_flags(parser.add_argument_group("engine").add_argument, speculation=Speculation.OFF)
    return parser


def check_counts(arguments: argparse.Namespace, *names: str) -> None:
    """Raises ConfigError if one of these flags, or one of its numbers, is less than 1. None is the default."""
    for name in ("rounds", *names):
        value = getattr(arguments, name)
        for count in value if isinstance(value, list) else [value]:
            if count is not None:
                at_least(f"--{name.replace('_', '-')}", count, 1)


def check_fits(flags: str, tokens: int, max_model_len: int) -> None:
    """Raises ConfigError if a request of `tokens`, which `flags` make, exceeds the context."""
    if tokens > max_model_len:
        raise ConfigError(
            f"{flags} make requests of {tokens} tokens, and the context is {max_model_len}: lower them or raise "
            "--max-model-len"
        )
