"""argparse as every command uses it: examples after the flags, errors in one line."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from quire.service.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ConfigErrors that say where to read on."""

    def __init__(self, command: str, description: str, examples: str) -> None:
        super().__init__(
            prog=f"quire {command}",
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse's, but a flag that is not there is met with the one that was meant."""
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1) if flag.startswith("-") else []
            self.error(f"there is no {flag}" + (f", did you mean {close[0]}" if close else ""))
        return arguments

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError instead of printing a page of usage."""
        raise ConfigError(f"{message}: see `{self.prog} --help`")


def at_least(flag: str, value: float, least: float) -> None:
    """Raises ConfigError if a flag's `value` is below `least`."""
    if not value >= least:
        raise ConfigError(f"{flag} is {value:g}: it must be at least {least:g}", field=flag)
