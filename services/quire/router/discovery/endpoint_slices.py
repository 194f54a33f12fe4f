"""Engines by the EndpointSlices of Services in Kubernetes: a pod comes and goes within moments of its probe.

A slice has its Service's labels. Two of them say that its engines are on trial (see `canary`).
Needs the package `kubernetes` and the rights to get, list and watch endpointslices.discovery.k8s.io in the namespace.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from quire.router.canary import Canary
from quire.router.discovery import Addresses
from quire.service.errors import ConfigError

try:
    import aiohttp
    from kubernetes.aio import client, config
    from kubernetes.aio.watch import Watch
except ImportError as missing:
    raise ConfigError("--engines names a Service: install quire[router-kubernetes], which can watch it") from missing

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

# After this long the API server ends a watch and the slices are listed again: what went wrong unseen is put right.
_WATCH_SECONDS = 240

# A list takes no longer, and no watch ends so much later than it should: the connection has broken without a word.
_ANSWER_SECONDS = 10.0

_FIRST_RETRY, _LAST_RETRY = 0.2, 10.0

_REVISION, _PERCENT = "quire.dev/revision", "quire.dev/canary-percent"

_Slice = Mapping[str, Any]

logger = logging.getLogger(__name__)


def addresses_of(slices: Iterable[_Slice], port: str) -> Addresses:
    """The addresses of ready endpoints in EndpointSlices, as the API's JSON has them.

    `port` is a port's name or number; empty means the only one. A slice without such a port has no addresses.
    """
    found = {}
    for each in slices:
        number = _port_of(each, port)
        for endpoint in each.get("endpoints") or ():
            # Not known means ready, as the API has it.
            if number is not None and endpoint.get("conditions", {}).get("ready") is not False:
                host = endpoint["addresses"][0]
                address = f"[{host}]:{number}" if each["addressType"] == "IPv6" else f"{host}:{number}"
                found[address] = _canary(each["metadata"].get("labels") or {})
    return found


def _canary(labels: Mapping[str, str]) -> Canary | None:
    percent = labels.get(_PERCENT, "")
    # Whatever else stands there is nobody's wish to try an engine out.
    return Canary(labels.get(_REVISION, ""), min(int(percent), 100)) if percent.isdecimal() else None


def _port_of(each: _Slice, wanted: str) -> int | None:
    ports = [port for port in each.get("ports") or () if port.get("port")]
    chosen = [port for port in ports if wanted in ("", port.get("name"), str(port["port"]))]
    return int(chosen[0]["port"]) if len(chosen) == 1 else None


class EndpointSlices:
    """Watches the slices of these Services. `port` is a port's name or number; empty means the only one."""

    def __init__(
        self, configuration: client.Configuration, services: Sequence[str], *, namespace: str, port: str = ""
    ) -> None:
        self._configuration = configuration
        self._selector = f"kubernetes.io/service-name in ({','.join(services)})"
        self._namespace = namespace
        self._port = port

    @classmethod
    async def here(cls, services: Sequence[str], *, namespace: str = "", port: str = "") -> EndpointSlices:
        """As the pod's service account, or by the kubeconfig of who runs the router; `namespace` empty is the pod's.

        Raises ConfigError if neither account nor namespace is known.
        """
        configuration = client.Configuration()
        try:
            if os.environ.get("KUBERNETES_SERVICE_HOST"):
                config.load_incluster_config(client_configuration=configuration)
            else:
                # The package looks at the variable only once, when it is imported.
                where = os.environ.get("KUBECONFIG")
                await config.load_kube_config(config_file=where, client_configuration=configuration)
        except config.ConfigException as error:
            raise ConfigError(
                f"--engines names a Service, but the Kubernetes API is not known here ({error}): run in a pod with a "
                "service account, or set KUBECONFIG"
            ) from error
        return cls(configuration, services, namespace=namespace or _own_namespace(), port=port)

    async def addresses(self) -> AsyncIterator[Addresses]:
        """Those of the Services' ready pods, whenever they have changed."""
        known: Addresses | None = None
        delay, failure = _FIRST_RETRY, ""
        async with client.ApiClient(self._configuration) as api:
            while True:
                try:
                    async with aclosing(self._follow(client.DiscoveryV1Api(api))) as changes:
                        async for found in changes:
                            delay, failure = _FIRST_RETRY, ""
                            if found != known:
                                known = found
                                yield found
                    continue
                except (client.ApiException, aiohttp.ClientError, TimeoutError, OSError) as error:
                    if str(error) != failure:
                        failure = str(error)
                        logger.warning("can't watch EndpointSlices: %s", failure, extra={"selector": self._selector})
                await asyncio.sleep(delay)
                delay = min(delay * 2, _LAST_RETRY)

    async def _follow(self, api: client.DiscoveryV1Api) -> AsyncGenerator[Addresses, None]:
        """Lists and watches until the watch ends."""
        what: dict[str, Any] = {"namespace": self._namespace, "label_selector": self._selector}
        listed = await api.list_namespaced_endpoint_slice(**what, _request_timeout=_ANSWER_SECONDS)
        found = api.api_client.sanitize_for_serialization(listed)
        slices: dict[str, _Slice] = {each["metadata"]["name"]: each for each in found["items"]}
        yield addresses_of(slices.values(), self._port)
        version = found["metadata"]["resourceVersion"]
        async with Watch() as watch:
            async for event in watch.stream(
                api.list_namespaced_endpoint_slice, **what, resource_version=version,
                timeout_seconds=_WATCH_SECONDS, _request_timeout=_WATCH_SECONDS + _ANSWER_SECONDS,
            ):  # fmt: skip
                each = event["raw_object"]
                if event["type"] == "DELETED":
                    slices.pop(each["metadata"]["name"], None)
                elif event["type"] in ("ADDED", "MODIFIED"):
                    slices[each["metadata"]["name"]] = each
                yield addresses_of(slices.values(), self._port)


def _own_namespace() -> str:
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError:
        raise ConfigError("--engines names a Service without a namespace: give it as NAMESPACE/SERVICE") from None
