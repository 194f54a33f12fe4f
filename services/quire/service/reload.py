"""What was made of some files, made again when they change: API keys, certificates.

Files are looked at, not listened to: a Kubernetes Secret is replaced by switching a symbolic link two folders up, which
watches of a file miss and a look at what the path leads to does not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

from quire.service.errors import ConfigError

T = TypeVar("T")

_Fingerprint = tuple[tuple[int, int, int, int] | None, ...]

logger = logging.getLogger(__name__)


class Reloaded(Generic[T]):
    """`value` is what `load` last made of `paths`. Raises the ConfigError of the first `load`.

    A later ConfigError leaves the old value in place. `reloaded(ok)` hears of every attempt after the first.
    """

    def __init__(
        self, what: str, paths: Sequence[str], load: Callable[[], T], reloaded: Callable[[bool], None]
    ) -> None:
        self._what = what
        self._paths = [Path(path) for path in paths]
        self._load = load
        self._reloaded = reloaded
        # Taken first: what changes while it is read is read again at the next look.
        self._seen = self._fingerprint()
        self.value = load()

    def look(self) -> None:
        """Loads again if a file is another one than at the last look."""
        seen = self._fingerprint()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self.value = self._load()
        except ConfigError as error:
            logger.error("%s: the new file is not used, the old one stays: %s", self._what, error.message)
            self._reloaded(False)
        else:
            logger.info("%s: loaded again", self._what)
            self._reloaded(True)

    async def watch(self, interval: float) -> NoReturn:
        """Looks every `interval` seconds, until it is cancelled."""
        while True:
            await asyncio.sleep(interval)
            self.look()

    def _fingerprint(self) -> _Fingerprint:
        return tuple(_identity(path) for path in self._paths)


def _identity(path: Path) -> tuple[int, int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
