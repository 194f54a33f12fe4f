"""A stream is one to the gateway, however many engines it runs on: real sockets, engines that are told when to fail."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
from fake_engine import output_of
from router_testing import (
    assert_nothing_held,
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

from quire.service.errors import (
    CancelledRequestError,
    ErrorCode,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from quire.service.request import Finished, FinishReason, SamplingParams
from quire.v1 import request_pb2, session_pb2


async def test_a_request_runs_to_its_end(tmp_path: Path) -> None:
    """Tokens, the start and one end come back under the gateway's own key."""
    async with engines(tmp_path, 1) as (engine,), router(tmp_path, [engine]) as service, gateway(service) as session:
        assert session.welcome is not None and session.welcome.server == "router"
        request = request_of(prompt_of(1))
        stream = session.submit(request, key=77)
        await assert_whole(stream, request)
        assert stream.started is not None and stream.started.engine == "engine-0"
        sent = engine.submitted[0]
        assert (sent.prompt_token_ids, sent.stop, sent.sampling) == (
            request.prompt_token_ids, request.stop, request.sampling,
        )  # fmt: skip


@pytest.mark.parametrize("fault", ["kill", "end_sessions", "fail_all", "stall"])
async def test_a_stream_goes_on_elsewhere_from_its_last_token(tmp_path: Path, fault: str) -> None:
    """An engine that dies, hangs up, gives up or hangs must not be seen by the client: no token lost or doubled."""
    async with (
        engines(tmp_path, 2) as fakes,
        router(tmp_path, fakes, stall_timeout=0.5 if fault == "stall" else 30) as service,
        gateway(service) as session,
    ):
        for fake in fakes:
            fake.hold_at(3)
        request = request_of(prompt_of(1), 8, sampling=SamplingParams(temperature=1.0, seed=42))
        stream = session.submit(request)
        await stream.until_tokens(3)
        first = holder_of(fakes, request)
        (second,) = (fake for fake in fakes if fake is not first)
        second.hold_at(None)
        match fault:
            case "kill":
                await first.kill()
            case "end_sessions":
                first.end_sessions()
            case "fail_all":
                first.fail_all(UnavailableError("the engine is shutting down"))
        await assert_whole(stream, request)
        again = second.submitted[-1]
        assert again.output_token_ids == tuple(output_of(request.prompt_token_ids, 3))
        # The draws at a position depend on the seed; the trace's parent is the router's one span.
        assert (again.sampling, again.request_id, again.trace) == (
            request.sampling, request.request_id, first.submitted[-1].trace,
        )  # fmt: skip
        assert metric(service, "moves_total", engine=first.address) == 1
        assert metric(service, "engine_stalls_total", engine=first.address) == (fault == "stall")


async def test_the_start_is_reported_once(tmp_path: Path) -> None:
    """Usage counts the prompt's cached tokens of the first engine, not of each that the request came to."""
    async with engines(tmp_path, 2) as fakes, router(tmp_path, fakes) as service, gateway(service) as session:
        prompt = prompt_of(1)
        fakes[1].store(prompt[:16])
        await until(lambda: endpoint_of(service, fakes[1]).cache.sequence == 1)
        fakes[0].store(prompt)
        await until(lambda: endpoint_of(service, fakes[0]).cache.sequence == 1)
        fakes[0].hold_at(2)
        request = request_of(prompt)
        stream = session.submit(request)
        await stream.until_tokens(2)
        await fakes[0].kill()
        await assert_whole(stream, request)
        assert stream.started is not None
        assert (stream.started.engine, stream.started.cached_tokens, stream.starts) == ("engine-0", 64, 1)
        assert metric(service, "prompt_tokens_total", engine=fakes[0].address) == len(prompt)
        assert metric(service, "prefix_hit_tokens_total", engine=fakes[0].address) == 64
        assert metric(service, "prompt_tokens_total", engine=fakes[1].address) == 0


async def test_an_engine_that_drains_gets_no_more_and_keeps_what_it_has(tmp_path: Path) -> None:
    """A rolling restart: streams end where they are if they can, and new ones go elsewhere, prefix or not."""
    async with engines(tmp_path, 2) as fakes, router(tmp_path, fakes) as service, gateway(service) as session:
        for fake in fakes:
            fake.hold_at(2)
        before = request_of(prompt_of(1))
        stream = session.submit(before)
        await stream.until_tokens(2)
        draining = holder_of(fakes, before)
        draining.drain()
        await until(lambda: endpoint_of(service, draining).state == "draining")
        after = request_of(prompt_of(1))
        other = session.submit(after)
        await other.until_tokens(2)
        assert holder_of(fakes, after) is not draining
        for fake in fakes:
            fake.hold_at(None)
        await assert_whole(stream, before)
        await assert_whole(other, after)
        assert len(draining.submitted) == 1


