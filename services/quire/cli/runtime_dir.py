"""The folder of the sockets through which the services of one `quire serve` talk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quire.service.errors import ConfigError

# Linux keeps a socket's path in 108 bytes with the final zero; macOS in 104.
_LONGEST_PATH = 103
_LONGEST_NAME = len("/sidecar-9999.sock")


@contextmanager
def runtime_dir() -> Iterator[Path]:
    """A new folder that only this user can enter, gone with all it holds at the end. Raises ConfigError."""
    path = _make()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _make() -> Path:
    reasons = []
    # A long TMPDIR does not fit into a socket's address.
    for parent in (tempfile.gettempdir(), "/tmp"):
        try:
            path = Path(tempfile.mkdtemp(prefix="quire-", dir=parent))
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        if len(str(path).encode()) + _LONGEST_NAME <= _LONGEST_PATH:
            return path
        path.rmdir()
        reasons.append(f"{parent}: too long for a socket's path")
    raise ConfigError(f"no folder for sockets ({'; '.join(reasons)}): set TMPDIR to a short path that can be written")
