"""How long a request may take: its client's X-Request-Timeout, the operator's --request-timeout, whichever is less."""

from __future__ import annotations

import math
import time

from quire.service.errors import DeadlineExceededError, InvalidRequestError

HEADER = "X-Request-Timeout"


class Deadline:
    """A point in time, or none. It begins when the request arrives."""

    def __init__(self, wanted: str | None, longest: float | None) -> None:
        """Raises InvalidRequestError if `wanted`, the header, is no number of seconds above 0."""
        self._seconds = longest
        if wanted is not None:
            asked = _seconds(wanted)
            self._seconds = asked if longest is None else min(asked, longest)
        self._began = time.time()

    @property
    def unix_ms(self) -> int | None:
        """As it travels with the request; None: no deadline."""
        return None if self._seconds is None else int((self._began + self._seconds) * 1000)

    @property
    def left(self) -> float | None:
        """Seconds from now; None: no deadline."""
        return None if self._seconds is None else max(0.0, self._began + self._seconds - time.time())

    def passed(self) -> DeadlineExceededError:
        """The error for a request that took longer."""
        return DeadlineExceededError(
            f"the request took longer than {self._seconds:g} s: send a larger {HEADER}, ask for fewer tokens, or stream"
        )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequestError(f"{HEADER} is {text[:40]!r}: send a number of seconds above 0", field=HEADER)
    return seconds
