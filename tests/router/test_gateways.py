"""What gateways meet: sessions, bad frames, slow readers, the router's end, and several routers side by side."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from fake_engine import output_of
from grpc_health.v1 import health_pb2, health_pb2_grpc
from router_testing import (
    DEADLINE,
    assert_whole,
    connected,
    endpoint_of,
    engines,
    gateway,
    holder_of,
    metric,
    prompt_of,
    request_of,
    router,
    until,
)

from quire.service.errors import ErrorCode
from quire.service.grpc_server import channel
from quire.service.request import Finished, FinishReason, Update
from quire.service.wire import request_to_proto
from quire.v1 import session_pb2, session_pb2_grpc

HELLO = session_pb2.SessionRequest(hello=session_pb2.Hello(peer="test"))


async def frames(*messages: session_pb2.SessionRequest) -> AsyncIterator[session_pb2.SessionRequest]:
    """These, and then nothing for as long as the call stands."""
    for message in messages:
        yield message
    await asyncio.Event().wait()


async def until_ended(address: str, *messages: session_pb2.SessionRequest) -> grpc.aio.AioRpcError:
    """How a session with these frames ends."""
    async with channel(address) as connection:
        call = session_pb2_grpc.SessionServiceStub(connection).Session(frames(*messages), wait_for_ready=True)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async with asyncio.timeout(DEADLINE):
                async for _ in call:
                    pass
        return ended.value


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (session_pb2.SessionRequest(cancel=session_pb2.Cancel(key=1)), "hello"),
        (session_pb2.SessionRequest(), "hello"),
    ],
)
async def test_a_session_begins_with_hello(tmp_path: Path, message: session_pb2.SessionRequest, named: str) -> None:
    """A peer that speaks another protocol is told so, not guessed at."""
    async with router(tmp_path, [], engines=(f"unix:{tmp_path}/nobody",)) as service:
        error = await until_ended(service.address, message)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert named in str(error.details()) and ("quire-field", "hello") in tuple(error.trailing_metadata() or ())


async def test_a_frame_that_makes_no_sense_ends_its_session_and_frees_its_requests(tmp_path: Path) -> None:
    """A broken gateway loses its own streams and disturbs nobody's."""
    async with engines(tmp_path, 1) as fakes, router(tmp_path, fakes) as service, gateway(service) as well:
        fakes[0].hold_at(2)
        kept = request_of(prompt_of(1))
        stream = well.submit(kept)
        await stream.until_tokens(2)
        submit = session_pb2.Submit(key=1, request=request_to_proto(request_of(prompt_of(2))))
        error = await until_ended(
            service.address, HELLO, session_pb2.SessionRequest(submit=submit), session_pb2.SessionRequest()
        )
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await until_ended(service.address, HELLO, HELLO)).code() is grpc.StatusCode.INVALID_ARGUMENT
        await until(lambda: len(endpoint_of(service, fakes[0]).flights) == 1)
        fakes[0].hold_at(None)
        await assert_whole(stream, kept)


async def test_bad_requests_are_refused_by_name_and_disturb_no_session(tmp_path: Path) -> None:
    """A field that is missing or out of range: an error event for that key, and the session goes on."""
    async with engines(tmp_path, 1) as fakes, router(tmp_path, fakes) as service, gateway(service) as session:
        messages = {field: request_to_proto(request_of(prompt_of(1))) for field in (
            "request_id", "sampling", "sampling.seed", "stop.max_tokens", "prompt_token_ids",
        )}  # fmt: skip
        for field, message in messages.items():
            *path, name = field.split(".")
            part: object = message
            for step in path:
                part = getattr(part, step)
            part.ClearField(name)  # type: ignore[attr-defined]
        wrong = request_to_proto(request_of(prompt_of(1)))
        wrong.sampling.top_p = 7.0
        messages["sampling.top_p"] = wrong
        for field, message in messages.items():
            finished = await session.submit(message).result()
            assert finished.error is not None
            assert (finished.error.code, finished.error.field) == (ErrorCode.INVALID_ARGUMENT, field)
        assert fakes[0].submitted == []
        request = request_of(prompt_of(1))
        await assert_whole(session.submit(request), request)


async def test_a_key_in_use_is_refused(tmp_path: Path) -> None:
    """Two requests under one key would mix their tokens: the second is refused and the first goes on."""
    async with engines(tmp_path, 1) as fakes, router(tmp_path, fakes) as service:
        fakes[0].hold_at(2)
        request = request_of(prompt_of(1))
        submit = session_pb2.SessionRequest(submit=session_pb2.Submit(key=5, request=request_to_proto(request)))
        async with channel(service.address) as connection:
            call = session_pb2_grpc.SessionServiceStub(connection).Session(frames(HELLO, submit, submit))
            tokens: list[int] = []
            refusals = []
            ends = []
            async with asyncio.timeout(DEADLINE):
                async for frame in call:
                    for update in frame.step.updates:
                        tokens.extend(update.token_ids)
                        if update.HasField("finished"):
                            (refusals if update.finished.HasField("error") else ends).append(update.finished)
                    if refusals:
                        fakes[0].hold_at(None)
                    if ends:
                        break
            call.cancel()
        assert tokens == output_of(request.prompt_token_ids, 8)
        assert [refusal.error.field for refusal in refusals] == ["key"] and len(ends) == 1


