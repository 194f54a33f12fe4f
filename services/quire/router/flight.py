"""One request in flight: what the router must remember of it to move it to another engine unseen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opentelemetry.trace import Span

from quire.service.request import Finished, FinishReason, Request, Update

if TYPE_CHECKING:
    from quire.router.endpoint import Endpoint


@dataclass(slots=True, eq=False)
class Peer:
    """A gateway's session. `deliver` takes what one engine frame, or one event in the router, means for it."""

    deliver: Callable[[list[Update]], None]
    announce_drain: Callable[[], None]
    flights: dict[int, Flight] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Flight:
    """`tokens` are all output tokens so far, those from before the request came here included. Times are the loop's."""

    peer: Peer
    key: int
    request: Request
    span: Span
    tokens: list[int]
    submitted_at: float
    first_token_at: float | None = None
    # Of the engine that had it last, once one had.
    engine: str = ""
    # Of the engine that has it; empty is none on trial.
    revision: str | None = None
    cached_tokens: int = 0
    started: bool = False
    cancelled: bool = False
    moves: int = 0
    # Since the last token: how often it was moved, and the engines that lost or refused it. Another is tried first.
    fruitless_moves: int = 0
    left: set[Endpoint] = field(default_factory=set)
    # It is between two engines and its move has not been granted yet.
    moving: bool = False
    endpoint: Endpoint | None = None
    engine_key: int = 0
    page_keys: Sequence[int] = ()
    # While it is held because no engine is ready or it waits for its turn.
    held_at: float | None = None
    timer: asyncio.TimerHandle | None = None

    def advance(self, token_ids: Sequence[int]) -> None:
        """An engine has generated these: what was tried in vain before them is forgotten."""
        self.tokens.extend(token_ids)
        if self.fruitless_moves:
            self.fruitless_moves = 0
            self.left.clear()

    def already_over(self) -> Finished | None:
        """How it ended if its last token has been seen and only its terminal event was lost with an engine.

        The model's own end tokens are not known here and need not be: an engine reports a step's token and the end
        that it brings in one update, so where the terminal event is missing, so is the end token.
        """
        if self.tokens and self.tokens[-1] in self.request.stop.stop_token_ids:
            return Finished(FinishReason.STOP)
        if len(self.tokens) >= self.request.stop.max_tokens:
            return Finished(FinishReason.LENGTH)
        return None
