"""What the services write, on its way through `quire serve`: one pipe for all of them, whole lines out of it.

Lines of many processes would tear each other, and a progress bar, if each wrote to the terminal itself.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

_READ_BYTES = 1 << 16


class OutputPipe:
    """Processes write to `write_end`, a file descriptor; `emit` gets each line, without its end, on the event loop.

    Use it as a context manager, around the processes' lives: what they have written is emitted before it ends.
    """

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self._rest = b""
        self._read_end, self.write_end = os.pipe()
        os.set_blocking(self._read_end, False)

    def __enter__(self) -> OutputPipe:
        asyncio.get_running_loop().add_reader(self._read_end, self._relay)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._read_end)
        os.close(self.write_end)
        while self._relay():
            pass
        if self._rest:
            self._emit(self._rest.decode(errors="replace"))
        os.close(self._read_end)

    def _relay(self) -> bool:
        """Emits what is there; False if that is nothing. The end may never come: a lost process may keep its side."""
        try:
            data = os.read(self._read_end, _READ_BYTES)
        except BlockingIOError:
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._emit(line.decode(errors="replace"))
        return bool(data)
