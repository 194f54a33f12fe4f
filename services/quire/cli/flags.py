"""argparse as every command uses it: examples after the flags, errors in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

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

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError instead of printing a page of usage."""
        raise ConfigError(f"{message}: see `{self.prog} --help`")


def at_least(flag: str, value: float, least: float) -> None:
    """Raises ConfigError if a flag's `value` is below `least`."""
    if not value >= least:
        raise ConfigError(f"{flag} is {value:g}: it must be at least {least:g}", field=flag)
