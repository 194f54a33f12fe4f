"""The sidecar's configuration, filled from its command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.service.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What one constraint may cost before it is refused.

    `compile_seconds` bounds compiling and the first mask together; `compile_mib` bounds the memory that takes.
    """

    compile_seconds: float = 2.0
    compile_mib: int = 256
    source_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        if self.compile_seconds <= 0:
            raise ConfigError(f"--compile-seconds is {self.compile_seconds}: give more than 0", field="compile_seconds")
        _at_least("--compile-mib", self.compile_mib, 1)
        _at_least("--source-bytes", self.source_bytes, 1)


@dataclass(frozen=True, slots=True)
class SidecarConfig:
    """What `python -m quire.sidecar` runs with. `name` stands in logs and traces, `model` is empty for the
    embedded default.

    `cache_mib` bounds the compiled grammars that are kept, `compile_workers` how many are tried at once, and
    `mask_threads` how many threads fill a batch's rows (0: one per core). `metrics_port` 0 serves no metrics.
    """

    listen: str
    name: str = "sidecar"
    model: str = ""
    limits: GrammarLimits = field(default_factory=GrammarLimits)
    cache_mib: int = 512
    compile_workers: int = 2
    mask_threads: int = 0
    metrics_port: int = 0

    def __post_init__(self) -> None:
        if not self.listen:
            raise ConfigError("--listen is empty: give an address such as unix:/run/quire/sidecar.sock", field="listen")
        _at_least("--cache-mib", self.cache_mib, 1)
        _at_least("--compile-workers", self.compile_workers, 1)
        _at_least("--mask-threads", self.mask_threads, 0)
        if not 0 <= self.metrics_port < 65536:
            raise ConfigError(
                f"--metrics-port is {self.metrics_port}: give a port from 1 to 65535, or 0 for none",
                field="metrics_port",
            )


def _at_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{flag} is {value}: give at least {least}", field=flag[2:].replace("-", "_"))
