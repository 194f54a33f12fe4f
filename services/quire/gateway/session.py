"""The gateway's side of the multiplexed SessionService: one long-lived stream per router, all requests on them.

The core submits a request here and gets a `Call`, which the router's frames fill with tokens. When a router goes
away, what it left unfinished is submitted to another (or to the same one when it is back) with the tokens so far, and
the reader of the call sees nothing of it. Every call ends exactly once.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

from quire.gateway.call import Call
from quire.gateway.router_link import RouterLink
from quire.service.errors import QuireError, UnavailableError
from quire.service.peer_tls import Dialer
from quire.service.request import Finished, FinishReason, Request

# A request that loses router after router without a token in between may be the reason for it.
_MAX_FRUITLESS_MOVES = 3


class RouterSessions:
    """The sessions to all routers: picks the one with the fewest requests in flight, and moves what a lost one held.

    `model` is the name that the routers must serve. `end_token_ids` are the model's own end tokens. `changed` is
    called whenever `states` may have; `dialer` makes the channels.
    """

    def __init__(
        self,
        routers: Sequence[str],
        *,
        peer: str,
        model: str,
        end_token_ids: Sequence[int],
        router_timeout: float,
        changed: Callable[[], None],
        dialer: Dialer,
    ) -> None:
        self._links = [RouterLink(address, peer, model, self._link_changed, self._lost, dialer) for address in routers]
        self._end_token_ids = frozenset(end_token_ids)
        self._router_timeout = router_timeout
        self._changed = changed
        self._waiting: dict[Call, asyncio.TimerHandle] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    def start(self) -> None:
        """Connects to every router and keeps connected, until `close`."""
        self._tasks = [asyncio.create_task(link.run(), name=f"router {link.address}") for link in self._links]

    async def failed(self) -> None:
        """Raises what made the care of a router fail: a bug, for routers may come and go."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()

    async def close(self) -> None:
        """Ends what is still in flight with UNAVAILABLE and hangs up."""
        self.end_all(UnavailableError("the gateway is shutting down: send the request to another one"))
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def ready(self) -> bool:
        """Whether a router can take a request now."""
        return any(link.available for link in self._links)

    @property
    def states(self) -> dict[str, str]:
        """For each router's address "ready", or why it can't take a request now."""
        return {link.address: "ready" if link.available else link.reason for link in self._links}

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._waiting) + sum(link.in_flight for link in self._links)

    def submit(self, request: Request, wake: asyncio.Event) -> Call:
        """Sends `request` to a router, as soon as one is there; `wake` is set whenever the call has changed."""
        call = Call(request, wake)
        if self._closed:
            call.fail(UnavailableError("the gateway is shutting down: send the request to another one"))
        else:
            self._dispatch(call)
        return call

    def cancel(self, call: Call) -> None:
        """Nobody reads `call` any more: its router frees what it holds. Does nothing to a call that has ended."""
        if call.finished is not None:
            return
        self._stop_waiting(call)
        call.end(Finished(FinishReason.CANCELLED))
        if call.link is not None:
            call.link.cancel(call)

    def end_all(self, error: QuireError) -> None:
        """Ends every call in flight with `error`."""
        for call in [*self._waiting, *itertools.chain.from_iterable(link.calls for link in self._links)]:
            if call.finished is None:
                self._stop_waiting(call)
                call.fail(error)
                if call.link is not None:
                    call.link.cancel(call)

    def _dispatch(self, call: Call) -> None:
        available = [link for link in self._links if link.available]
        if available:
            min(available, key=lambda link: link.in_flight).submit(call)
            return
        self._waiting[call] = asyncio.get_running_loop().call_later(self._router_timeout, self._expire, call)

    def _stop_waiting(self, call: Call) -> None:
        if timer := self._waiting.pop(call, None):
            timer.cancel()

    def _expire(self, call: Call) -> None:
        self._stop_waiting(call)
        states = "; ".join(f"{address}: {state}" for address, state in self.states.items())
        call.fail(UnavailableError(f"no router took the request within {self._router_timeout:g} s ({states})"))

    def _link_changed(self) -> None:
        if self.ready:
            for call in list(self._waiting):
                self._stop_waiting(call)
                self._dispatch(call)
        self._changed()

    def _lost(self, calls: Sequence[Call]) -> None:
        for call in calls:
            call.link = None
            if call.finished is None:
                if finished := self._already_over(call):
                    call.end(finished)
                elif call.fruitless_moves == _MAX_FRUITLESS_MOVES:
                    call.fail(
                        UnavailableError(f"{_MAX_FRUITLESS_MOVES + 1} routers were lost while they held the request")
                    )
                else:
                    call.fruitless_moves += 1
                    self._dispatch(call)

    def _already_over(self, call: Call) -> Finished | None:
        # The last token came and the terminal event got lost with the router: there is nothing left to generate.
        stop = call.request.stop
        ends = frozenset(stop.stop_token_ids).union(() if stop.ignore_eos else self._end_token_ids)
        if call.token_ids and call.token_ids[-1] in ends:
            return Finished(FinishReason.STOP)
        if len(call.token_ids) >= stop.max_tokens:
            return Finished(FinishReason.LENGTH)
        return None
