"""The engine as its routers see it: a real process on a Unix socket, a tiny random Llama in it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import grpc
import pytest
from engine_process import GREEDY, core_of, engine, prompt_of, request
from session_client import DEADLINE, SessionClient
from tiny_models import greedy, tiny_llama

from quire.engine.engine_servicer import EngineServicer
from quire.engine.hub import Hub
from quire.engine.phase import PhaseState
from quire.service.errors import ErrorCode, UnavailableError
from quire.service.grpc_server import GrpcServer, channel
from quire.service.pages import HASH_BYTES, prefix_hashes
from quire.service.request import (
    CacheKey,
    Constraint,
    ConstraintKind,
    FinishReason,
    SamplingParams,
    StopConditions,
)
from quire.service.wire import request_to_proto
from quire.v1 import engine_pb2, engine_pb2_grpc


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return folder, tiny_llama(folder)


async def test_answers_equal_the_reference_and_prefixes_are_found(model, tmp_path: Path) -> None:
    """The whole path socket → hub → core → model must change no token, and a second prompt must find its pages."""
    folder, reference = model
    async with engine(folder, tmp_path / "e", "--max-num-seqs", "3") as pod, SessionClient(pod.address) as session:
        assert session.welcome is not None and session.welcome.model == "tiny"
        prompts = [prompt_of(length, length) for length in (1, 5, 33, 64, 100)]
        streams = [session.submit(request(prompt, 12)) for prompt in prompts]
        for prompt, stream in zip(prompts, streams, strict=True):
            finished = await stream.result()
            expected = greedy(reference, prompt, 12)
            assert stream.token_ids == expected
            assert finished.reason is (FinishReason.STOP if len(expected) < 12 else FinishReason.LENGTH)
            assert stream.started is not None and stream.started.engine == "engine-0"
            assert stream.started.cached_tokens == 0
        again = session.submit(request([*prompts[4][:90], 7], 4))
        await again.result()
        assert again.started is not None and again.started.cached_tokens == 80
        assert again.token_ids == greedy(reference, [*prompts[4][:90], 7], 4)
        salted = session.submit(request(prompts[4], 1, cache_key=CacheKey("tenant")))
        await salted.result()
        assert salted.started is not None and salted.started.cached_tokens == 0


async def test_a_moved_request_goes_on_where_it_was(model, tmp_path: Path) -> None:
    """A router resubmits prompt and tokens so far: the rest must be what the first engine would have said."""
    folder, _ = model
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=11)
    async with engine(folder, tmp_path / "e") as pod, SessionClient(pod.address) as session:
        for params in (GREEDY, sampling):
            whole = session.submit(request(prompt_of(20), 20, sampling=params))
            await whole.result()
            rest = session.submit(
                request(prompt_of(20), 20, sampling=params, output_token_ids=tuple(whole.token_ids[:9]))
            )
            await rest.result()
            assert rest.token_ids == whole.token_ids[9:]


async def test_bad_requests_end_with_an_error_that_names_the_field(model, tmp_path: Path) -> None:
    """One peer's bad request must neither end the session nor stay unanswered."""
    folder, _ = model
    async with engine(folder, tmp_path / "e") as pod, SessionClient(pod.address) as session:
        missing = request_to_proto(request([5]))
        missing.sampling.ClearField("seed")
        cases = [
            (missing, "sampling.seed"),
            (request([5, 100_000]), "prompt_token_ids"),
            (request(prompt_of(256)), "prompt_token_ids"),
            (request([5], model="other"), "model"),
            (request([5], 2, output_token_ids=(7, 8)), "output_token_ids"),
            (request([5], constraint=Constraint(ConstraintKind.REGEX, "a+")), "constraint"),
        ]
        for message, field in cases:
            stream = session.submit(message)
            finished = await stream.result()
            assert finished.reason is FinishReason.ERROR and finished.error is not None
            assert finished.error.field == field, finished.error.message
            assert stream.terminal_events == 1
        fine = session.submit(request([5], 2))
        assert (await fine.result()).reason in (FinishReason.LENGTH, FinishReason.STOP)


async def test_cancel_and_deadline_free_the_pages(tmp_path: Path) -> None:
    """A client that goes away must cost nothing more: one terminal event, no page held."""
    tiny_llama(tmp_path / "tiny", max_position_embeddings=4096)
    # Long enough not to end before it is cancelled.
    stop = StopConditions(4000, ignore_eos=True)
    async with engine(tmp_path / "tiny", tmp_path / "e", "--no-prefix-caching") as pod:
        async with SessionClient(pod.address) as session, SessionClient(pod.address) as leaver:
            long = session.submit(request(prompt_of(30), stop=stop))
            await long.until_tokens(3)
            session.cancel(long)
            assert (await long.result()).reason is FinishReason.CANCELLED
            late = session.submit(request(prompt_of(30), 50, deadline_unix_ms=1))
            error = (await late.result()).error
            assert error is not None and error.code is ErrorCode.DEADLINE_EXCEEDED
            abandoned = leaver.submit(request(prompt_of(30), stop=stop))
            await abandoned.until_tokens(1)
        async with asyncio.timeout(DEADLINE):
            async for load in pod.stub.WatchLoad(engine_pb2.WatchLoadRequest(interval_ms=10)):
                if load.running + load.waiting == 0 and load.pages_available == load.pages_total:
                    break
        assert long.terminal_events == late.terminal_events == 1


