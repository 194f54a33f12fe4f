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
    """`tokens` are all output tokens so far, those from before the request came here included."""

    peer: Peer
    key: int
    request: Request
    span: Span
    tokens: list[int]
    started: bool = False
    cancelled: bool = False
    moves: int = 0
    # Engines that lost or refused it: another is tried first.
    left: set[Endpoint] = field(default_factory=set)
    endpoint: Endpoint | None = None
    engine_key: int = 0
    page_keys: Sequence[int] = ()
    # Runs while the request is held because no engine is ready.
    timer: asyncio.TimerHandle | None = None

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