async def test_a_rolling_restart_of_every_engine_breaks_no_long_stream(tmp_path: Path) -> None:
    """Every engine is killed in turn, more often than max_moves: tokens in between make a move no vain one."""
    async with (
        engines(tmp_path, 2) as fakes,
        router(tmp_path, fakes, max_moves=1) as service,
        gateway(service) as session,
    ):
        request = request_of(prompt_of(1), 40)
        stream = session.submit(request)
        for round_ in range(1, 7):
            for fake in fakes:
                fake.hold_at(5 * round_)
            await stream.until_tokens(5 * round_)
            victim = holder_of([fake for fake in fakes if fake.in_flight], request)
            await victim.kill()
            await victim.start()
            await until(lambda: connected(service, 2))
        for fake in fakes:
            fake.hold_at(None)
        await assert_whole(stream, request)


@pytest.mark.parametrize(
    ("max_tokens", "stop_token", "reason"),
    [(3, None, FinishReason.LENGTH), (8, 2, FinishReason.STOP)],
)
async def test_an_end_that_is_lost_with_its_engine_is_not_generated_again(
    tmp_path: Path, max_tokens: int, stop_token: int | None, reason: FinishReason
) -> None:
    """The last token came, its terminal event did not: another engine would go on after the end."""
    async with engines(tmp_path, 2) as fakes, router(tmp_path, fakes) as service, gateway(service) as session:
        prompt = prompt_of(1)
        tokens = output_of(prompt, 3)
        stop_token_ids = () if stop_token is None else (tokens[stop_token],)
        for fake in fakes:
            fake.hold_at(0)
        request = request_of(prompt, max_tokens, stop_token_ids=stop_token_ids)
        stream = session.submit(request)
        await until(lambda: any(fake.in_flight for fake in fakes))
        holder = holder_of(fakes, request)
        key = next(iter(endpoint_of(service, holder).flights))
        update = session_pb2.RequestUpdate(key=key, token_ids=tokens)
        holder.send_raw(session_pb2.SessionResponse(step=session_pb2.StepFrame(updates=[update])))
        await stream.until_tokens(3)
        await holder.kill()
        assert await stream.result() == Finished(reason)
        assert (stream.token_ids, stream.terminal_events) == (tokens, 1)
        assert sum(len(fake.submitted) for fake in fakes) == 1


async def test_refusals_go_to_the_next_engine_and_a_bad_request_does_not(tmp_path: Path) -> None:
    """A full queue or a draining engine says nothing against the request; what is wrong with it is wrong everywhere."""
    async with engines(tmp_path, 2) as fakes, router(tmp_path, fakes) as service, gateway(service) as session:
        for topic in (1, 2):
            fakes[0].store(prompt_of(topic))
        await until(lambda: endpoint_of(service, fakes[0]).cache.sequence == 2)
        for topic, error in ((1, UnavailableError("draining")), (2, OverloadedError("the queue is full"))):
            fakes[0].fail_next(error)
            request = request_of(prompt_of(topic))
            stream = session.submit(request)
            await assert_whole(stream, request)
            assert stream.started is not None and stream.started.engine == "engine-1"
        assert metric(service, "retries_total", engine=fakes[0].address) == 2
        for bad in (InvalidRequestError("no", field="stop.max_tokens"), InternalError("a bug")):
            for fake in fakes:
                fake.fail_next(bad)
            before = sum(len(fake.submitted) for fake in fakes)
            finished = await session.submit(request_of(prompt_of(3))).result()
            assert finished.error is not None
            assert (finished.error.code, finished.error.field) == (bad.code, bad.field)
            assert sum(len(fake.submitted) for fake in fakes) == before + 1
            for fake in fakes:
                fake.forget_failures()


async def test_when_every_queue_is_full_the_client_hears_of_it_at_once(tmp_path: Path) -> None:
    """Waiting for a place is the client's choice: 429, not a request that walks around among full engines."""
    async with engines(tmp_path, 3) as fakes, router(tmp_path, fakes) as service, gateway(service) as session:
        for fake in fakes:
            fake.fail_next(*[OverloadedError("the queue is full")] * 2)
        finished = await session.submit(request_of(prompt_of(1))).result()
        assert finished.error is not None and finished.error.code is ErrorCode.RESOURCE_EXHAUSTED
        assert [len(fake.submitted) for fake in fakes] == [1, 1, 1]
        assert metric(service, "requests_total", reason="ERROR", code="RESOURCE_EXHAUSTED") == 1


