"""`python -m quire.service.health`: asks a gRPC server whether it serves, also over TLS, which kubelets can't."""

from __future__ import annotations

import argparse
import asyncio
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire.service.errors import ConfigError
from quire.service.peer_tls import Dialer
from quire.service.tls_files import PeerTlsFiles, add_peer_flags


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if it serves, 1 if it does not, 2 for flags that are wrong; says why on standard error."""
    arguments = _parser().parse_args(argv)
    try:
        dialer = Dialer(PeerTlsFiles.of_flags(arguments, "server"))
    except ConfigError as error:
        print(f"quire.service.health: {error.message}", file=sys.stderr)
        return 2
    trouble = asyncio.run(_trouble(dialer, arguments.address, arguments.timeout))
    if trouble:
        print(f"{arguments.address}: {trouble}", file=sys.stderr)
    return 1 if trouble else 0


async def _trouble(dialer: Dialer, address: str, seconds: float) -> str:
    """Why it does not serve, empty if it does."""
    async with dialer.channel(address) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=seconds)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
    status = health_pb2.HealthCheckResponse.ServingStatus
    return "" if answer.status == status.SERVING else str(status.Name(answer.status))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m quire.service.health",
        description="Ends with status 0 if the gRPC server at ADDRESS serves.",
    )
    option = parser.add_argument
    option("address", metavar="ADDRESS", help="HOST:PORT or unix:PATH")
    add_peer_flags(option, "server")
    option("--timeout", type=float, default=5.0, metavar="SECONDS", help="for the answer (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