async def test_a_gateway_that_does_not_read_loses_its_session_alone(tmp_path: Path) -> None:
    """Neither the router's memory nor its other gateways pay for one that is stuck; it may submit again later."""
    async with (
        engines(tmp_path, 1) as fakes,
        router(tmp_path, fakes, max_queued_updates=50) as service,
        gateway(service) as reads,
        channel(service.address) as connection,
    ):
        fakes[0].hold_at(0)
        request = request_of(prompt_of(1))
        submit = session_pb2.SessionRequest(submit=session_pb2.Submit(key=1, request=request_to_proto(request)))
        call = session_pb2_grpc.SessionServiceStub(connection).Session(frames(HELLO, submit), wait_for_ready=True)
        await call.read()
        await fakes[0].until_submitted()
        (key,) = endpoint_of(service, fakes[0]).flights
        # 20 MB: more than gRPC takes on the way before it waits for the reader.
        update = session_pb2.RequestUpdate(key=key, token_ids=[2**31 - 1] * 10_000)
        for _ in range(400):
            fakes[0].send_raw(session_pb2.SessionResponse(step=session_pb2.StepFrame(updates=[update])))
        await fakes[0].until(lambda: fakes[0].cancelled == [request.request_id])
        fakes[0].hold_at(None)
        kept = request_of(prompt_of(2))
        await assert_whole(reads.submit(kept), kept)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            while await call.read() is not grpc.aio.EOF:
                pass
        assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert re.search(r"has not read \d+ updates", str(ended.value.details()))


async def test_what_waits_for_a_gateway_goes_out_in_few_frames(tmp_path: Path) -> None:
    """Without it many engines' frames would each cost router and gateway a message, when both are busiest."""
    async with (
        engines(tmp_path, 1) as fakes,
        router(tmp_path, fakes) as service,
        channel(service.address) as connection,
    ):
        fakes[0].hold_at(0)
        requests = [request_of(prompt_of(number)) for number in range(3)]
        submits = [
            session_pb2.SessionRequest(submit=session_pb2.Submit(key=key, request=request_to_proto(request)))
            for key, request in enumerate(requests)
        ]
        call = session_pb2_grpc.SessionServiceStub(connection).Session(frames(HELLO, *submits), wait_for_ready=True)
        await call.read()
        await fakes[0].until_submitted(len(requests))
        endpoint = endpoint_of(service, fakes[0])
        # One turn of the event loop brings them all, as a busy one may.
        for token in range(20):
            for key in list(endpoint.flights):
                service.router.engine_stepped(endpoint, [Update(key, (token,))])
        tokens: dict[int, list[int]] = {key: [] for key in range(len(requests))}
        messages = []
        while sum(map(len, tokens.values())) < 60:
            messages.append(await call.read())
            for update in messages[-1].step.updates:
                tokens[update.key].extend(update.token_ids)
        assert len(messages) <= 2
        assert list(tokens.values()) == [list(range(20))] * 3


async def test_a_router_that_drains_says_so_and_finishes_what_it_has(tmp_path: Path) -> None:
    """A rolling restart of routers: gateways turn to others, and the streams here end whole."""
    async with engines(tmp_path, 1) as fakes:
        fakes[0].hold_at(2)
        async with router(tmp_path, fakes, grace=10) as service, gateway(service) as session:
            request = request_of(prompt_of(1))
            stream = session.submit(request)
            await stream.until_tokens(2)
            service.router.drain()
            await asyncio.wait_for(session.draining.wait(), DEADLINE)
            refused = await session.submit(request_of(prompt_of(2))).result()
            assert refused.error is not None and refused.error.code is ErrorCode.UNAVAILABLE
            error = await until_ended(service.address, HELLO)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            fakes[0].hold_at(None)
            await assert_whole(stream, request)
        await asyncio.wait_for(session.ended.wait(), DEADLINE)


async def test_after_the_grace_period_every_stream_has_its_end(tmp_path: Path) -> None:
    """What can't finish in time gets an error that says so, not a torn connection: the gateway submits it elsewhere."""
    async with engines(tmp_path, 1) as fakes:
        fakes[0].hold_at(2)
        async with AsyncExitStack() as outlives, router(tmp_path, fakes, grace=0.05) as service:
            session = await outlives.enter_async_context(gateway(service))
            streams = [session.submit(request_of(prompt_of(topic))) for topic in (1, 2)]
            for stream in streams:
                await stream.until_tokens(2)
        for stream in streams:
            finished = await stream.result()
            assert finished.error is not None and finished.error.code is ErrorCode.UNAVAILABLE
            assert stream.terminal_events == 1
        await fakes[0].until(lambda: fakes[0].in_flight == 0)