async def test_max_moves_in_vain_end_a_request(tmp_path: Path) -> None:
    """A request that kills whatever it comes to must not be passed on for ever."""
    async with (
        engines(tmp_path, 2) as fakes,
        router(tmp_path, fakes, max_moves=2) as service,
        gateway(service) as session,
    ):
        for fake in fakes:
            fake.fail_next(*[UnavailableError("the core died")] * 5)
        finished = await session.submit(request_of(prompt_of(1))).result()
        assert finished.error is not None and finished.error.code is ErrorCode.UNAVAILABLE
        assert sum(len(fake.submitted) for fake in fakes) == 3
        assert service.router.fleet.ready


async def test_a_storm_of_moves_is_spread_over_time(tmp_path: Path) -> None:
    """With engines that fail whatever they get, moves are a bounded share of traffic; the rest waits for its turn."""
    async with (
        engines(tmp_path, 2) as fakes,
        router(tmp_path, fakes, retry_share=0.5, hold=0.3, max_moves=3) as service,
        gateway(service) as session,
    ):
        for fake in fakes:
            fake.hold_at(0)
        streams = [session.submit(request_of(prompt_of(topic))) for topic in range(40)]
        await until(lambda: sum(fake.in_flight for fake in fakes) == 40)
        for fake in fakes:
            fake.hold_at(None)
            fake.fail_next(*[UnavailableError("the core died")] * 1000)
            fake.fail_all(UnavailableError("the core died"))
        results = [await stream.result() for stream in streams]
        errors = [result.error for result in results if result.error is not None]
        assert len(errors) == 40 and all(error.code is ErrorCode.UNAVAILABLE for error in errors)
        assert any(error.retry_after for error in errors)
        # Half of forty at once, and no turn within the hold: not three tries for each.
        assert sum(len(fake.submitted) for fake in fakes) - 40 == 20
        assert_nothing_held(service)


async def test_cancellation_reaches_the_engine_and_ends_once(tmp_path: Path) -> None:
    """A client that goes away frees its pages; the terminal event still comes, so the gateway can close its books."""
    async with engines(tmp_path, 1) as fakes, router(tmp_path, fakes) as service, gateway(service) as session:
        fakes[0].hold_at(2)
        request = request_of(prompt_of(1))
        stream = session.submit(request)
        await stream.until_tokens(2)
        session.cancel(stream)
        assert await stream.result() == Finished(FinishReason.CANCELLED)
        assert fakes[0].cancelled == [request.request_id]
        # Again, and one that never was: the two may cross.
        session.cancel(stream)
        stream.key = 999
        session.cancel(stream)
        fakes[0].hold_at(None)
        after = request_of(prompt_of(2))
        await assert_whole(session.submit(after), after)
        assert stream.terminal_events == 1
        assert_nothing_held(service)


async def test_cancelling_what_is_held_or_just_lost(tmp_path: Path) -> None:
    """Cancelled is cancelled on every path: no engine gets a request that nobody waits for."""
    async with engines(tmp_path, 2) as fakes, router(tmp_path, fakes, hold=60) as service, gateway(service) as session:
        for fake in fakes:
            fake.hold_at(2)
            fake.deaf = True
        request = request_of(prompt_of(1))
        stream = session.submit(request)
        await stream.until_tokens(2)
        holder = holder_of(fakes, request)
        session.cancel(stream)
        await until(lambda: all(flight.cancelled for flight in endpoint_of(service, holder).flights.values()))
        await holder.kill()
        assert await stream.result() == Finished(FinishReason.CANCELLED)
        for fake in fakes:
            await fake.kill()
        await until(lambda: not service.router.fleet.ready)
        held = session.submit(request_of(prompt_of(2)))
        await until(lambda: metric(service, "held_requests") == 1)
        session.cancel(held)
        assert await held.result() == Finished(FinishReason.CANCELLED)
        assert sum(len(fake.submitted) for fake in fakes) == 1


async def test_an_engine_may_cancel_what_nobody_took_back(tmp_path: Path) -> None:
    """It is a terminal event like any other, and is passed on."""
    async with engines(tmp_path, 1) as fakes, router(tmp_path, fakes) as service, gateway(service) as session:
        fakes[0].fail_next(CancelledRequestError("gone"))
        assert await session.submit(request_of(prompt_of(1))).result() == Finished(FinishReason.CANCELLED)


