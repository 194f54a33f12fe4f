"""What the engine's two processes say to each other: the server (gRPC, asyncio) and the core (the model).

Frames on a socket pair: a length (uint32, little-endian) and a pickle. Both ends are this package in one version on
one machine, started by one parent; nothing else can reach the socket.
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass

from quire.engine.config import CoreConfig
from quire.engine.inspection import Inspection
from quire.engine.runner import DeviceInfo
from quire.engine.stats import EngineStats
from quire.service.logs import LogFormat
from quire.service.request import Request, Update

LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class StartCore:
    """The first message to a core. It logs as its server does."""

    config: CoreConfig
    name: str
    log_level: str
    log_format: LogFormat


@dataclass(frozen=True, slots=True)
class Submit:
    """A request under a key that the server chose."""

    key: int
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    """End the request under `key`, if there still is one."""

    key: int


@dataclass(frozen=True, slots=True)
class Inspect:
    """Tell what the core holds, in an Inspected with the same `ticket`."""

    ticket: int
    max_cells: int
    max_sequences: int


@dataclass(frozen=True, slots=True)
class Loading:
    """The core is starting; `progress` goes from 0 to 1."""

    activity: str
    progress: float


@dataclass(frozen=True, slots=True)
class Ready:
    """The core takes requests from now on. `start_seconds` tells how long each phase of its start took."""

    model: str
    device: DeviceInfo
    max_model_len: int
    max_num_seqs: int
    num_pages: int
    start_seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Compiling:
    """The core compiles another kernel: what it does takes longer than it will take later."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The core could not start, or can't go on; it exits after this."""

    message: str


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the core is."""

    running: int
    waiting: int
    pending_prefill_tokens: int
    pages_total: int
    pages_available: int
    pages_cached: int
    preemptions: int
    stats: EngineStats

    @classmethod
    def at_start(cls, ready: Ready) -> Load:
        """That of a core that has done nothing yet."""
        return cls(0, 0, 0, ready.num_pages, ready.num_pages, 0, 0, EngineStats())


@dataclass(frozen=True, slots=True)
class Stepped:
    """One step's outcome: what to tell whom, and which page hashes came and went."""

    updates: tuple[Update, ...]
    stored: tuple[bytes, ...]
    removed: tuple[bytes, ...]
    load: Load


@dataclass(frozen=True, slots=True)
class Inspected:
    """The answer to an Inspect, made between two steps; `load` is of the same moment."""

    ticket: int
    inspection: Inspection
    load: Load


ToCore = StartCore | Submit | Cancel | Inspect
FromCore = Loading | Ready | Compiling | Failed | Stepped | Inspected


def encode(message: ToCore | FromCore) -> bytes:
    """The frame of a message."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(body)) + body
