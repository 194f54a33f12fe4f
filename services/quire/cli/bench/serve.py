"""`quire bench serve`: sends requests to an OpenAI-compatible server and says how fast the answers were."""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from quire.cli.api import ApiError, EventReader, Server, add_server_flags, refusal, server_of
from quire.cli.bench import ACTIONS
from quire.cli.bench.prompts import Workload
from quire.cli.bench.report import STOPPED, JsonFile
from quire.cli.bench.samples import Sample, Summary
from quire.cli.flags import Parser, at_least
from quire.service.errors import ConfigError, QuireError

_DESCRIPTION = """\
Measures the speed of any OpenAI-compatible server, which `quire bench serve`
does, too. Other actions measure the engine alone, in this process, each with
flags of its own (`quire bench throughput --help`):

""" + "\n".join(f"  {action:<11} {what}" for action, what in ACTIONS.items() if action != "serve")

_EXAMPLES = """\
  quire bench
      32 requests of 128 tokens for 128 tokens, 8 at a time
  quire bench --requests 4 --concurrency 1 --json one.json
      the speed of one answer, and the numbers as a file
  quire bench --requests 200 --rate 2.5 --input-len 1000
      requests at random times, 2.5 a second, however busy the server is
  quire bench --url https://example.com/v1 --model llama
      another server; its key is in OPENAI_API_KEY"""


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """The load. Without `rate` the next request is sent when one of `concurrency` ends; with it (requests per second)
    they are sent at random times, at most `concurrency` at once if that is given. Lengths are in tokens. `seed` decides
    the prompts: a server has those of an earlier run with the same seed in its prefix cache."""

    requests: int = 32
    concurrency: int | None = None
    input_len: int = 128
    output_len: int = 128
    rate: float | None = None
    seed: int = field(default_factory=lambda: secrets.randbits(32))

    def __post_init__(self) -> None:
        at_least("--requests", self.requests, 1)
        at_least("--input-len", self.input_len, 1)
        at_least("--output-len", self.output_len, 1)
        if self.concurrency is not None:
            at_least("--concurrency", self.concurrency, 1)
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ConfigError(f"--rate is {self.rate:g}: give requests per second, more than 0", field="rate")

    @property
    def at_once(self) -> int:
        """The most requests in flight."""
        return min(self.requests, self.concurrency or (8 if self.rate is None else self.requests))

    @property
    def description(self) -> str:
        """The load in words."""
        paced = f", {self.rate:g} a second" if self.rate is not None else ""
        return (
            f"{self.requests} requests of {self.input_len} tokens for {self.output_len}, {self.at_once} at once{paced}"
        )


def main(argv: list[str]) -> int:
    """Prints the tables; 1 if a request failed, 130 after Ctrl-C. Raises QuireError if nothing can be measured."""
    arguments = _parser().parse_args(argv)
    server = server_of(arguments)
    config = config_of(arguments)
    file = JsonFile("--json", arguments.json) if arguments.json else None
    model = arguments.model or server.first_model()
    bench = Bench(server, model, config)
    try:
        status = asyncio.run(_run(bench, config))
    except httpx.TransportError as error:
        raise server.unreachable(error) from error
    summary = Summary.of(bench.samples)
    _print(f"{model} on {server.url}: {config.description}", summary)
    if file is not None:
        numbers = {"url": server.url, "model": model, **asdict(config), **summary.to_json()}
        file.write(numbers)
    return status or int(summary.failed > 0)


def config_of(arguments: argparse.Namespace) -> BenchConfig:
    """The config that the flags ask for. Raises ConfigError."""
    names = ("requests", "concurrency", "input_len", "output_len", "rate", "seed")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return BenchConfig(**given)


