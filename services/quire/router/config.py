"""What a router process is started with."""

from __future__ import annotations

from dataclasses import dataclass

from quire.service.errors import ConfigError
from quire.service.tls_files import PeerTlsFiles, TlsFiles


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Addresses are gRPC's; instead of them `engines` may be one name that `discovery` knows. Times are in seconds."""

    listen: str
    engines: tuple[str, ...]
    name: str = "router-0"
    # A request for which no engine is ready waits this long for one.
    hold: float = 5.0
    # Whether it is ready without an engine, too: a request that is held makes one start.
    ready_without_engines: bool = False
    # How often a request may be moved to another engine, without a token in between, before its error is passed on.
    max_moves: int = 3
    # The share of the requests in flight that may be moved at a time (see `budget`); the others wait for their turn.
    retry_share: float = 1.0
    # An engine that has work and does nothing for so long is lost. Longer than any step takes, and than a grammar may
    # take to compile.
    stall_timeout: float = 30.0
    # Between two look-ups of a name in DNS.
    resolve_interval: float = 5.0
    # What is in flight may finish for this long after the process was asked to stop.
    grace: float = 30.0
    # The shortest time between two load reports of an engine.
    load_interval: float = 0.05
    # Updates (one step's tokens of one request, about 100 bytes) that wait for a gateway that does not read. At 80
    # steps a second and 256 sequences this is 6 seconds.
    max_queued_updates: int = 1 << 17
    # 0 is off.
    metrics_port: int = 0
    # For gateways, and to engines; None: plain text. How often the files are looked at.
    tls: TlsFiles | None = None
    engine_tls: PeerTlsFiles | None = None
    reload_interval: float = 1.0

    def __post_init__(self) -> None:
        if not self.listen:
            raise ConfigError("--listen is empty: give an address, such as 127.0.0.1:9000")
        if not self.engines or not all(self.engines):
            raise ConfigError("--engines holds an empty address: give them as 127.0.0.1:9100,127.0.0.1:9101")
        if len(set(self.engines)) != len(self.engines):
            raise ConfigError(f"--engines names an address twice: {','.join(self.engines)}")
        if not self.name:
            raise ConfigError("--name is empty: give the router a name for logs and traces, such as router-0")
        for flag, value in (("--hold", self.hold), ("--grace", self.grace)):
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{flag} is {value:g}: it must be at least 0 seconds")
        for flag, value, low, high in (
            ("--load-interval", self.load_interval, 0.001, 60),
            ("--stall-timeout", self.stall_timeout, 0.01, 3600),
            ("--resolve-interval", self.resolve_interval, 0.01, 3600),
            ("--reload-interval", self.reload_interval, 0.01, 3600),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{flag} is {value:g}: it must lie in [{low:g}, {high:g}] seconds")
        if not 0 <= self.retry_share < float("inf"):
            raise ConfigError(f"--retry-share is {self.retry_share:g}: it must be at least 0")
        if self.max_moves < 0:
            raise ConfigError(f"--max-moves is {self.max_moves}: it must be at least 0")
        if self.max_queued_updates < 1:
            raise ConfigError(f"--max-queued-updates is {self.max_queued_updates}: it must be at least 1")
        if not 0 <= self.metrics_port <= 65535:
            raise ConfigError(f"--metrics-port is {self.metrics_port}: it must lie in [0, 65535], 0 is off")
