"""A program in a terminal of its own, as a person sees it and types into it."""

from __future__ import annotations

import codecs
import errno
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

DEADLINE = 60.0
COLUMNS = 160

_STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*([A-Za-z])|\r|\n|[^\x1b\r\n]+")


class Terminal:
    """Runs `command` from the beginning to the end of a `with` block."""

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str] | None = None,
        *,
        lines: int = 50,
        columns: int = COLUMNS,
    ) -> None:
        self._fd, program_end = pty.openpty()
        self.resize(lines, columns)
        self.process = subprocess.Popen(
            command, stdin=program_end, stdout=program_end, stderr=program_end,
            env=os.environ | {"TERM": "xterm"} | (environment or {}),
            # The program's session leads the terminal: Ctrl-C reaches it.
            preexec_fn=_take_terminal,
            start_new_session=True,
        )  # fmt: skip
        os.close(program_end)
        self.output = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._read = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)
        os.close(self._fd)

    def type(self, text: str) -> None:
        """Types `text`: \\x03 is Ctrl-C, \\x04 Ctrl-D."""
        os.write(self._fd, text.encode())

    def resize(self, lines: int, columns: int) -> None:
        """Makes the window larger or smaller, of which the program gets a signal."""
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    @property
    def modes(self) -> list[Any]:
        """How the terminal treats what is typed, for termios."""
        return termios.tcgetattr(self._fd)

    def expect(self, text: str) -> None:
        """Waits until `text` is shown after what the last call waited for."""
        end = time.monotonic() + DEADLINE
        while (found := self.output.find(text, self._read)) < 0:
            if not self._until(end) or not self._receive():
                raise AssertionError(f"{text!r} was not shown after {self.output[: self._read]!r}, but {self.rest!r}")
        self._read = found + len(text)

    def wait(self) -> int:
        """The exit status; all output has come by then."""
        end = time.monotonic() + DEADLINE
        while self._until(end) and self._receive():
            pass
        return self.process.wait(max(0.0, end - time.monotonic()))

    @property
    def rest(self) -> str:
        """What was shown after what was waited for."""
        return self.output[self._read :]

    @property
    def screen(self) -> list[str]:
        """The lines as they stand there, after all the rewriting."""
        lines, column = [""], 0
        for match in _SEQUENCE.finditer(self.output):
            text, control = match.group(), match.group(1)
            if text == "\n":
                lines.append("")
                column = 0
            elif text == "\r":
                column = 0
            elif control == "K":
                lines[-1] = ""
            elif control is None:
                lines[-1] = lines[-1][:column].ljust(column) + text + lines[-1][column + len(text) :]
                column += len(text)
        return [line.rstrip() for line in lines]

    @property
    def frame(self) -> list[str]:
        """The lines of the last whole screen that was drawn, by a program that draws whole screens."""
        *_, last, _ = self.output.split("\x1b[H")
        return _STYLE.sub("", last).splitlines()

    def _until(self, end: float) -> bool:
        """Whether there is something to receive by then."""
        return bool(select.select([self._fd], [], [], max(0.0, end - time.monotonic()))[0])

    def _receive(self) -> bool:
        try:
            data = os.read(self._fd, 1 << 16)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        # What comes ends anywhere, also within a character.
        self.output += self._decoder.decode(data)
        return bool(data)


def _take_terminal() -> None:
    # Where tests run in a shell's background it is ignored, by all that they start, too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
