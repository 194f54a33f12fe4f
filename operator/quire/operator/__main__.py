"""`python -m quire.operator`: the command line of an operator process."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
from pathlib import Path

from kubernetes.aio import client
from kubernetes.aio import config as kubernetes_config

from quire.operator.cluster import Cluster
from quire.operator.config import Images, OperatorConfig
from quire.operator.election import lead
from quire.operator.handlers import Watching
from quire.operator.kinds import SERVICE
from quire.operator.metrics import OperatorMetrics
from quire.service.errors import ConfigError
from quire.service.lifecycle import run_service
from quire.service.logs import LogFormat, setup_logging

_EXAMPLES = """examples:
  python -m quire.operator
      in a pod: with the rights of its service account
  python -m quire.operator --namespace quire-system --engine-image registry.example/quire-engine:1
      elsewhere: with those of the kubeconfig, and another image for engines
"""

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Runs until SIGTERM or SIGINT; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    setup_logging("operator", level=arguments.log_level, style=LogFormat(arguments.log_format))
    for noisy in ("kopf", "kubernetes"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        config = build_config(arguments)
    except ConfigError as error:
        logger.error("%s", error.message)
        return 2
    return run_service(lambda stop: serve(config, stop))


async def serve(config: OperatorConfig, stop: asyncio.Event) -> None:
    """Waits for the lease and keeps services until `stop` is set. Raises ConfigError.

    A process that has lost the lease ends: what it had begun is another's now, and it comes back as a follower.
    """
    metrics = OperatorMetrics()
    metrics.serve(config.metrics_port)
    async with client.ApiClient(await _configuration()) as api:

        async def act() -> None:
            logger.info("leads", extra={"identity": config.identity})
            metrics.leads.set(1)
            cluster = Cluster(api)
            if not await cluster.serves(SERVICE):
                # Kopf would wait for ever.
                raise ConfigError("the cluster knows no InferenceService: apply manifests/crd first")
            try:
                await Watching(cluster, config, metrics).run(stop)
            finally:
                metrics.leads.set(0)

        await lead(config, api, act, stop)
    if not stop.is_set():
        logger.error("the lease is lost, so another may act: start again to wait for it")


async def _configuration() -> client.Configuration:
    configuration = client.Configuration()
    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST"):
            kubernetes_config.load_incluster_config(client_configuration=configuration)
        else:
            await kubernetes_config.load_kube_config(client_configuration=configuration)
    except kubernetes_config.ConfigException as error:
        raise ConfigError(f"no cluster is known here ({error}): run in a pod, or set KUBECONFIG") from error
    return configuration


def build_config(arguments: argparse.Namespace) -> OperatorConfig:
    """The config that the flags ask for. Raises ConfigError."""
    return OperatorConfig(
        identity=arguments.identity,
        namespace=arguments.namespace or _own_namespace(),
        images=Images(
            gateway=arguments.gateway_image,
            router=arguments.router_image,
            engine=arguments.engine_image,
            sidecar=arguments.sidecar_image,
        ),
        lease_duration=arguments.lease_duration,
        resync=arguments.resync,
        look_again=arguments.look_again,
        scale_interval=arguments.scale_interval,
        workers=arguments.workers,
        metrics_port=arguments.metrics_port,
    )


def _own_namespace() -> str:
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError:
        raise ConfigError("--namespace is missing: outside of a pod, name the namespace that holds the lease") from None


def build_parser() -> argparse.ArgumentParser:
    """The flags; each default is the config's own."""
    parser = argparse.ArgumentParser(
        prog="python -m quire.operator",
        description="Makes InferenceServices true in a Kubernetes cluster.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default, images = OperatorConfig(identity="-", namespace="-"), Images()
    option = parser.add_argument
    option(
        "--identity",
        default=os.environ.get("POD_NAME") or f"{socket.gethostname()}-{os.getpid()}",
        help="tells operators apart in the lease (default: POD_NAME, or host and process)",
    )
    option("--namespace", default="", help="of the lease (default: the pod's own)")
    for name in ("gateway", "router", "engine", "sidecar"):
        image = getattr(images, name)
        option(f"--{name}-image", default=image, metavar="IMAGE", help="where a service names none (%(default)s)")
    option(
        "--lease-duration",
        type=int,
        default=default.lease_duration,
        metavar="SECONDS",
        help="after so long without a word from the leader another leads (default: %(default)s)",
    )
    option(
        "--resync",
        type=float,
        default=default.resync,
        metavar="SECONDS",
        help="how often everything is listed anew (default: %(default)s)",
    )
    option(
        "--look-again",
        type=float,
        default=default.look_again,
        metavar="SECONDS",
        help="when to look again at a service that lacks a Secret or the like (default: %(default)s)",
    )
    option(
        "--scale-interval",
        type=float,
        default=default.scale_interval,
        metavar="SECONDS",
        help="time between two measurements of the load of services that scale with it (default: %(default)s)",
    )
    option("--workers", type=int, default=default.workers, help="services looked at a time (default: %(default)s)")
    option("--metrics-port", type=int, default=0, metavar="PORT", help="Prometheus metrics over HTTP; 0: off")
    option("--log-level", default="info", choices=("debug", "info", "warning", "error"), help="(default: %(default)s)")
    option("--log-format", default="text", choices=[style.value for style in LogFormat], help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
