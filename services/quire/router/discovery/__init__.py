"""Where the router's engines are: a list, a name in DNS or a Service of Kubernetes. One file for each.

`links.EngineLinks` follows one of them. An address that is found says only that an engine may be there: whether it
takes requests is what it says itself, on its session.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol, TypeAlias

from quire.router.canary import Canary
from quire.service.errors import ConfigError

DNS, KUBERNETES = "dns:", "kubernetes:"

# Engines' gRPC addresses, and those that are on trial.
Addresses: TypeAlias = Mapping[str, Canary | None]


class Discovery(Protocol):
    """A source of engines' gRPC addresses."""

    def addresses(self) -> AsyncIterator[Addresses]:
        """All addresses: at once, and again whenever they have changed. A source that fails keeps those it had."""


async def discovery_of(engines: Sequence[str], *, resolve_interval: float) -> Discovery:
    """What `--engines` asks for; `resolve_interval` is the time between two look-ups in DNS, in seconds.

    Raises ConfigError.
    """
    from quire.router.discovery.dns import DnsNames
    from quire.router.discovery.static import StaticAddresses

    first, *others = engines
    scheme = next((scheme for scheme in (DNS, KUBERNETES) if any(entry.startswith(scheme) for entry in engines)), "")
    if scheme and others:
        raise ConfigError(f"--engines names {first} and others: give one {scheme} name alone, or addresses")
    if scheme == DNS:
        host, port = _host_and_port(first.removeprefix(DNS).removeprefix("///"), f"{DNS}NAME:PORT")
        return DnsNames(host, port, interval=resolve_interval)
    if scheme == KUBERNETES:
        # Only who asks for it needs the package.
        from quire.router.discovery.endpoint_slices import EndpointSlices

        namespace, _, services = first.removeprefix(KUBERNETES).rpartition("/")
        services, _, port_name = services.partition(":")
        if not all(services.split("+")):
            raise ConfigError(f"--engines is {first}: give a Service as {KUBERNETES}NAMESPACE/SERVICE:PORT")
        return await EndpointSlices.here(services.split("+"), namespace=namespace, port=port_name)
    return StaticAddresses(engines)


def _host_and_port(value: str, form: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--engines is {DNS}{value}: give a name and a port as {form}")
    return host, int(port)
