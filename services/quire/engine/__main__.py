"""`python -m quire.engine`: one engine pod's server, and the core process behind it."""

from __future__ import annotations

import argparse
import sys

from quire.engine.config import CoreConfig, EngineConfig
from quire.engine.flags import add_core_flags, add_node_flags, core_config
from quire.engine.parallel.node import EngineNode
from quire.engine.service import EngineService
from quire.service.errors import ConfigError
from quire.service.lifecycle import run_service
from quire.service.logs import LogFormat, setup_logging
from quire.service.tls_files import TlsFiles, add_tls_flags

_EXAMPLES = """examples:
  python -m quire.engine --listen 127.0.0.1:9100
  python -m quire.engine --listen unix:/run/quire/engine.sock --sidecar unix:/run/quire/sidecar.sock --dtype float32
  python -m quire.engine --listen 0.0.0.0:9100 --model ./Llama-3.2-1B --max-model-len 8192 --kv-cache-bytes 8000000000
  python -m quire.engine --listen 0.0.0.0:9100 --model ./Llama-3.1-70B --tensor-parallel-size 16 --nnodes 2 \
      --master-addr 10.0.0.1    # and on the other host, for half of the GPUs:
  python -m quire.engine --tensor-parallel-size 16 --nnodes 2 --node-rank 1 --master-addr 10.0.0.1
"""


def main(argv: list[str] | None = None) -> int:
    """Parses the flags and serves; returns the exit status."""
    arguments = _parser().parse_args(argv)
    setup_logging(arguments.name, level=arguments.log_level, style=LogFormat(arguments.log_format))
    try:
        config = _config(arguments)
    except ConfigError as error:
        print(f"quire.engine: {error.message}", file=sys.stderr)
        return 2
    return run_service(EngineNode(config).run if config.core.node_rank else EngineService(config).run)


def _config(arguments: argparse.Namespace) -> EngineConfig:
    if not arguments.listen and not arguments.node_rank:
        raise ConfigError("--listen is missing: give HOST:PORT or unix:PATH, where routers reach this", field="listen")
    return EngineConfig(
        listen=arguments.listen,
        name=arguments.name,
        metrics_port=arguments.metrics_port,
        grace_s=arguments.grace,
        step_timeout_s=arguments.step_timeout,
        log_level=arguments.log_level,
        log_format=LogFormat(arguments.log_format),
        tls=TlsFiles.of_flags(arguments),
        reload_interval=arguments.reload_interval,
        core=core_config(
            arguments,
            model=arguments.model,
            sidecar=arguments.sidecar,
            max_waiting=arguments.max_waiting,
            nnodes=arguments.nnodes,
            node_rank=arguments.node_rank,
            master_addr=arguments.master_addr,
            master_port=arguments.master_port,
            rendezvous_timeout_s=arguments.rendezvous_timeout,
        ),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m quire.engine",
        description="Runs a model: pages, batches, prefix cache. Routers connect to it over gRPC.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    core = CoreConfig()
    add = parser.add_argument
    add("--listen", default="", metavar="ADDRESS[,ADDRESS…]", help="HOST:PORT or unix:PATH; of --node-rank 0 only")
    add("--name", default="engine-0", help="what logs, traces and metrics call it (default: %(default)s)")
    add("--model", default=core.model, help="GGUF file, Hugging Face folder or hub name (default: the embedded model)")
    add("--sidecar", default=core.sidecar, metavar="ADDRESS", help="grammars and drafts; without it no constraints")
    add("--max-waiting", type=int, default=core.max_waiting, help="requests in the queue (default: %(default)s)")
    add_core_flags(add)
    add_node_flags(add)
    add_tls_flags(add, "routers")
    add(
        "--reload-interval", type=float, default=1.0, metavar="SECONDS",
        help="how often these files are looked at (default: %(default)s)",
    )  # fmt: skip
    add("--metrics-port", type=int, default=0, metavar="PORT", help="Prometheus metrics over HTTP; 0: off")
    add(
        "--step-timeout", type=float, default=120.0, metavar="SECONDS",
        help="a step that takes longer hangs: the engine fails and ends (default: %(default)s)",
    )  # fmt: skip
    add("--grace", type=float, default=30.0, metavar="SECONDS", help="for requests in flight at the end")
    add("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    add("--log-format", default="text", choices=[style.value for style in LogFormat])
    return parser


if __name__ == "__main__":
    sys.exit(main())
