"""What each API key has used: token buckets and requests in flight, in memory that all workers of a gateway share.

Without the sharing, a key's limit would depend on which worker its connections happen to reach. `gate` asks for every
request; a lock between processes and a few packed numbers cost it some microseconds.
"""

from __future__ import annotations

import fcntl
import mmap
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

from quire.service.errors import ConfigError

MAX_WORKERS = 64
# Distinct keys over the life of a gateway. The file is sparse: rows that are not used take no memory.
_ROWS = 1 << 16

# digest; (level, time of that level) of each bucket. A time of 0: never used, full.
_ROW = struct.Struct("=32s4d")
_BUCKET = struct.Struct("=2d")
_COUNT = struct.Struct("=i")
_COUNTS_AT = _ROW.size * _ROWS
_SIZE = _COUNTS_AT + _COUNT.size * _ROWS * MAX_WORKERS


class Meter(Enum):
    """The buckets of a key; the values are their places in its row."""

    REQUESTS = 32
    TOKENS = 48


class Ledger:
    """One worker's view of the shared numbers. `path` is empty for a gateway of one process.

    A worker that is started again begins with no requests in flight: what it had is gone with it.
    """

    def __init__(self, path: str = "", worker: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        # "a+b" makes the file if it is not there, and what is written by other workers stays.
        self._file = Path(path).open("a+b") if path else None  # noqa: SIM115
        if self._file is not None:
            self._file.truncate(_SIZE)
        self._memory = mmap.mmap(self._file.fileno() if self._file is not None else -1, _SIZE)
        self._worker = worker
        # That of the machine since it was started, the same for all processes.
        self._clock = clock
        self._rows: dict[bytes, int] = {}
        with self._locked():
            counts = self._count_at(0)
            self._memory[counts : counts + _COUNT.size * _ROWS] = bytes(_COUNT.size * _ROWS)

    def close(self) -> None:
        """Gives the memory back; the file stays for the other workers."""
        self._memory.close()
        if self._file is not None:
            self._file.close()

    def take(self, digest: bytes, meter: Meter, amount: float, per_minute: int) -> float:
        """Takes `amount` out of a bucket; returns 0, or in how many seconds it will hold enough (nothing is taken).

        The bucket holds at most `per_minute` and is filled evenly, `per_minute` a minute.
        """
        with self._locked():
            at = self._bucket_at(digest, meter)
            level, now = self._level(at, per_minute)
            if level < amount:
                return (amount - level) * 60 / per_minute
            _BUCKET.pack_into(self._memory, at, level - amount, now)
            return 0.0

    def spend(self, digest: bytes, meter: Meter, amount: float, per_minute: int) -> None:
        """Takes `amount` out of a bucket even if that leaves less than nothing in it."""
        with self._locked():
            at = self._bucket_at(digest, meter)
            level, now = self._level(at, per_minute)
            _BUCKET.pack_into(self._memory, at, level - amount, now)

    def level(self, digest: bytes, meter: Meter, per_minute: int) -> float:
        """What a bucket holds now; negative if more was spent than it held."""
        with self._locked():
            return self._level(self._bucket_at(digest, meter), per_minute)[0]

    def enter(self, digest: bytes, limit: int) -> bool:
        """Counts a request of this worker in, unless `limit` are in flight on all workers."""
        with self._locked():
            row = self._row(digest)
            if sum(self._in_flight(row, worker) for worker in range(MAX_WORKERS)) >= limit:
                return False
            self._add(row, 1)
            return True

    def leave(self, digest: bytes) -> None:
        """Counts it out."""
        with self._locked():
            self._add(self._row(digest), -1)

    def _level(self, at: int, per_minute: int) -> tuple[float, float]:
        level, then = _BUCKET.unpack_from(self._memory, at)
        now = self._clock()
        if not then:
            return float(per_minute), now
        return min(float(per_minute), level + (now - then) * per_minute / 60), now

    def _bucket_at(self, digest: bytes, meter: Meter) -> int:
        return self._row(digest) * _ROW.size + meter.value

    def _in_flight(self, row: int, worker: int) -> int:
        count: int = _COUNT.unpack_from(self._memory, self._count_at(row, worker))[0]
        return count

    def _add(self, row: int, change: int) -> None:
        count = self._in_flight(row, self._worker) + change
        _COUNT.pack_into(self._memory, self._count_at(row), count)

    def _count_at(self, row: int, worker: int | None = None) -> int:
        return _COUNTS_AT + ((self._worker if worker is None else worker) * _ROWS + row) * _COUNT.size

    def _row(self, digest: bytes) -> int:
        row = self._rows.get(digest)
        if row is None:
            row = self._rows[digest] = self._find_row(digest)
        return row

    def _find_row(self, digest: bytes) -> int:
        # Open addressing: once a row is a key's it stays so.
        start = int.from_bytes(digest[:4], "little")
        for offset in range(_ROWS):
            row = (start + offset) % _ROWS
            at = row * _ROW.size
            found = self._memory[at : at + len(digest)]
            if found == digest:
                return row
            if found == bytes(len(digest)):
                self._memory[at : at + len(digest)] = digest
                return row
        raise ConfigError(f"over {_ROWS} API keys were used since the gateway's start: restart it", field="api_keys")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # Only between processes, and let go by the kernel when one dies. The loop's thread is alone in its process.
        if self._file is None:
            yield
            return
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)
