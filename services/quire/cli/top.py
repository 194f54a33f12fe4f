"""`quire top`: what the engines of a running service do, live in the terminal."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.text import Text

from quire.cli.engine_watch import EngineWatch
from quire.cli.flags import Parser, at_least
from quire.cli.keyboard import keyboard
from quire.cli.runtime_dir import find_serving
from quire.cli.top_view import Size, page, screen
from quire.service.errors import ConfigError, UnavailableError
from quire.service.peer_tls import Dialer
from quire.service.tls_files import PeerTlsFiles, add_peer_flags

_DESCRIPTION = """\
Shows what engines do, live: their KV pages as a map, the batch and the queue,
tokens per second, latencies, cache hits. Finds the engines of every
`quire serve` that you run on this machine, or takes those that --engine names."""

_EXAMPLES = """\
  quire top
      the engines of `quire serve` on this machine; q leaves
  quire top --engine 127.0.0.1:9100 --engine 127.0.0.1:9101
      engines elsewhere, by what they were given as --listen
  quire top --engine 10.0.0.7:9100 --engine-tls-ca ca.crt
      one that speaks TLS; the flags are those of a router
  quire top --once --engine unix:/run/quire/engine.sock
      one look, for a pipe or a script"""

_KEYS = "q quits "
_KEYS_OF_MANY = "↑↓ engine  q quits "

_ADDRESS = re.compile(r"unix:.+|(dns:|ipv4:|ipv6:)?.+:\d{1,5}")

_STOPPED_BY_SIGTERM = 128 + signal.SIGTERM


@dataclass(frozen=True, slots=True)
class TopConfig:
    """Which engines to show: at these gRPC addresses, or those of this machine if there are none. `interval` is the
    time between two looks, in seconds; with `tls` those at an address of a network are spoken to over TLS."""

    engines: tuple[str, ...] = ()
    interval: float = 1.0
    once: bool = False
    tls: PeerTlsFiles | None = None

    def __post_init__(self) -> None:
        at_least("--interval", self.interval, 0.1)
        if self.tls is not None and not self.engines:
            raise ConfigError(
                "--engine-tls-ca is for engines elsewhere, and those of this machine are on sockets: name one with "
                "--engine HOST:PORT",
                field="engine_tls_ca",
            )
        for address in self.engines:
            if not _ADDRESS.fullmatch(address):
                raise ConfigError(
                    f"--engine is {address!r}: give a host and a port, as in 127.0.0.1:9100, or unix: and a path",
                    field="engine",
                )


def main(argv: list[str]) -> int:
    """Shows the engines until q (0), Ctrl-C (130) or SIGTERM (143); with --once 1 if none answers.

    Raises QuireError.
    """
    config = config_of(_parser().parse_args(argv))
    # gRPC's own library would write into the screen, past Python, that an engine is not there.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if not config.once and not sys.stdout.isatty():
        raise ConfigError("standard output is no terminal to draw on: add --once for one look")
    fleet = Fleet(config.engines, Dialer(config.tls))
    fleet.update()
    if not fleet.watches:
        raise UnavailableError(
            "no `quire serve` of yours runs on this machine: start one with `quire serve`, or name an engine elsewhere "
            "with --engine HOST:PORT"
        )
    return asyncio.run(_once(fleet, config) if config.once else _Top(fleet, config).run())


def config_of(arguments: argparse.Namespace) -> TopConfig:
    """The config that the flags ask for. Raises ConfigError."""
    tls = PeerTlsFiles.of_flags(arguments, "engine")
    return TopConfig(tuple(arguments.engine), arguments.interval, arguments.once, tls)


def _parser() -> Parser:
    parser = Parser("top", _DESCRIPTION, _EXAMPLES)
    default = TopConfig()
    add = parser.add_argument
    add(
        "--engine", action="append", default=[], metavar="ADDRESS",
        help="an engine's gRPC address, HOST:PORT or unix:PATH; may be given again (default: those of this machine)",
    )  # fmt: skip
    add(
        "--interval", type=float, default=default.interval, metavar="SECONDS",
        help="between two looks (default: %(default)g)",
    )  # fmt: skip
    add("--once", action="store_true", help="print one look and end")
    add_peer_flags(add, "engine")
    return parser


class Fleet:
    """The engines to show: those at `addresses`, or whatever runs on this machine at the moment."""

    def __init__(self, addresses: Sequence[str], dialer: Dialer | None = None) -> None:
        self._addresses = tuple(dict.fromkeys(addresses))
        self._dialer = dialer or Dialer()
        self.watches: list[EngineWatch] = []

    def update(self) -> None:
        """Takes up engines that are new, and drops those whose `quire serve` has ended."""
        known = {watch.address: watch for watch in self.watches}
        if self._addresses:
            wanted = dict.fromkeys(self._addresses, "")
        else:
            wanted = {address: serving.url for serving in find_serving() for address in serving.engines}
        self.watches = [
            known.get(address) or EngineWatch(address, url, dialer=self._dialer) for address, url in wanted.items()
        ]


async def _once(fleet: Fleet, config: TopConfig) -> int:
    await asyncio.gather(*(watch.look(config.interval) for watch in fleet.watches))
    console = Console(highlight=False)
    console.print(page(fleet.watches, console.width), no_wrap=True, overflow="crop", crop=True)
    return int(all(watch.problem for watch in fleet.watches))


class _Top:
    """The screen, and what happens to it."""

    def __init__(self, fleet: Fleet, config: TopConfig) -> None:
        self._fleet = fleet
        self._interval = config.interval
        self._console = Console(highlight=False)
        self._selected = 0
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._status: int | None = None

    async def run(self) -> int:
        """The exit status, once it is time to leave; the terminal is as it was by then."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGWINCH, self._changed.set)
        loop.add_signal_handler(signal.SIGTERM, self._leave, _STOPPED_BY_SIGTERM)
        loop.add_signal_handler(signal.SIGHUP, self._leave, 0)
        try:
            with keyboard(self._pressed), Live(console=self._console, screen=True, auto_refresh=False) as live:
                while self._status is None:
                    self._follow()
                    live.update(self._draw(), refresh=True)
                    self._changed.clear()
                    await self._until_changed()
        finally:
            for task in self._followers.values():
                task.cancel()
            await asyncio.gather(*self._followers.values(), return_exceptions=True)
        return self._status

    def _follow(self) -> None:
        """Has a task for each engine that is to be shown, and for no other."""
        self._fleet.update()
        addresses = {watch.address for watch in self._fleet.watches}
        for address in self._followers.keys() - addresses:
            self._followers.pop(address).cancel()
        for watch in self._fleet.watches:
            if watch.address not in self._followers:
                task = asyncio.create_task(watch.follow(self._interval, self._changed.set))
                self._followers[watch.address] = task

    async def _until_changed(self) -> None:
        """Returns after an interval at the latest: what is gone says nothing, and the time goes on."""
        change = asyncio.create_task(self._changed.wait())
        tasks = (change, *self._followers.values())
        done, _ = await asyncio.wait(tasks, timeout=self._interval, return_when=asyncio.FIRST_COMPLETED)
        change.cancel()
        for task in done:
            task.result()

    def _draw(self) -> Text:
        watches = self._fleet.watches
        self._selected = max(0, min(self._selected, len(watches) - 1))
        width, height = self._console.size
        hint = _KEYS_OF_MANY if len(watches) > 1 else _KEYS
        return screen(watches, self._selected, Size(width, height), hint)

    def _pressed(self, key: str) -> None:
        match key:
            case "q" | "Q":
                self._leave(0)
            case "up" | "k":
                self._select(-1)
            case "down" | "j" | "\t":
                self._select(1)

    def _select(self, step: int) -> None:
        self._selected = (self._selected + step) % max(1, len(self._fleet.watches))
        self._changed.set()

    def _leave(self, status: int) -> None:
        self._status = status
        self._changed.set()
