"""`python -m quire.router`: the command line of a router process."""

from __future__ import annotations

import argparse
import logging
import sys

import uvloop

from quire.router.config import RouterConfig
from quire.router.service import RouterService
from quire.service.errors import ConfigError
from quire.service.lifecycle import run_service
from quire.service.logs import LogFormat, setup_logging
from quire.service.tls_files import PeerTlsFiles, TlsFiles, add_peer_flags, add_tls_flags

_EXAMPLES = """examples:
  python -m quire.router --listen 127.0.0.1:9000 --engines 127.0.0.1:9100,127.0.0.1:9101
  python -m quire.router --listen unix:/run/quire/router.sock --engines unix:/run/quire/engine.sock --hold 60
      one engine, which may take a minute to load
  python -m quire.router --listen [::]:9000 --engines dns:engines.models.svc:9100
      an engine at each address that the name has, looked up again and again
  python -m quire.router --listen [::]:9000 --engines kubernetes:models/engines:grpc
      an engine in each ready pod of the Service `engines` in the namespace `models`, at its port `grpc`;
      kubernetes:models/engines+canary:grpc are those of two Services

Spans are exported if OTEL_EXPORTER_OTLP_ENDPOINT is set.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs until SIGTERM or SIGINT; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    setup_logging(arguments.name, level=arguments.log_level, style=LogFormat(arguments.log_format))
    try:
        config = build_config(arguments)
    except ConfigError as error:
        logging.getLogger(__name__).error("%s", error.message)
        return 2
    return run_service(lambda stop: RouterService(config).run(stop), loop_factory=uvloop.new_event_loop)


def build_config(arguments: argparse.Namespace) -> RouterConfig:
    """The config that the flags ask for. Raises ConfigError."""
    return RouterConfig(
        listen=arguments.listen,
        engines=tuple(address.strip() for address in arguments.engines.split(",")),
        name=arguments.name,
        hold=arguments.hold,
        ready_without_engines=arguments.ready_without_engines,
        max_moves=arguments.max_moves,
        retry_share=arguments.retry_share,
        stall_timeout=arguments.stall_timeout,
        resolve_interval=arguments.resolve_interval,
        grace=arguments.grace,
        load_interval=arguments.load_interval,
        max_queued_updates=arguments.max_queued_updates,
        metrics_port=arguments.metrics_port,
        tls=TlsFiles.of_flags(arguments),
        engine_tls=PeerTlsFiles.of_flags(arguments, "engine"),
        reload_interval=arguments.reload_interval,
    )


def build_parser() -> argparse.ArgumentParser:
    """The flags; each default is the config's own."""
    parser = argparse.ArgumentParser(
        prog="python -m quire.router",
        description="Sends each request to the engine where its first token comes soonest.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = RouterConfig(listen="-", engines=("-",))
    option = parser.add_argument
    option("--listen", required=True, metavar="ADDR[,ADDR…]", help="where gateways connect: HOST:PORT or unix:PATH")
    option(
        "--engines",
        required=True,
        metavar="ADDR[,ADDR…]",
        help="gRPC addresses of the engines, dns:NAME:PORT or kubernetes:[NAMESPACE/]SERVICE[:PORT]",
    )
    option("--name", default=default.name, help="what logs and traces call it (default: %(default)s)")
    option(
        "--hold",
        type=float,
        default=default.hold,
        metavar="SECONDS",
        help="how long a request waits for an engine if none is ready (default: %(default)s)",
    )
    option(
        "--ready-without-engines",
        action="store_true",
        help="take requests and hold them also without any engine: for engines that start when somebody asks",
    )
    option(
        "--max-moves",
        type=int,
        default=default.max_moves,
        metavar="N",
        help="how often a request may be moved to another engine without a token in between (default: %(default)s)",
    )
    option(
        "--retry-share",
        type=float,
        default=default.retry_share,
        metavar="SHARE",
        help="share of the requests in flight that may be moved at a time; others wait (default: %(default)s)",
    )
    option(
        "--stall-timeout",
        type=float,
        default=default.stall_timeout,
        metavar="SECONDS",
        help="an engine that has work and does nothing for so long is lost (default: %(default)s)",
    )
    option(
        "--resolve-interval",
        type=float,
        default=default.resolve_interval,
        metavar="SECONDS",
        help="time between two look-ups of a name in DNS (default: %(default)s)",
    )
    option(
        "--grace",
        type=float,
        default=default.grace,
        metavar="SECONDS",
        help="what is in flight may finish for this long after SIGTERM (default: %(default)s)",
    )
    option(
        "--load-interval",
        type=float,
        default=default.load_interval,
        metavar="SECONDS",
        help="shortest time between two load reports of an engine (default: %(default)s)",
    )
    option(
        "--max-queued-updates",
        type=int,
        default=default.max_queued_updates,
        metavar="N",
        help="a gateway that leaves more of them unread loses its session (default: %(default)s)",
    )
    _add_tls_options(parser, default)
    option("--metrics-port", type=int, default=0, metavar="PORT", help="Prometheus metrics over HTTP; 0: off")
    option("--log-level", default="info", choices=("debug", "info", "warning", "error"), help="(default: %(default)s)")
    option("--log-format", default="text", choices=[style.value for style in LogFormat], help="(default: %(default)s)")
    return parser


def _add_tls_options(parser: argparse.ArgumentParser, default: RouterConfig) -> None:
    option = parser.add_argument_group("TLS").add_argument
    add_tls_flags(option, "gateways")
    add_peer_flags(option, "engine")
    option(
        "--reload-interval",
        type=float,
        default=default.reload_interval,
        metavar="SECONDS",
        help="how often these files are looked at (default: %(default)s)",
    )


if __name__ == "__main__":
    sys.exit(main())
