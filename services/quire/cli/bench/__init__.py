"""`quire bench`: how fast a server is, or the engine alone in this process.

Each action is a module of this package with `main(argv) -> int`; only the one that was asked for is imported, as those
that measure the engine run where the packages of servers and terminals are not installed.
"""

from __future__ import annotations

import difflib
import importlib

from quire.service.errors import ConfigError

ACTIONS = {
    "serve": "a server that runs, by its HTTP API (without an action: this)",
    "throughput": "requests of random lengths, all at once",
    "latency": "few requests: time to first token, time per token, prefill",
    "prefix": "prompts that begin alike, and what caching costs where none do",
    "structured": "JSON by a schema against free text",
    "startup": "from the process's start to the first token",
}


def main(argv: list[str]) -> int:
    """Runs one action; its exit status. Raises QuireError."""
    if not argv or argv[0].startswith("-"):
        action, rest = "serve", argv
    else:
        action, *rest = argv
    if action not in ACTIONS:
        close = difflib.get_close_matches(action, ACTIONS, n=1)
        advice = f"did you mean `quire bench {close[0]}`?" if close else f"choose one of {', '.join(ACTIONS)}"
        raise ConfigError(f"quire bench has no action {action!r}: {advice}")
    status: int = importlib.import_module(f"quire.cli.bench.{action}").main(rest)
    return status
