"""What an operator process is started with."""

from __future__ import annotations

from dataclasses import dataclass

from quire.service.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Images:
    """What pods run where a service names no image of its own."""

    gateway: str = "quire-gateway:0.1.0"
    router: str = "quire-router:0.1.0"
    engine: str = "quire-engine:0.1.0"
    sidecar: str = "quire-sidecar:0.1.0"


@dataclass(frozen=True, slots=True)
class OperatorConfig:
    """Times are in seconds. `identity` tells operators apart in the lease; `namespace` is the lease's."""

    identity: str
    namespace: str
    images: Images = Images()
    lease: str = "quire-operator"
    lease_duration: int = 15
    # Everything is listed anew this often, in case a change went unnoticed.
    resync: float = 300.0
    # After this long a service is looked at again that lacks what nobody tells of, such as a Secret.
    look_again: float = 10.0
    # Between two measurements of the load of services that scale with it.
    scale_interval: float = 15.0
    # Services that are reconciled at a time.
    workers: int = 8
    # 0 is off.
    metrics_port: int = 0

    def __post_init__(self) -> None:
        if not self.identity:
            raise ConfigError("--identity is empty: give the operator a name of its own, such as its pod's")
        if not self.namespace:
            raise ConfigError("--namespace is empty: name the namespace that holds the lease")
        if not 3 <= self.lease_duration <= 3600:
            raise ConfigError(f"--lease-duration is {self.lease_duration}: it must lie in [3, 3600] seconds")
        if not 1 <= self.resync <= 86400:
            raise ConfigError(f"--resync is {self.resync:g}: it must lie in [1, 86400] seconds")
        if not 0.1 <= self.look_again <= 3600:
            raise ConfigError(f"--look-again is {self.look_again:g}: it must lie in [0.1, 3600] seconds")
        if not 0.1 <= self.scale_interval <= 3600:
            raise ConfigError(f"--scale-interval is {self.scale_interval:g}: it must lie in [0.1, 3600] seconds")
        if not 1 <= self.workers <= 256:
            raise ConfigError(f"--workers is {self.workers}: it must lie in [1, 256]")
        if not 0 <= self.metrics_port <= 65535:
            raise ConfigError(f"--metrics-port is {self.metrics_port}: it must lie in [0, 65535], 0 is off")