async def test_cache_events_tell_what_the_pages_hold(model, tmp_path: Path) -> None:
    """A router that misses a page, or believes in one that is gone, sends prompts to the wrong pod."""
    folder, _ = model
    async with engine(folder, tmp_path / "e", "--num-pages", "17") as pod, SessionClient(pod.address) as session:
        events = pod.stub.WatchCache(engine_pb2.WatchCacheRequest())
        first = await events.read()
        assert first.HasField("snapshot") and first.snapshot.stored == b"" and first.sequence == 0
        held: set[bytes] = set()
        sequence = 0
        for seed in range(1, 4):
            prompt = prompt_of(100, seed)
            stream = session.submit(request(prompt, 5))
            await stream.result()
            expected = prefix_hashes(CacheKey(), [*prompt, *stream.token_ids[:-1]])
            async with asyncio.timeout(DEADLINE):
                while not held.issuperset(expected):
                    event = await events.read()
                    assert event.epoch == first.epoch and event.sequence == sequence + 1
                    sequence = event.sequence
                    held -= set(split(event.delta.removed))
                    held |= set(split(event.delta.stored))
        assert len(held) <= 17
        late = await pod.stub.WatchCache(engine_pb2.WatchCacheRequest()).read()
        assert set(split(late.snapshot.stored)) == held and late.sequence == sequence


async def test_a_look_inside(tmp_path: Path) -> None:
    """`quire top` shows what this says: through all processes, of one moment, and without a word of what is asked."""
    tiny_llama(tmp_path / "tiny", max_position_embeddings=4096)
    whole = engine_pb2.InspectRequest(max_cells=65536, max_sequences=10)
    async with (
        engine(tmp_path / "tiny", tmp_path / "e", "--num-pages", "600", "--max-num-seqs", "2") as pod,
        SessionClient(pod.address) as session,
    ):
        idle = await pod.stub.Inspect(whole)
        assert idle.pages.pages_per_cell == 1 and len(idle.pages.used) == 600 and not any(idle.pages.used)
        assert idle.stats.steps == 0 and not idle.sequences and idle.status.model == "tiny"
        # Long enough not to end before they are looked at.
        stop = StopConditions(4000, ignore_eos=True)
        held = [session.submit(request(prompt_of(64, 1), request_id="1", stop=stop))]
        await held[0].until_tokens(1)
        held += [session.submit(request(prompt_of(64, seed), request_id=str(seed), stop=stop)) for seed in (1, 2)]
        await held[1].until_tokens(2)
        seen = await pod.stub.Inspect(whole)
        assert [row.request_id for row in seen.sequences] == ["1", "1", "2"]
        decoding, waiting = engine_pb2.SEQUENCE_STATE_DECODING, engine_pb2.SEQUENCE_STATE_WAITING
        assert [row.state for row in seen.sequences] == [decoding, decoding, waiting]
        assert all(0 < row.age_ms < DEADLINE * 1000 and row.prompt_tokens == 64 for row in seen.sequences)
        assert (seen.status.load.running, seen.status.load.waiting) == (2, 1)
        # The second found three of the first one's pages: the last token of a prompt is computed in any case.
        assert seen.stats.cached_prompt_tokens == 3 * 16 and sum(seen.stats.first_token_seconds.counts) == 2
        assert sum(seen.pages.shared) == 3 and sum(seen.pages.used) == sum(row.pages for row in seen.sequences) - 3
        few = await pod.stub.Inspect(engine_pb2.InspectRequest(max_cells=7, max_sequences=1))
        assert few.pages.pages_per_cell == 86 and len(few.pages.used) == 7 and len(few.sequences) == 1
        for stream in held:
            session.cancel(stream)
            await stream.result()


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_sequences": 1}, "max_cells is missing: set it"),
        ({"max_cells": 1}, "max_sequences is missing: set it"),
        ({"max_cells": 0, "max_sequences": 0}, "max_cells is 0: it must lie in [1, 65536]"),
        ({"max_cells": 1, "max_sequences": 5000}, "max_sequences is 5000: it must lie in [0, 4096]"),
    ],
)
async def test_a_look_inside_has_limits(limits: dict[str, int], said: str, tmp_path: Path) -> None:
    """What is asked for must not be able to keep the core busy."""
    hub = Hub(lambda message: None, epoch=1)
    server = GrpcServer(f"unix:{tmp_path / 's'}")
    servicer = EngineServicer("engine-0", PhaseState(), hub)
    server.add("quire.v1.EngineService", engine_pb2_grpc.add_EngineServiceServicer_to_server, servicer)
    address = await server.start()
    async with channel(address) as connection:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await engine_pb2_grpc.EngineServiceStub(connection).Inspect(engine_pb2.InspectRequest(**limits))
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT and failure.value.details() == said
        loading = await engine_pb2_grpc.EngineServiceStub(connection).Inspect(
            engine_pb2.InspectRequest(max_cells=1, max_sequences=0)
        )
    assert loading.status.phase == engine_pb2.ENGINE_PHASE_LOADING and not loading.HasField("pages")
    await server.stop(0)


