"""How many requests may be moved at a time: what keeps a fault from becoming a storm.

The core asks it before it sends a request to another engine. Engines that fail one after the other under a load could
otherwise be kept busy with prompts that are computed again and again; with it, what is moved is a bounded share of
what is in flight, and the rest waits for its turn.
"""

from __future__ import annotations

from collections import deque

# Shorter than a request waits by default for an engine, so that one that waits for its turn mostly gets it.
WINDOW_SECONDS = 4.0

# So many moves are free: a share of little traffic would allow none.
FREE_MOVES = 10


class RetryBudget:
    """Within WINDOW_SECONDS moves may number `share` of the requests in flight, but always FREE_MOVES.

    With a share of 1 the loss of any one engine, even of the only one, moves everything at once. Times are those of
    one monotonic clock, in seconds.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._moves: deque[float] = deque()

    def allows(self, now: float, in_flight: int) -> bool:
        """Whether a request may be moved now, with `in_flight` of them in the router."""
        while self._moves and self._moves[0] <= now - WINDOW_SECONDS:
            self._moves.popleft()
        return len(self._moves) < max(FREE_MOVES, self._share * in_flight)

    def spend(self, now: float) -> None:
        """A request is moved."""
        self._moves.append(now)

    def next_turn(self, now: float) -> float:
        """When it allows a move again, at the latest."""
        return self._moves[0] + WINDOW_SECONDS if self._moves else now
