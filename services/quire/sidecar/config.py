"""The sidecar's configuration, filled from its command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.service.errors import ConfigError
from quire.sidecar.drafting.drafter import DraftingLimits


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What one constraint may cost before it is refused.

    `compile_seconds` bounds compiling and the first mask together; `compile_mib` bounds the memory that takes.
    """

    compile_seconds: float = 2.0
    compile_mib: int = 256
    source_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        _more_than_nothing("--compile-seconds", self.compile_seconds)
        _at_least("--compile-mib", self.compile_mib, 1)
        _at_least("--source-bytes", self.source_bytes, 1)


@dataclass(frozen=True, slots=True)
class MaskLimits:
    """What masks may cost before the sequences that need them end.

    A step waits `row_seconds` for each mask and `step_seconds` for all of them. A sequence may use `row_seconds` of CPU
    time, and `token_seconds` more with each token: a slow mask now and then passes, one after another does not.
    """

    row_seconds: float = 0.25
    step_seconds: float = 1.0
    token_seconds: float = 0.005

    def __post_init__(self) -> None:
        _more_than_nothing("--mask-seconds", self.row_seconds)
        _more_than_nothing("--mask-step-seconds", self.step_seconds)
        _more_than_nothing("--mask-token-seconds", self.token_seconds)


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """How many compiled grammars are kept, and how much memory they may take."""

    entries: int = 4096
    mib: int = 512

    def __post_init__(self) -> None:
        _at_least("--cache-entries", self.entries, 1)
        _at_least("--cache-mib", self.mib, 1)


@dataclass(frozen=True, slots=True)
class SidecarConfig:
    """What `python -m quire.sidecar` runs with. `name` stands in logs and traces, `model` is empty for the
    embedded default.

    `compile_workers` is how many constraints are tried at once, `mask_threads` how many threads fill a batch's rows (0:
    one per core). `metrics_port` 0 serves no metrics.
    """

    listen: str
    name: str = "sidecar"
    model: str = ""
    limits: GrammarLimits = field(default_factory=GrammarLimits)
    masks: MaskLimits = field(default_factory=MaskLimits)
    cache: CacheLimits = field(default_factory=CacheLimits)
    drafting: DraftingLimits = field(default_factory=DraftingLimits)
    compile_workers: int = 2
    mask_threads: int = 0
    metrics_port: int = 0

    def __post_init__(self) -> None:
        if not self.listen:
            raise ConfigError("--listen is empty: give an address such as unix:/run/quire/sidecar.sock", field="listen")
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


def _more_than_nothing(flag: str, value: float) -> None:
    if value <= 0:
        raise ConfigError(f"{flag} is {value}: give more than 0", field=flag[2:].replace("-", "_"))
