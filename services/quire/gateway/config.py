"""What a gateway process is started with."""

from __future__ import annotations

from dataclasses import dataclass

from quire.gateway.access.ledger import MAX_WORKERS
from quire.gateway.tools.choice import ToolFormat
from quire.service.errors import ConfigError
from quire.service.tls_files import PeerTlsFiles, TlsFiles

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Addresses are gRPC's except `host` and `port`, where HTTP listens; port 0 picks a free one. Times in seconds."""

    routers: tuple[str, ...]
    # As `quire.service.checkpoint.locate` takes it.
    model: str = ""
    served_model_names: tuple[str, ...] = ()
    # Tokens of prompt and output, where engines hold less than the model's context; None: the model's.
    max_model_len: int | None = None
    # How the model writes calls to tools; None: as its chat template says.
    tool_call_format: ToolFormat | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_listen: str = "127.0.0.1:8001"
    # A request that no router takes for this long ends with UNAVAILABLE.
    router_timeout: float = 10.0
    # What is in flight may finish for this long after the process was asked to stop.
    grace: float = 30.0
    max_body_bytes: int = 4 * _MIB
    # Empty: open to everybody. See quire.gateway.access.keys.
    api_keys: str = ""
    # See quire.service.tls.
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    # TLS to the routers; None: plain text.
    router_tls: PeerTlsFiles | None = None
    log_prompts: bool = False
    # Processes on one port.
    workers: int = 1
    # How often the files are looked at.
    reload_interval: float = 1.0
    # In flight in this process; outputs that one request may ask for.
    max_requests: int = 1024
    max_choices: int = 128
    max_header_bytes: int = 32 << 10
    # A reader that takes nothing for so long is cut off.
    write_timeout: float = 30.0
    # For a request's arrival, and for all of it.
    read_timeout: float = 30.0
    request_timeout: float | None = None

    @property
    def tls(self) -> TlsFiles | None:
        """None: plain text. Raises ConfigError if half of it is given."""
        return TlsFiles.given(self.tls_cert, self.tls_key, self.tls_client_ca)

    def __post_init__(self) -> None:
        if not self.routers or not all(self.routers):
            raise ConfigError("--routers names no router: give at least one address, such as 127.0.0.1:9000")
        if len(set(self.routers)) != len(self.routers):
            raise ConfigError(f"--routers names an address twice: {','.join(self.routers)}")
        if not all(self.served_model_names):
            raise ConfigError("--served-model-name holds an empty name: remove it")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}: it must lie in [0, 65535]")
        if not self.grpc_listen:
            raise ConfigError("--grpc-listen is empty: give an address, such as 127.0.0.1:8001")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"--max-model-len is {self.max_model_len}: it must be at least 2 tokens")
        if self.router_timeout <= 0:
            raise ConfigError(f"--router-timeout is {self.router_timeout}: it must be above 0 seconds")
        if self.grace < 0:
            raise ConfigError(f"--grace is {self.grace}: it must be at least 0 seconds")
        if not 1 <= self.workers <= MAX_WORKERS:
            raise ConfigError(f"--workers is {self.workers}: it must lie in [1, {MAX_WORKERS}]")
        for name in ("max_requests", "max_choices"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
        if self.max_header_bytes < 1024:
            raise ConfigError(f"--max-header-bytes is {self.max_header_bytes}: it must be at least 1024")
        TlsFiles.given(self.tls_cert, self.tls_key, self.tls_client_ca)
        for name in ("reload_interval", "read_timeout", "write_timeout", "request_timeout"):
            if (seconds := getattr(self, name)) is not None and not seconds > 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {seconds}: it must be above 0 seconds")
        if self.max_body_bytes < 1024:
            raise ConfigError(f"--max-body-bytes is {self.max_body_bytes}: it must be at least 1024")
