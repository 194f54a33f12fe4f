"""quire.v1.DraftingService over drafters: translates, and shares the event loop with those who wait for masks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from quire.service.errors import InvalidRequestError
from quire.service.grpc_server import abort
from quire.service.request import MAX_TOKEN_ID
from quire.sidecar.drafting.drafter import Drafter, DraftingLimits
from quire.sidecar.metrics import SidecarMetrics
from quire.v1 import drafting_pb2, drafting_pb2_grpc

SERVICE = drafting_pb2.DESCRIPTOR.services_by_name["DraftingService"].full_name

MAX_ROWS = 4096
MAX_DRAFT_TOKENS = 64

# After so long others have their turn. A thread would not help them: it would hold the interpreter for longer.
_TURN_S = 0.0005

_Context = grpc.aio.ServicerContext[Any, Any]


class DraftingServicer(drafting_pb2_grpc.DraftingServiceServicer):
    """Draft."""

    def __init__(self, limits: DraftingLimits, metrics: SidecarMetrics) -> None:
        self._limits = limits
        self._metrics = metrics

    async def Draft(  # noqa: N802
        self, requests: AsyncIterator[drafting_pb2.DraftRequest], context: _Context
    ) -> AsyncIterator[drafting_pb2.DraftResponse]:
        """One engine core's drafts; the stream's end forgets all that it was told."""
        stream = _Stream(Drafter(self._limits), self._metrics)
        try:
            async for request in requests:
                yield await stream.answer(request)
        except InvalidRequestError as error:
            await abort(context, error)
        finally:
            stream.close()


class _Stream:
    """A drafter, and the task that reads what is too long to be read while somebody waits."""

    def __init__(self, drafter: Drafter, metrics: SidecarMetrics) -> None:
        self._drafter = drafter
        self._metrics = metrics
        self._reading: asyncio.Task[None] | None = None
        self._num_sequences = 0

    async def answer(self, request: drafting_pb2.DraftRequest) -> drafting_pb2.DraftResponse:
        """Raises InvalidRequestError if the request breaks the contract; nothing of it is taken in then."""
        self._check(request)
        began = turn = time.perf_counter()
        for sequence in request.released:
            self._drafter.release(sequence)
        response = drafting_pb2.DraftResponse(step=request.step)
        for row in request.rows:
            if row.HasField("start"):
                self._drafter.start(row.sequence, row.start.cache_salt, row.start.num_prompt_tokens)
            if token_ids := self._drafter.draft(row.sequence, row.token_ids, row.num_tokens):
                response.drafts.add(sequence=row.sequence, token_ids=token_ids)
            if time.perf_counter() - turn > _TURN_S:
                await asyncio.sleep(0)
                turn = time.perf_counter()
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        self._count(response, time.perf_counter() - began)
        return response

    def close(self) -> None:
        """Forgets everything."""
        if self._reading is not None:
            self._reading.cancel()
        self._metrics.drafted_sequences.dec(self._num_sequences)

    async def _read(self) -> None:
        began = time.perf_counter()
        while self._drafter.catch_up():
            # Not a wait for something to happen: others have as much of the interpreter as this had.
            await asyncio.sleep(time.perf_counter() - began)
            began = time.perf_counter()

    def _check(self, request: drafting_pb2.DraftRequest) -> None:
        if len(request.rows) > MAX_ROWS:
            raise InvalidRequestError(
                f"rows has {len(request.rows)} entries: at most {MAX_ROWS} are allowed", field="rows"
            )
        if len({row.sequence for row in request.rows}) < len(request.rows):
            raise InvalidRequestError("a rows.sequence stands twice in one request", field="rows.sequence")
        for row in request.rows:
            if not row.HasField("start") and (row.sequence not in self._drafter or row.sequence in request.released):
                raise InvalidRequestError(
                    f"rows.sequence {row.sequence} is unknown on this stream: its first row must have start",
                    field="rows.start",
                )
            if row.num_tokens > MAX_DRAFT_TOKENS:
                raise InvalidRequestError(
                    f"rows.num_tokens is {row.num_tokens}: it must lie in [0, {MAX_DRAFT_TOKENS}]",
                    field="rows.num_tokens",
                )
            if (token := max(row.token_ids, default=0)) > MAX_TOKEN_ID:
                raise InvalidRequestError(
                    f"rows.token_ids holds {token}: it must lie in [0, {MAX_TOKEN_ID}]", field="rows.token_ids"
                )

    def _count(self, response: drafting_pb2.DraftResponse, seconds: float) -> None:
        self._metrics.draft_seconds.observe(seconds)
        self._metrics.draft_tokens.inc(sum(len(draft.token_ids) for draft in response.drafts))
        self._metrics.drafted_sequences.inc(len(self._drafter) - self._num_sequences)
        self._num_sequences = len(self._drafter)