async def test_health_follows_the_engines(tmp_path: Path) -> None:
    """Kubernetes and gateways ask it: SERVING while an engine takes requests."""
    async with engines(tmp_path, 1) as fakes, router(tmp_path, fakes) as service, channel(service.address) as link:
        request = health_pb2.HealthCheckRequest(service="quire.v1.SessionService")
        watch = health_pb2_grpc.HealthStub(link).Watch(request)
        seen = []
        async with asyncio.timeout(DEADLINE):
            async for answer in watch:
                seen.append(answer.status)
                if len(seen) == 1:
                    await fakes[0].kill()
                elif len(seen) == 2:
                    await fakes[0].start()
                else:
                    break
        watch.cancel()
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        assert seen == [serving, not_serving, serving]


async def test_a_router_may_be_ready_without_engines(tmp_path: Path) -> None:
    """Where engines scale to zero a request that waits is what starts one: a gateway must be able to send it."""
    settings = {"engines": (f"unix:{tmp_path}/engine-0",), "wait": False, "hold": 30.0, "ready_without_engines": True}
    async with (
        router(tmp_path, [], **settings) as service,
        channel(service.address) as link,
        gateway(service) as session,
    ):
        check = health_pb2.HealthCheckRequest(service="quire.v1.SessionService")
        answer = await health_pb2_grpc.HealthStub(link).Check(check)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        request = request_of(prompt_of(1))
        stream = session.submit(request)
        await until(lambda: metric(service, "held_requests") == 1)
        async with engines(tmp_path, 1):
            await assert_whole(stream, request)


async def test_two_routers_need_nothing_of_each_other(tmp_path: Path) -> None:
    """Events of the engines make them agree on who holds what; when one is gone its gateway goes on at the other."""
    async with (
        engines(tmp_path, 2) as fakes,
        router(tmp_path, fakes, name="router-b") as b,
        gateway(b) as at_b,
        AsyncExitStack() as outlives,
    ):
        async with router(tmp_path, fakes, name="router-a") as a:
            at_a = await outlives.enter_async_context(gateway(a))
            first = request_of(prompt_of(1, pages=20))
            await assert_whole(at_a.submit(first), first)
            holder = holder_of(fakes, first)
            await until(lambda: endpoint_of(b, holder).cache.sequence == 1)
            # The other router has seen no request with this prefix, and knows where it is.
            again = request_of((*first.prompt_token_ids, 1, 2, 3))
            stream = at_b.submit(again)
            await assert_whole(stream, again)
            assert holder_of(fakes, again) is holder
            assert stream.started is not None and stream.started.cached_tokens == 320
            # What one sends, the other sees in the engine's load.
            holder.set_load(pending_prefill_tokens=100_000)
            await until(lambda: endpoint_of(b, holder).view.pending_prefill_tokens)
            elsewhere = request_of((*first.prompt_token_ids, 4, 5, 6))
            await assert_whole(at_b.submit(elsewhere), elsewhere)
            assert holder_of(fakes, elsewhere) is not holder
            # A stream of a router that ends goes on at the other from where its gateway knows it.
            for fake in fakes:
                fake.hold_at(3)
            moved = request_of(prompt_of(9), 8)
            cut = at_a.submit(moved)
            await cut.until_tokens(3)
        finished = await cut.result()
        assert finished.error is not None and finished.error.code is ErrorCode.UNAVAILABLE
        for fake in fakes:
            fake.hold_at(None)
        resumed = at_b.submit(request_of(moved.prompt_token_ids, 8, output_token_ids=tuple(cut.token_ids)))
        assert await resumed.result() == Finished(FinishReason.LENGTH)
        assert cut.token_ids + resumed.token_ids == output_of(moved.prompt_token_ids, 8)


async def test_both_routers_move_their_streams_off_a_dead_engine(tmp_path: Path) -> None:
    """Each holds its own streams' tokens: a fault needs no agreement either."""
    async with (
        engines(tmp_path, 3) as fakes,
        router(tmp_path, fakes, name="router-a") as a,
        router(tmp_path, fakes, name="router-b") as b,
        gateway(a) as at_a,
        gateway(b) as at_b,
    ):
        for fake in fakes:
            fake.hold_at(4)
        requests = [request_of(prompt_of(topic), 12) for topic in range(24)]
        streams = [(at_a, at_b)[index % 2].submit(request) for index, request in enumerate(requests)]
        for stream in streams:
            await stream.until_tokens(4)
        assert all(fake.in_flight for fake in fakes)
        await fakes[0].kill()
        for fake in fakes:
            fake.hold_at(None)
        for stream, request in zip(streams, requests, strict=True):
            await assert_whole(stream, request)
        await fakes[0].start()
        await until(lambda: connected(a, 3) and connected(b, 3))
