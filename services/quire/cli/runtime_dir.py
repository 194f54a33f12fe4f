"""The folder of the sockets through which the services of one `quire serve` talk, and how `quire top` finds it.

Whoever made a folder holds a lock on it until its end, however it ends: a folder without one is left from a
`quire serve` that was killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from quire.service.errors import ConfigError

# Linux keeps a socket's path in 108 bytes with the final zero; macOS in 104.
_LONGEST_PATH = 103
_LONGEST_NAME = len("/sidecar-9999.sock")

_PREFIX = "quire-"
_ANNOUNCEMENT = "serve.json"


@dataclass(frozen=True, slots=True)
class Serving:
    """A running `quire serve`: where its HTTP API is, what it serves, and the addresses of its engines."""

    url: str
    model: str
    engines: tuple[str, ...]


@contextmanager
def runtime_dir() -> Iterator[Path]:
    """A new folder that only this user can enter, gone with all it holds at the end. Raises ConfigError."""
    path = _make()
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def announce(folder: Path, serving: Serving) -> None:
    """Lets `find_serving` find what is served from `folder`."""
    unfinished = folder / f"{_ANNOUNCEMENT}.new"
    unfinished.write_text(json.dumps(asdict(serving)))
    unfinished.rename(folder / _ANNOUNCEMENT)


def find_serving() -> list[Serving]:
    """Every `quire serve` that this user runs on this machine, the one that was started first in front."""
    folders = {path for parent in _parents() for path in parent.glob(f"{_PREFIX}*/{_ANNOUNCEMENT}")}
    found = []
    for path in sorted(folders):
        try:
            # Somebody else may have put it where everyone can.
            if path.stat().st_uid == os.getuid() and _is_locked(path.parent):
                said = json.loads(path.read_text())
                found.append((path.stat().st_mtime_ns, Serving(said["url"], said["model"], tuple(said["engines"]))))
        except OSError:  # it went away in between
            continue
    return [serving for _, serving in sorted(found, key=lambda entry: entry[0])]


def _is_locked(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _parents() -> tuple[Path, ...]:
    # A long TMPDIR does not fit into a socket's address.
    return tuple(dict.fromkeys((Path(tempfile.gettempdir()), Path("/tmp"))))


def _make() -> Path:
    reasons = []
    for parent in _parents():
        try:
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        if len(str(path).encode()) + _LONGEST_NAME <= _LONGEST_PATH:
            return path
        path.rmdir()
        reasons.append(f"{parent}: too long for a socket's path")
    raise ConfigError(f"no folder for sockets ({'; '.join(reasons)}): set TMPDIR to a short path that can be written")