async def test_a_gateway_that_goes_away_frees_what_it_had(tmp_path: Path) -> None:
    """Its streams are cancelled at the engines; others go on."""
    async with engines(tmp_path, 1) as fakes, router(tmp_path, fakes) as service, gateway(service) as stays:
        fakes[0].hold_at(2)
        kept = request_of(prompt_of(1))
        stream = stays.submit(kept)
        async with gateway(service) as leaves:
            gone = [request_of(prompt_of(topic)) for topic in (2, 3)]
            for request in gone:
                await leaves.submit(request).until_tokens(2)
        await fakes[0].until(lambda: len(fakes[0].cancelled) == 2)
        assert set(fakes[0].cancelled) == {request.request_id for request in gone}
        fakes[0].hold_at(None)
        await assert_whole(stream, kept)


async def test_a_request_waits_for_an_engine_and_gets_it(tmp_path: Path) -> None:
    """An engine that is coming back, or loads, costs a client time and no error."""
    async with (
        engines(tmp_path, 1) as fakes,
        router(tmp_path, fakes, hold=60) as service,
        gateway(service) as session,
    ):
        await fakes[0].kill()
        await until(lambda: not service.router.fleet.ready)
        request = request_of(prompt_of(1))
        stream = session.submit(request)
        await until(lambda: metric(service, "held_requests") == 1)
        await fakes[0].start()
        await assert_whole(stream, request)
        assert metric(service, "held_seconds_count") == 1


@pytest.mark.parametrize("hold", [0.0, 0.05])
async def test_with_no_engine_left_the_answer_says_when_to_come_again(tmp_path: Path, hold: float) -> None:
    """At once or after the hold: UNAVAILABLE with a hint, which the gateway makes a 503 with Retry-After."""
    async with (
        engines(tmp_path, 1) as fakes,
        router(tmp_path, fakes, hold=hold) as service,
        gateway(service) as session,
    ):
        fakes[0].hold_at(2)
        running = session.submit(request_of(prompt_of(2)))
        await running.until_tokens(2)
        await fakes[0].kill()
        began = time.monotonic()
        for stream in (running, session.submit(request_of(prompt_of(1)))):
            error = (await stream.result()).error
            assert error is not None and error.code is ErrorCode.UNAVAILABLE
            assert error.retry_after is not None and error.retry_after > 0
            assert "engine-0" in error.message
        assert time.monotonic() - began < hold + 5


async def test_a_deadline_ends_a_wait(tmp_path: Path) -> None:
    """A request that is too late for its client must not wait on."""
    nobody = (f"unix:{tmp_path}/nobody",)
    async with router(tmp_path, [], engines=nobody, hold=60) as service, gateway(service) as session:
        request = request_of(prompt_of(1), deadline_unix_ms=int(time.time() * 1000) + 50)
        finished = await session.submit(request).result()
        assert finished.error is not None and finished.error.code is ErrorCode.DEADLINE_EXCEEDED
        assert finished.error.field == "deadline_unix_ms"


async def test_a_model_that_nobody_serves_is_named(tmp_path: Path) -> None:
    """Known at once while engines are there; with one that is away, its model is only not there now."""
    async with (
        engines(tmp_path, 2) as fakes,
        router(tmp_path, fakes, hold=0.05) as service,
        gateway(service) as session,
    ):
        finished = await session.submit(request_of(prompt_of(1), model="other")).result()
        assert finished.error is not None and finished.error.code is ErrorCode.NOT_FOUND
        assert finished.error.field == "model" and "fake-model" in finished.error.message
        await fakes[1].kill()
        fakes[1].model = "other"
        await fakes[1].start()
        await until(lambda: "other" in service.router.fleet.models)
        request = request_of(prompt_of(1), model="other")
        stream = session.submit(request)
        await assert_whole(stream, request)
        await fakes[1].kill()
        await until(lambda: not endpoint_of(service, fakes[1]).routable)
        finished = await session.submit(request_of(prompt_of(1), model="other")).result()
        assert finished.error is not None and finished.error.code is ErrorCode.UNAVAILABLE


