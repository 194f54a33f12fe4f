"""`quire serve`: every service on this machine, as processes under one supervisor, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import logging
import shutil
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from quire.cli.flags import Parser
from quire.cli.gpus import gpus_of
from quire.cli.output import OutputPipe
from quire.cli.progress import LoadProgress
from quire.cli.runtime_dir import Serving, announce, runtime_dir
from quire.cli.services import ServeConfig, engine_addresses, stages
from quire.gateway.tools.choice import ToolFormat
from quire.service.checkpoint.locate import EMBEDDED_MODEL, locate
from quire.service.errors import ConfigError
from quire.service.logs import LogFormat, setup_logging
from quire.service.supervisor import ChildDiedError, ChildSpec, Supervisor
from quire.service.tls_files import add_tls_flags

_EXAMPLES = """\
  quire serve
      the embedded model on http://127.0.0.1:8000/v1
  quire serve ./Llama-3.2-1B-Instruct --port 8080
      a folder as on the Hugging Face hub, a .gguf file, or a name on the hub
  quire serve --engines 2 --dtype float32
      two engines behind one router, exact numbers; on GPUs each has its own
  quire serve --host 0.0.0.0 --grpc-port 8001 --log-format json
      for other machines too, with the public gRPC service
  quire serve --tls-cert tls.crt --tls-key tls.key --api-keys keys.jsonl
      over TLS, for those who have a key"""

_DESCRIPTION = """\
Starts a gateway, a router, engines and their sidecars on this machine, each a
process, and serves until Ctrl-C. A process that dies is started again, more
slowly each time that it dies at once; the router moves the answers that a dead
engine was giving to another engine, or holds them until one is back."""

_LEVELS = ["debug", "info", "warning", "error"]

_STOPPED_BY_SIGINT = 128 + signal.SIGINT

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Serves until Ctrl-C (130) or SIGTERM (0); 1 if a service can't start. Raises ConfigError."""
    began = time.monotonic()
    config = config_of(_parser().parse_args(argv))
    setup_logging("serve", level=config.log_level, style=LogFormat(config.log_format))
    config = _with_free_ports(replace(config, gpus=_gpus(config)))
    # What is missing or wrong is said once, here, and what has to be downloaded is downloaded once.
    model_name = locate(config.model).name
    with runtime_dir() as folder:
        announce(folder, Serving(config.url, model_name, engine_addresses(config, folder)))
        return asyncio.run(_serve(config, model_name, folder, began))


def _gpus(config: ServeConfig) -> tuple[str, ...]:
    return gpus_of(config.engines, config.device, config.tensor_parallel_size or 1)


def config_of(arguments: argparse.Namespace) -> ServeConfig:
    """The config that the flags ask for. Raises ConfigError."""
    return ServeConfig(**vars(arguments))


def _parser() -> Parser:
    parser = Parser("serve", _DESCRIPTION, _EXAMPLES)
    default = ServeConfig()
    add = parser.add_argument
    add(
        "model", nargs="?", default="", metavar="MODEL",
        help=f"a .gguf file, a folder, or a hub name (default: {EMBEDDED_MODEL}, which is installed)",
    )  # fmt: skip
    add("--engines", type=int, default=default.engines, metavar="N", help="how many (default: %(default)s)")
    add(
        "--dtype", default=default.dtype, choices=["auto", "float32", "bfloat16"],
        help="float32 is exact; auto is the fastest that the device does well (default: %(default)s)",
    )  # fmt: skip
    add(
        "--speculation", choices=["off", "auto"],
        help="auto: verify what is expected to follow, as far as it makes the batch faster (default: the engine's)",
    )  # fmt: skip
    add("--num-speculative-tokens", type=int, metavar="N", help="per request and step, at most (default: the engine's)")
    add("--speculative-model", metavar="FOLDER", help="an EAGLE head for the model (default: the engine's)")
    add("--host", default=default.host, help="where HTTP and gRPC listen (default: %(default)s)")
    add("--port", type=int, default=default.port, help="of HTTP; 0 picks a free one (default: %(default)s)")
    add("--grpc-port", type=int, metavar="PORT", help="of the public gRPC service; 0 picks a free one (default: off)")
    add("--api-keys", default="", metavar="FILE", help="made by quire keys (default: everybody may ask)")
    add_tls_flags(add, "HTTP and gRPC")
    add(
        "--tool-call-format", default="", choices=[style.value for style in ToolFormat],
        help="how the model writes calls to tools (default: as its chat template tells)",
    )  # fmt: skip
    add("--workers", type=int, metavar="N", help="gateway processes on the same port (default: 1)")
    add("--max-model-len", type=int, metavar="TOKENS", help="prompt and output (default: the model's context)")
    add("--max-num-seqs", type=int, metavar="N", help="sequences in an engine's batch (default: the engine's)")
    add("--num-pages", type=int, metavar="N", help="pages of 16 tokens per engine (default: what the memory holds)")
    add("--kv-cache-bytes", type=int, metavar="BYTES", help="memory for pages per engine (default: the engine's)")
    add(
        "--device", default=default.device, choices=["auto", "cpu", "cuda"],
        help="of the engines; auto: GPUs, one each, if there are any (default: %(default)s)",
    )  # fmt: skip
    add(
        "--kv-cache-dtype", choices=["auto", "fp8"], help="fp8: pages of half the size, on a GPU (default: the model's)"
    )
    add(
        "--gpu-memory-utilization", type=float, metavar="SHARE",
        help="of a GPU's memory that its engine may use (default: the engine's)",
    )  # fmt: skip
    add("--tensor-parallel-size", type=int, metavar="N", help="GPUs that share the model in each engine (default: 1)")
    add("--threads", type=int, metavar="N", help="per engine (default: the cores divided by the engines)")
    add("--log-level", default=default.log_level, choices=_LEVELS, help="of all services (default: %(default)s)")
    add(
        "--log-format", default=default.log_format, choices=[style.value for style in LogFormat],
        help="on standard error (default: %(default)s)",
    )  # fmt: skip
    return parser


