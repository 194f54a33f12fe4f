"""When grammars are asked which tokens they force. Called by the speculator.

To find them takes the one who makes the masks a while for each sequence, for which the step waits: it is not to be
spent where they are of no use, as in large batches, whose steps take longer by what is verified.
"""

from __future__ import annotations

# Steps whose masks are asked for without, after forced tokens that were not verified, and each time for twice as many.
_PAUSE, _LONGEST_PAUSE = 4, 64


class ForcedAsks:
    """Asks for up to `most` tokens of a sequence."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._pause = self._left = 0

    def next(self) -> int:
        """How many to ask for with a step's masks; to be called once for each."""
        if self._left:
            self._left -= 1
            return 0
        return self._most

    def observe(self, *, used: bool) -> None:
        """Some were there when a step was planned, and any of them were `used` or none."""
        if used:
            self._pause = self._left = 0
        elif not self._left:
            self._pause = self._left = min(_LONGEST_PAUSE, max(_PAUSE, 2 * self._pause))
