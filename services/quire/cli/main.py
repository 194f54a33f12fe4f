"""`quire COMMAND`: finds the command's file and hands it the rest of the line.

Each command is a module of this package with `main(argv) -> int`. Only the one that was asked for is imported, so that
`quire serve` starts its processes before anything slow is loaded.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import os
import sys

from quire.service.errors import ConfigError, QuireError

COMMANDS = {
    "serve": "start every service on this machine and serve a model",
    "chat": "talk to a model in the terminal",
    "bench": "measure the speed of a server, or of the engine alone",
    "top": "watch what the engines do",
    "keys": "make API keys for a server",
    "speculate": "make a head that drafts tokens for a model",
    "manifests": "print what a service becomes on Kubernetes",
}

_EXAMPLES = """\
examples:
  quire serve                        the embedded model on http://127.0.0.1:8000/v1
  quire chat                         talk to it
  quire bench --concurrency 8        measure it
  quire top                          watch its engine meanwhile
  quire COMMAND --help               what a command takes"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 1 after a failure, 2 for a wrong line, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        try:
            return _dispatch(arguments)
        finally:
            # Python's own flush at exit can only complain.
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has had enough; what is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except QuireError as error:
        print(f"quire: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(_usage(), file=sys.stderr)
        return 2
    command, *rest = arguments
    if command == "help" and rest:
        return _dispatch([rest[0], "--help"])
    if command in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if command in ("-V", "--version", "version"):
        print(f"quire {importlib.metadata.version('quire')}")
        return 0
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        advice = f"did you mean `quire {close[0]}`?" if close else f"choose one of {', '.join(COMMANDS)}"
        raise ConfigError(f"there is no command {command!r}: {advice}")
    status: int = importlib.import_module(f"quire.cli.{command}").main(rest)
    return status


def _usage() -> str:
    commands = "\n".join(f"  {name:<9} {what}" for name, what in COMMANDS.items())
    return f"usage: quire COMMAND [FLAGS]\n\ncommands:\n{commands}\n\n{_EXAMPLES}"


if __name__ == "__main__":
    sys.exit(main())
