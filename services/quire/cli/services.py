"""From what `quire serve` was asked for to the processes that do it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quire.cli.flags import at_least
from quire.cli.gpus import VISIBLE
from quire.cli.probes import follow_loading, until_serving
from quire.service.errors import ConfigError
from quire.service.pem import read_pem
from quire.service.supervisor import ChildSpec
from quire.service.tls_files import TlsFiles

MAX_ENGINES = 64

# Requests in flight may go on for this long after Ctrl-C.
GRACE_SECONDS = 2.0

# An engine that died is back by then, unless its model is large: what it was answering goes on.
HOLD_SECONDS = 60.0

Report = Callable[[str, str, float], None]


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """What to serve and where. None leaves an engine's flag out: its own default holds."""

    model: str = ""
    engines: int = 1
    dtype: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    # None is off.
    grpc_port: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    num_pages: int | None = None
    kv_cache_bytes: int | None = None
    # Per engine.
    threads: int | None = None
    log_level: str = "info"
    log_format: str = "text"
    # For the gateway: a file of `quire keys`, empty is open to everybody; processes on its port.
    api_keys: str = ""
    workers: int | None = None
    # PEM files for its HTTP and gRPC, all empty is plain text; how the model writes calls to tools, empty is as its
    # template tells.
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    tool_call_format: str = ""
    # For the engines: off or auto, and how many drafts per request and step.
    speculation: str | None = None
    num_speculative_tokens: int | None = None
    # The folder of an EAGLE head.
    speculative_model: str | None = None
    # What they run on: auto, cpu or cuda; how much of a GPU's memory each may take, a share.
    device: str = "auto"
    gpu_memory_utilization: float | None = None
    # In which type they keep keys and values: auto or fp8.
    kv_cache_dtype: str | None = None
    # How many GPUs share the model in each.
    tensor_parallel_size: int | None = None
    # The GPUs of each engine, as CUDA_VISIBLE_DEVICES has them; none is what each finds.
    gpus: tuple[str, ...] = ()

    @property
    def tls(self) -> TlsFiles | None:
        """None: plain text. Raises ConfigError if half of it is given."""
        return TlsFiles.given(self.tls_cert, self.tls_key, self.tls_client_ca)

    def __post_init__(self) -> None:
        # Said now, not when all is loaded.
        if self.tls is not None:
            read_pem(self.tls.paths)
        if not 1 <= self.engines <= MAX_ENGINES:
            raise ConfigError(f"--engines is {self.engines}: it must lie in [1, {MAX_ENGINES}]", field="engines")
        for name, value in (("port", self.port), ("grpc-port", self.grpc_port)):
            if value is not None and not 0 <= value <= 65535:
                raise ConfigError(f"--{name} is {value}: it must lie in [0, 65535]", field=name)
        if self.port and self.port == self.grpc_port:
            raise ConfigError(f"--port and --grpc-port are both {self.port}: choose two ports", field="grpc_port")
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise ConfigError(
                f"--gpu-memory-utilization is {share:g}: give a share, like 0.9", field="gpu_memory_utilization"
            )
        if not self.host:
            raise ConfigError("--host is empty: give an address of this machine, such as 127.0.0.1", field="host")
        for name in (
            "num_speculative_tokens",
            "workers",
            "max_model_len",
            "max_num_seqs",
            "num_pages",
            "kv_cache_bytes",
            "threads",
            "tensor_parallel_size",
        ):
            value = getattr(self, name)
            if value is not None:
                at_least(f"--{name.replace('_', '-')}", value, 2 if name == "max_model_len" else 1)

    @property
    def num_processes(self) -> int:
        """A gateway, a router, and an engine with its sidecar for each engine."""
        return 2 + 2 * self.engines

    @property
    def local_host(self) -> str:
        """An address at which this machine reaches `host`."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    @property
    def url(self) -> str:
        """Where this machine finds the HTTP API."""
        scheme = "http" if self.tls is None else "https"
        return f"{scheme}://{_address(self.local_host, self.port)}"

    @property
    def threads_per_engine(self) -> int:
        """The machine's cores divided among the engines, unless they were given."""
        return self.threads or max(1, _cores() // self.engines)


def engine_addresses(config: ServeConfig, folder: Path) -> tuple[str, ...]:
    """Where the engines listen."""
    return tuple(_socket(folder, f"engine-{index}") for index in range(config.engines))


def stages(config: ServeConfig, folder: Path, report: Report) -> list[list[ChildSpec]]:
    """The processes that serve `config`, in the order in which they stop. Their sockets are in `folder`.

    `report(name, activity, fraction)` hears how engines load.
    """
    return [
        [_gateway(config, folder)],
        [_router(config, folder, engine_addresses(config, folder))],
        [_engine(config, folder, index, report) for index in range(config.engines)],
        [_sidecar(config, folder, index) for index in range(config.engines)],
    ]


def _gateway(config: ServeConfig, folder: Path) -> ChildSpec:
    # The socket is always there: it is plain, whatever certificates clients must show elsewhere.
    listens = health = _socket(folder, "gateway")
    if config.grpc_port is not None:
        listens = f"{_address(config.host, config.grpc_port)},{health}"
    flags = {
        "--routers": _socket(folder, "router"),
        "--model": config.model,
        "--host": config.host,
        "--port": config.port,
        "--grpc-listen": listens,
        "--max-model-len": config.max_model_len,
        "--tool-call-format": config.tool_call_format,
        # Not resolved: a renewed file may be another one behind the same link.
        "--api-keys": config.api_keys and Path(config.api_keys).absolute(),
        "--tls-cert": config.tls_cert and Path(config.tls_cert).absolute(),
        "--tls-key": config.tls_key and Path(config.tls_key).absolute(),
        "--tls-client-ca": config.tls_client_ca and Path(config.tls_client_ca).absolute(),
        "--workers": config.workers,
        "--grace": GRACE_SECONDS,
    }

    return ChildSpec(
        "gateway", _command("gateway", flags, config), partial(until_serving, health), _environment(config)
    )


def _router(config: ServeConfig, folder: Path, engines: Sequence[str]) -> ChildSpec:
    address = _socket(folder, "router")
    flags = {
        "--listen": address,
        "--name": "router",
        "--engines": ",".join(engines),
        "--hold": HOLD_SECONDS,
        "--grace": GRACE_SECONDS,
    }
    return ChildSpec("router", _command("router", flags, config), partial(until_serving, address))


def _engine(config: ServeConfig, folder: Path, index: int, report: Report) -> ChildSpec:
    name = f"engine-{index}"
    address = _socket(folder, name)
    flags = {
        "--listen": address,
        "--name": name,
        "--sidecar": _socket(folder, f"sidecar-{index}"),
        "--model": config.model,
        "--device": config.device,
        "--dtype": config.dtype,
        "--speculation": config.speculation,
        "--num-speculative-tokens": config.num_speculative_tokens,
        "--speculative-model": config.speculative_model,
        "--max-model-len": config.max_model_len,
        "--max-num-seqs": config.max_num_seqs,
        "--num-pages": config.num_pages,
        "--kv-cache-bytes": config.kv_cache_bytes,
        "--gpu-memory-utilization": config.gpu_memory_utilization,
        "--kv-cache-dtype": config.kv_cache_dtype,
        "--tensor-parallel-size": config.tensor_parallel_size,
        "--threads": config.threads_per_engine,
        "--grace": GRACE_SECONDS,
    }

    async def ready() -> None:
        await follow_loading(address, partial(report, name))
        await until_serving(address)

    environment = _environment(config)
    if config.gpus:
        environment[VISIBLE] = config.gpus[index]
    return ChildSpec(name, _command("engine", flags, config), ready, environment)


def _sidecar(config: ServeConfig, folder: Path, index: int) -> ChildSpec:
    name = f"sidecar-{index}"
    address = _socket(folder, name)
    flags = {"--listen": address, "--name": name, "--model": config.model}
    return ChildSpec(name, _command("sidecar", flags, config), partial(until_serving, address), _environment(config))


def _command(service: str, flags: Mapping[str, object], config: ServeConfig) -> tuple[str, ...]:
    flags = {**flags, "--log-level": config.log_level, "--log-format": config.log_format}
    given = [f"{flag}={value}" for flag, value in flags.items() if value not in (None, "")]
    return (sys.executable, "-m", f"quire.{service}", *given)


def _environment(config: ServeConfig) -> dict[str, str]:
    # The command has found the model: what of it came from the hub is on this machine by now, and the services need not
    # ask the hub again.
    return {} if not config.model or Path(config.model).exists() else {"HF_HUB_OFFLINE": "1"}


def _socket(folder: Path, name: str) -> str:
    return f"unix:{folder / name}.sock"


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _cores() -> int:
    # Not os.cpu_count: a container or taskset may have fewer. macOS has no affinity.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