class Bench:
    """Sends the load that `config` describes; `samples` grows as requests end."""

    def __init__(self, server: Server, model: str, config: BenchConfig) -> None:
        self.samples: list[Sample] = []
        self._server = server
        self._model = model
        self._config = config
        self._extensions: dict[str, Any] = {"ignore_eos": True}

    async def run(self, ended: Callable[[], None]) -> None:
        """Calls `ended` after each request. Raises ApiError, httpx.TransportError if not even one can be made."""
        config = self._config
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(limits=limits, **self._server.client_options) as client:
            workload = await self._calibrate(client)
            free = asyncio.Semaphore(config.at_once)
            rng = random.Random(config.seed)

            async def one(index: int) -> None:
                try:
                    self.samples.append(await self._measure(client, workload.prompt(index)))
                finally:
                    free.release()
                ended()

            async with asyncio.TaskGroup() as group:
                due = time.perf_counter()
                for index in range(config.requests):
                    await asyncio.sleep(due - time.perf_counter())
                    await free.acquire()
                    group.create_task(one(index))
                    if config.rate is not None:
                        due += rng.expovariate(config.rate)

    async def _calibrate(self, client: httpx.AsyncClient) -> Workload:
        """Learns from two short requests how many words make the prompt, and whether ignore_eos is known."""
        length, seed = self._config.input_len, self._config.seed
        # Indices that no request has: nothing of theirs may be in the server's prefix cache already.
        try:
            tail = await self._generate(client, Workload(0, seed).prompt(-1), 1)
        except ApiError as error:
            if error.status != httpx.codes.BAD_REQUEST or "ignore_eos" not in error.message + error.field:
                raise
            self._extensions = {}
            tail = await self._generate(client, Workload(0, seed).prompt(-1), 1)
        words = await self._generate(client, Workload(length, seed).prompt(-2), 1)
        return Workload.of_tokens(
            length, tail_tokens=tail.prompt_tokens, words=length, words_tokens=words.prompt_tokens, seed=seed
        )

    async def _measure(self, client: httpx.AsyncClient, prompt: str) -> Sample:
        began = time.perf_counter()
        try:
            return await self._generate(client, prompt, self._config.output_len)
        except QuireError as error:
            reason = error.message
        except httpx.TransportError as error:
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        return Sample(began, time.perf_counter(), error=reason)

    async def _generate(self, client: httpx.AsyncClient, prompt: str, max_tokens: int) -> Sample:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extensions,
        }
        arrivals: list[float] = []
        usage: dict[str, Any] = {}
        events = EventReader()
        began = time.perf_counter()
        async with client.stream("POST", "/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                raise refusal(response.status_code, await response.aread())
            async for data in response.aiter_bytes():
                for event in events.feed(data):
                    if any(choice.get("text") for choice in event.get("choices", ())):
                        arrivals.append(time.perf_counter())
                    usage = event.get("usage") or usage
        ended = time.perf_counter()
        events.close()
        if not usage.keys() >= {"prompt_tokens", "completion_tokens"}:
            raise ApiError("the server counts no tokens, which stream_options.include_usage asks it for", status=200)
        return Sample(
            began,
            ended,
            tuple(arrivals),
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            output_tokens=usage["completion_tokens"],
        )


def _parser() -> Parser:
    parser = Parser("bench", _DESCRIPTION, _EXAMPLES)
    default = BenchConfig()
    add_server_flags(parser)
    add = parser.add_argument
    add("--requests", type=int, default=default.requests, metavar="N", help="how many (default: %(default)s)")
    add("--concurrency", type=int, metavar="N", help=f"most at once (default: {default.at_once}; no limit with --rate)")
    add("--input-len", type=int, default=default.input_len, metavar="TOKENS", help="of a prompt (default: %(default)s)")
    add("--output-len", type=int, default=default.output_len, metavar="TOKENS", help="at most (default: %(default)s)")
    add("--rate", type=float, metavar="R", help="requests per second, at random times (default: as fast as they end)")
    add("--seed", type=int, metavar="N", help="of prompts and times (default: new prompts in each run)")
    add("--json", default="", metavar="FILE", help="where to write the numbers as well")
    return parser


async def _run(bench: Bench, config: BenchConfig) -> int:
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("requests", total=config.requests)
        work = asyncio.create_task(bench.run(lambda: progress.advance(bar)))
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, work.cancel)
        await asyncio.wait((work,))
    if work.cancelled():
        return STOPPED
    work.result()
    return 0


def _print(title: str, summary: Summary) -> None:
    print(title)
    if summary.succeeded:
        console = Console()
        for table in summary.tables():
            console.print(table)
    else:
        print("no request succeeded")
    for message, count in summary.errors.items():
        print(f"{count} × error: {message}")
