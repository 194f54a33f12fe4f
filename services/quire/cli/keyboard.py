"""Single keys from the terminal, while a command draws on it."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_KEYS = re.compile(r"\x1b[\[O]([A-Z])|\x1b\[[0-9;]*~|([^\x1b])")
_ARROWS = {"A": "up", "B": "down", "C": "right", "D": "left"}


@contextmanager
def keyboard(pressed: Callable[[str], None]) -> Iterator[None]:
    """Calls `pressed` with each key that is typed, on the event loop: a character, or up, down, left, right.

    The terminal is as it was afterwards. Ctrl-C stays a signal. Without a terminal as standard input no key comes.
    """
    if not sys.stdin.isatty():
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    loop = asyncio.get_running_loop()

    def read() -> None:
        data = os.read(terminal, 1024)
        if not data:
            loop.remove_reader(terminal)
        for arrow, character in _KEYS.findall(data.decode(errors="replace")):
            pressed(_ARROWS.get(arrow, "") if arrow else character)

    try:
        tty.setcbreak(terminal)
        without_suspend = termios.tcgetattr(terminal)
        # Ctrl-Z would leave the shell on a screen that is not its own.
        without_suspend[6][termios.VSUSP] = b"\0"
        termios.tcsetattr(terminal, termios.TCSANOW, without_suspend)
        loop.add_reader(terminal, read)
        yield
    finally:
        loop.remove_reader(terminal)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