async def test_an_update_that_makes_no_sense_ends_its_request_alone(tmp_path: Path) -> None:
    """A bug in one engine's answer to one request: an error there, and the neighbours go on."""
    async with engines(tmp_path, 1) as fakes, router(tmp_path, fakes) as service, gateway(service) as session:
        fakes[0].hold_at(2)
        requests = [request_of(prompt_of(topic)) for topic in (1, 2)]
        streams = [session.submit(request) for request in requests]
        for stream in streams:
            await stream.until_tokens(2)
        key = next(
            key for key, flight in endpoint_of(service, fakes[0]).flights.items()
            if flight.request.request_id == requests[0].request_id
        )  # fmt: skip
        finished = session_pb2.Finished(reason=request_pb2.FinishReason.FINISH_REASON_ERROR)
        for update in (
            session_pb2.RequestUpdate(key=key, finished=finished),
            session_pb2.RequestUpdate(key=12345, token_ids=[1]),
        ):
            fakes[0].send_raw(session_pb2.SessionResponse(step=session_pb2.StepFrame(updates=[update])))
        ended = await streams[0].result()
        assert ended.error is not None and ended.error.code is ErrorCode.INTERNAL
        await fakes[0].until(lambda: fakes[0].cancelled == [requests[0].request_id])
        fakes[0].hold_at(None)
        await assert_whole(streams[1], requests[1])
        assert fakes[0].sessions_opened == 1


async def test_an_engine_that_breaks_the_contract_is_left_alone(tmp_path: Path) -> None:
    """Frames that make no sense, or pages of another size, would corrupt every stream: it gets no requests."""
    async with (
        engines(tmp_path, 2) as fakes,
        router(tmp_path, fakes) as service,
        gateway(service) as session,
    ):
        fakes[0].send_raw(session_pb2.SessionResponse(welcome=session_pb2.Welcome(server="twice")))
        await until(lambda: not endpoint_of(service, fakes[0]).routable)
        request = request_of(prompt_of(1))
        await assert_whole(session.submit(request), request)
        assert holder_of(fakes, request) is fakes[1]
        await fakes[1].kill()
        fakes[1].page_size = 32
        await fakes[1].start()
        await fakes[1].until(lambda: fakes[1].sessions_opened == 2 and not fakes[1].sessions_open)
        assert not endpoint_of(service, fakes[1]).routable


async def test_a_stalled_engine_gets_nothing_until_it_steps_again(tmp_path: Path) -> None:
    """Its server still answers: without care each request would lose its time there once more."""
    async with (
        engines(tmp_path, 2) as fakes,
        router(tmp_path, fakes, stall_timeout=0.5) as service,
        gateway(service) as session,
    ):
        stuck, well = fakes
        well.set_load(waiting=0, pending_prefill_tokens=1_000_000)
        await until(lambda: endpoint_of(service, well).view.pending_prefill_tokens)
        stuck.hold_at(0)
        stuck.set_load(running=1, steps=7)
        request = request_of(prompt_of(1))
        await assert_whole(session.submit(request), request)
        assert [len(fake.submitted) for fake in fakes] == [1, 1]
        await stuck.until(lambda: stuck.sessions_opened == 2)
        await until(lambda: endpoint_of(service, stuck).state == "stalled")
        again = request_of(prompt_of(1))
        await assert_whole(session.submit(again), again)
        assert [len(fake.submitted) for fake in fakes] == [1, 2]
        stuck.hold_at(None)
        stuck.set_load(steps=8)
        await until(lambda: endpoint_of(service, stuck).routable)


async def test_an_engine_that_steps_for_others_is_not_stalled(tmp_path: Path) -> None:
    """A request may wait in a queue for long; that its engine works shows in the steps that it reports."""
    async with (
        engines(tmp_path, 1) as fakes,
        router(tmp_path, fakes, stall_timeout=0.2) as service,
        gateway(service) as session,
    ):
        fakes[0].hold_at(0)
        request = request_of(prompt_of(1))
        stream = session.submit(request)
        await fakes[0].until_submitted()
        began, steps = time.monotonic(), itertools.count(1)
        while time.monotonic() - began < 3 * 0.2:
            step = next(steps)
            fakes[0].set_load(steps=step)
            await until(lambda step=step: endpoint_of(service, fakes[0])._load.steps == step)
        assert fakes[0].sessions_opened == 1
        fakes[0].hold_at(None)
        await assert_whole(stream, request)


async def test_a_router_that_stood_still_blames_no_engine(tmp_path: Path) -> None:
    """A paused machine or a starved process: declaring every engine stalled would move all streams at once."""
    async with (
        engines(tmp_path, 1) as fakes,
        router(tmp_path, fakes, stall_timeout=0.2) as service,
        gateway(service) as session,
    ):
        fakes[0].hold_at(1)
        request = request_of(prompt_of(1))
        stream = session.submit(request)
        await stream.until_tokens(1)
        time.sleep(0.5)  # noqa: ASYNC251 (nothing in this process may run)
        fakes[0].hold_at(None)
        await assert_whole(stream, request)
        assert fakes[0].sessions_opened == 1