async def _serve(config: ServeConfig, model_name: str, folder: Path, began: float) -> int:
    in_terminal = sys.stderr.isatty() and config.log_format == LogFormat.TEXT.value
    progress = LoadProgress(config.num_processes, sys.stderr, bar=in_terminal)
    planned = [[_reporting(spec, progress) for spec in stage] for stage in stages(config, folder, progress.loading)]
    with OutputPipe(progress.write) as output:
        supervisor = Supervisor(planned, output=output.write_end)
        status = _status_on_signals(supervisor)
        async with supervisor:
            life = asyncio.create_task(_live(supervisor, progress, config, model_name, began))
            await asyncio.wait((life, status), return_when=asyncio.FIRST_COMPLETED)
            progress.clear()
            if status.done():
                logger.info("stopping: Ctrl-C again stops at once")
                life.cancel()
                await asyncio.wait((life,))
                return status.result()
            try:
                await life
            except ChildDiedError as error:
                # After what the child wrote last.
                died = error
    logger.error("%s", died.message)
    return 1


async def _live(
    supervisor: Supervisor, progress: LoadProgress, config: ServeConfig, model_name: str, began: float
) -> NoReturn:
    await supervisor.until_ready()
    progress.clear()
    print(_welcome(config, model_name, time.monotonic() - began), flush=True)
    await supervisor.keep()


def _reporting(spec: ChildSpec, progress: LoadProgress) -> ChildSpec:
    async def ready() -> None:
        await spec.ready()
        progress.ready(spec.name)

    return replace(spec, ready=ready)


def _status_on_signals(supervisor: Supervisor) -> asyncio.Future[int]:
    """The exit status, once a signal says that it is time; the next signal kills."""
    loop = asyncio.get_running_loop()
    status: asyncio.Future[int] = loop.create_future()

    def stop(code: int) -> None:
        if status.done():
            supervisor.kill()
        else:
            status.set_result(code)

    loop.add_signal_handler(signal.SIGINT, stop, _STOPPED_BY_SIGINT)
    loop.add_signal_handler(signal.SIGTERM, stop, 0)
    loop.add_signal_handler(signal.SIGHUP, stop, 0)
    return status


def _with_free_ports(config: ServeConfig) -> ServeConfig:
    """`config` with ports chosen where they were 0. Raises ConfigError if one is taken: now, not when all is loaded."""
    port = _free_port(config.host, "--port", config.port)
    if config.grpc_port is None:
        return replace(config, port=port)
    return replace(config, port=port, grpc_port=_free_port(config.host, "--grpc-port", config.grpc_port))


def _free_port(host: str, flag: str, port: int) -> int:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
            return int(listener.getsockname()[1])
    except socket.gaierror as error:
        raise ConfigError(
            f"--host is {host!r}, which is no address ({error.strerror}): try 127.0.0.1", field="host"
        ) from error
    except OSError as error:
        fix = (
            f"--host must be an address of this machine, such as {ServeConfig().host}"
            if error.errno == errno.EADDRNOTAVAIL
            else f"choose another {flag}, or {flag} 0 for one that is free"
        )
        raise ConfigError(f"can't listen on {host} port {port} ({error.strerror}): {fix}", field=flag) from error


def _welcome(config: ServeConfig, model_name: str, seconds: float) -> str:
    url = (
        "" if config.port == ServeConfig().port and config.local_host == ServeConfig().host else f" --url {config.url}"
    )
    question = {"role": "user", "content": "What is the capital of France?"}
    body = json.dumps({"model": model_name, "max_tokens": 60, "messages": [question]})
    grpc = f" and gRPC on port {config.grpc_port}" if config.grpc_port else ""
    return f"""
Ready in {seconds:.1f} s: {model_name} on {config.url}/v1{grpc}. Ctrl-C stops it. In another terminal:

  {_command_name()} chat{url}
  {_command_name()} top
  curl {config.url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'
"""


def _command_name() -> str:
    """How this program is called: its name alone if the shell finds it."""
    found = shutil.which("quire")
    here = Path(sys.argv[0])
    return "quire" if here.name != "quire" or (found and Path(found).samefile(here)) else str(here)
