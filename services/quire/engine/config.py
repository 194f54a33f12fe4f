"""What an engine is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from quire.engine.scheduler import SchedulerConfig
from quire.service.errors import ConfigError
from quire.service.logs import LogFormat

_SCHEDULER = SchedulerConfig()


class Dtype(Enum):
    """AUTO is the fastest that the device does well: on a CPU bfloat16 activations over the file's own weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """What the core process needs: model, batch, memory, sidecar.

    `max_model_len` 0 is the model's own; `num_pages` 0 is as many as `kv_cache_bytes` hold.
    """

    model: str = ""
    dtype: Dtype = Dtype.AUTO
    max_model_len: int = 0
    max_num_seqs: int = _SCHEDULER.max_num_seqs
    max_num_batched_tokens: int = _SCHEDULER.max_num_batched_tokens
    max_waiting: int = _SCHEDULER.max_waiting
    enable_prefix_caching: bool = True
    num_pages: int = 0
    kv_cache_bytes: int = 2 << 30
    threads: int = 0
    sidecar: str = ""
    sidecar_deadline_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("max_model_len", "num_pages", "threads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}: 0 chooses it", field=name)
        if self.kv_cache_bytes < 1 << 20:
            raise ConfigError(
                f"--kv-cache-bytes is {self.kv_cache_bytes}: it must be at least {1 << 20}", field="kv_cache_bytes"
            )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The whole service: where it listens, what it is called, and its core."""

    listen: str
    name: str = "engine-0"
    metrics_port: int = 0
    grace_s: float = 30.0
    log_level: str = "info"
    log_format: LogFormat = LogFormat.TEXT
    core: CoreConfig = field(default_factory=CoreConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.metrics_port < 65536:
            raise ConfigError(
                f"--metrics-port is {self.metrics_port}: give a port from 1 to 65535, or 0 for none",
                field="metrics_port",
            )