async def test_who_asked_the_core_is_told_that_it_is_gone() -> None:
    """A look inside must not wait for ever for a process that died."""
    hub = Hub(lambda message: None, epoch=1)
    asked = asyncio.create_task(hub.inspect(1, 1))
    abandoned = asyncio.create_task(hub.inspect(1, 1))
    await asyncio.sleep(0)
    abandoned.cancel()
    await asyncio.wait((abandoned,))
    hub.fail_all(UnavailableError("gone"))
    with pytest.raises(UnavailableError, match="gone"):
        await asked


async def test_drain_lets_requests_finish_and_takes_no_more(model, tmp_path: Path) -> None:
    """A rolling update must break no stream."""
    folder, reference = model
    async with engine(folder, tmp_path / "e") as pod, SessionClient(pod.address) as session:
        stream = session.submit(request(prompt_of(40), 60))
        await stream.until_tokens(1)
        answer = await asyncio.wait_for(pod.stub.Drain(engine_pb2.DrainRequest(grace_ms=60_000)), DEADLINE)
        assert answer.cut_off == 0
        await asyncio.wait_for(session.draining.wait(), DEADLINE)
        await stream.result()
        assert stream.token_ids == greedy(reference, prompt_of(40), 60)
        refused = session.submit(request([5]))
        error = (await refused.result()).error
        assert error is not None and error.code is ErrorCode.UNAVAILABLE


async def test_sigterm_ends_the_process_in_order(model, tmp_path: Path) -> None:
    """Kubernetes stops a pod with SIGTERM: what is in flight finishes within the grace period."""
    folder, reference = model
    async with engine(folder, tmp_path / "e") as pod, SessionClient(pod.address) as session:
        stream = session.submit(request(prompt_of(40), 60))
        await stream.until_tokens(1)
        pod.process.send_signal(signal.SIGTERM)
        await stream.result()
        assert stream.token_ids == greedy(reference, prompt_of(40), 60)
        assert await asyncio.wait_for(pod.process.wait(), DEADLINE) == 0


async def test_a_dead_core_ends_every_request_and_the_process(model, tmp_path: Path) -> None:
    """A crash in the model must be a clear error and a restart, never a hang."""
    folder, _ = model
    async with engine(folder, tmp_path / "e") as pod, SessionClient(pod.address) as session:
        stream = session.submit(request(prompt_of(40), stop=StopConditions(200, ignore_eos=True)))
        await stream.until_tokens(1)
        os.kill(core_of(pod.process.pid), signal.SIGKILL)
        error = (await stream.result()).error
        assert error is not None and error.code is ErrorCode.UNAVAILABLE
        # Not 2, which says that its flags or its model are wrong.
        assert await asyncio.wait_for(pod.process.wait(), DEADLINE) == 1


async def test_the_core_does_not_outlive_its_server(model, tmp_path: Path) -> None:
    """A server that is killed must not leave a process behind that holds the model's memory."""
    folder, _ = model
    async with engine(folder, tmp_path / "e") as pod:
        core = core_of(pod.process.pid)
        watch = os.pidfd_open(core)
        pod.process.kill()
        await pod.process.wait()
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(watch, ended.set)
        await asyncio.wait_for(ended.wait(), DEADLINE)
        asyncio.get_running_loop().remove_reader(watch)
        os.close(watch)


async def test_a_model_that_can_not_load_says_why(tmp_path: Path) -> None:
    """The process must end with the reason, and status must not claim that it is still loading."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "quire.engine", "--listen", f"unix:{tmp_path / 'e'}", "--model", str(tmp_path / "none"),
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, log = await asyncio.wait_for(process.communicate(), DEADLINE)
    assert process.returncode == 2
    assert str(tmp_path / "none") in log.decode()


def split(hashes: bytes) -> list[bytes]:
    return [hashes[i : i + HASH_BYTES] for i in range(0, len(hashes), HASH_BYTES)]
