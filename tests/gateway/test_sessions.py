"""Requests in flight: clients that go away, routers that go away, and text that goes on unbroken."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_router import Answer, FakeRouter, Submission
from gateway_testing import ANSWER, MODEL, StartGateway, eventually, sentence_piece, until_ready

from quire.gateway.model import ServedModel
from quire.gateway.server import Gateway
from quire.service.checkpoint import TextModel
from quire.service.errors import OverloadedError, UnavailableError
from quire.service.request import FinishReason, VerifiedDrafts
from quire.v1 import request_pb2, session_pb2

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = {"model": MODEL, "messages": QUESTION}


@pytest.fixture
def answer() -> Answer | None:
    """Tests here answer by hand, unless they say otherwise."""
    return None


@pytest.fixture
async def second(tmp_path: Path) -> AsyncIterator[FakeRouter]:
    """A router that is not there yet."""
    fake = FakeRouter(f"unix:{tmp_path}/second.sock", MODEL)
    yield fake
    await fake.kill()


class Reader:
    """Reads a streaming chat in the background, chunk by chunk."""

    def __init__(self, http: httpx.AsyncClient, **fields: Any) -> None:
        self.text = ""
        self.events: list[Any] = []
        self._grown = asyncio.Event()
        self.task = asyncio.create_task(self._read(http, CHAT | {"stream": True} | fields))

    async def until(self, text: str) -> None:
        """Returns when all of `text` has come."""
        async with asyncio.timeout(10):
            while self.text != text:
                self._grown.clear()
                await self._grown.wait()

    async def end(self) -> list[Any]:
        """All events, when the stream has ended."""
        await asyncio.wait_for(self.task, 10)
        return self.events

    async def _read(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if not line:
                    continue
                data = line.removeprefix("data: ")
                event = data if data == "[DONE]" else json.loads(data)
                self.events.append(event)
                if isinstance(event, dict) and event.get("choices"):
                    self.text += event["choices"][0]["delta"].get("content") or ""
                self._grown.set()


async def cancelled(submission: Submission) -> None:
    await asyncio.wait_for(submission.cancelled.wait(), 10)


async def gone(task: asyncio.Task[Any]) -> None:
    """The client hangs up."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("moment", ["queued", "started", "streaming"])
@pytest.mark.parametrize("stream", [True, False])
async def test_disconnect_cancels(
    http: httpx.AsyncClient, router: FakeRouter, encode: Callable[[str], list[int]], moment: str, stream: bool
) -> None:
    """Without it an engine would go on generating for a client that is gone."""
    reader = Reader(http, stream=stream)
    submission = await router.next()
    if moment != "queued":
        submission.send(cached=0)
    if moment == "streaming":
        submission.send(encode("The capital"))
        if stream:
            await reader.until("The capital")
    await gone(reader.task)
    await cancelled(submission)


async def test_cancel_of_one_disturbs_no_other(
    http: httpx.AsyncClient, router: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it the session that all requests share could suffer from one client's leaving."""
    first, second = Reader(http), Reader(http)
    submissions = [await router.next(), await router.next()]
    for submission in submissions:
        submission.send(encode("One"))
    await asyncio.gather(first.until("One"), second.until("One"))
    await gone(first.task)
    _, pending = await asyncio.wait(
        [asyncio.create_task(cancelled(submission), name=str(i)) for i, submission in enumerate(submissions)],
        return_when=asyncio.FIRST_COMPLETED,
    )
    other = submissions[int(pending.pop().get_name())]
    other.send(encode(" two"), finish=FinishReason.STOP)
    assert (await second.end())[-1] == "[DONE]"
    assert second.text == "One two"


@pytest.mark.parametrize("text", [ANSWER, "naïve 👩‍👩‍👧 日本語"])
async def test_router_restart_is_invisible(
    http: httpx.AsyncClient, router: FakeRouter, encode: Callable[[str], list[int]], text: str
) -> None:
    """Without it a router's restart would break streams, repeat text, or damage a character that was on its way."""
    tokens = encode(text)
    for turn, cut in enumerate((1, len(tokens) // 2, len(tokens) - 1)):
        reader = Reader(http, seed=5)
        submission = await router.next()
        submission.send(cached=32)
        submission.send(tokens[:cut])
        await until_first_tokens(http, turn + 1)
        await router.kill()
        await router.start()
        again = await router.next()
        assert again.request.output_token_ids == tuple(tokens[:cut])
        assert again.request.request_id == submission.request.request_id
        assert again.request.prompt_token_ids == submission.request.prompt_token_ids
        assert again.request.sampling == submission.request.sampling
        again.send(cached=48)
        again.send(tokens[cut:], finish=FinishReason.STOP)
        assert (await reader.end())[-1] == "[DONE]"
        assert reader.text == text
        await until_ready(http)


async def until_first_tokens(http: httpx.AsyncClient, requests: int) -> None:
    """Returns when so many requests have had their first step's tokens."""
    sample = f'time_to_first_token_seconds_count{{operation="chat"}} {requests}.0'
    await eventually(lambda: http.get("/metrics"), lambda answer: sample in answer.text)


async def test_usage_after_a_move(
    http: httpx.AsyncClient, router: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it tokens could be counted twice, or the second router's cache be taken for the client's saving."""
    reader = Reader(http, stream_options={"include_usage": True})
    submission = await router.next()
    submission.send(cached=16)
    submission.send(encode(ANSWER)[:3], drafts=VerifiedDrafts(2, 1))
    await until_first_tokens(http, 1)
    await router.kill()
    await router.start()
    again = await router.next()
    again.send(cached=0)
    again.send(encode(ANSWER)[3:], finish=FinishReason.STOP, drafts=VerifiedDrafts(1, 4))
    usage = (await reader.end())[-2]["usage"]
    assert usage["completion_tokens"] == len(encode(ANSWER))
    assert usage["prompt_tokens_details"]["cached_tokens"] == 16
    assert usage["completion_tokens_details"] == {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 5}


async def test_other_router_takes_over(
    start_gateway: StartGateway, router: FakeRouter, second: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it a second router would not help when the first one dies."""
    gateway = await start_gateway(router.address, second.address)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
        await until_ready(http)
        reader = Reader(http)
        submission = await router.next()
        submission.send(encode("Half"))
        await reader.until("Half")
        await second.start()
        await asyncio.wait_for(second.connected.wait(), 10)
        await router.kill()
        again = await second.next()
        assert again.request.output_token_ids == tuple(encode("Half"))
        again.send(encode(" done"), finish=FinishReason.STOP)
        await reader.end()
        assert reader.text == "Half done"


async def test_requests_are_spread(start_gateway: StartGateway, router: FakeRouter, second: FakeRouter) -> None:
    """Without it one router could get all requests and the other none."""
    await second.start()
    gateway = await start_gateway(router.address, second.address)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
        await eventually(lambda: http.get("/ready"), lambda answer: answer.text.count('"ready"') == 3)
        readers = [Reader(http) for _ in range(4)]
        for _ in range(2):
            await router.next()
            await second.next()
        for reader in readers:
            await gone(reader.task)


async def test_draining_router_gets_nothing_new(
    start_gateway: StartGateway, router: FakeRouter, second: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it a router could never be stopped without hurting somebody."""
    gateway = await start_gateway(router.address, second.address)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
        await until_ready(http)
        old = Reader(http)
        submission = await router.next()
        submission.send(encode("Old"))
        await old.until("Old")
        router.drain()
        await until_ready(http, 503, "draining")
        await second.start()
        await until_ready(http)
        new = Reader(http)
        (await second.next()).send(encode("New"), finish=FinishReason.STOP)
        await new.end()
        assert new.text == "New"
        submission.send(encode(" one"), finish=FinishReason.STOP)
        await old.end()
        assert old.text == "Old one"


async def test_what_a_draining_router_gives_up_goes_on_elsewhere(
    start_gateway: StartGateway, router: FakeRouter, second: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it every stream that outlasts a router's grace period would break at each rollout, and a request that is
    on its way when the router begins to drain would be refused."""
    gateway = await start_gateway(router.address, second.address)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
        await until_ready(http)
        old = Reader(http)
        streaming = await router.next()
        streaming.send(encode("Old"), cached=0)
        await old.until("Old")
        crossing = Reader(http)
        sent = await router.next()
        await second.start()
        router.drain()
        for submission in (sent, streaming):
            submission.send(error=UnavailableError("the router is shutting down: send the request to another"))
        moved = [await second.next(), await second.next()]
        assert sorted(list(each.request.output_token_ids) for each in moved) == [[], encode("Old")]
        for submission in moved:
            submission.send(encode(" one"), cached=0, finish=FinishReason.STOP)
        for reader in (old, crossing):
            events = await reader.end()
            assert events[-1] == "[DONE]" and not [event for event in events[:-1] if "error" in event]
        assert (old.text, crossing.text) == ("Old one", " one")


async def test_readiness_follows_the_router(start_gateway: StartGateway, router: FakeRouter) -> None:
    """Without it a load balancer would send requests to a gateway that nobody stands behind."""
    await router.set_serving(False)
    gateway = await start_gateway(router.address, router_timeout=0.2)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
        assert (await http.get("/health")).status_code == 200
        await asyncio.wait_for(router.connected.wait(), 10)
        await until_ready(http, 503, "its health is not SERVING")
        await until_ready(http, 503, router.address)
        refused = await http.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503
        assert "no router took the request within 0.2 s" in refused.json()["error"]["message"]
        await router.set_serving(True)
        await until_ready(http)
        await router.kill()
        await until_ready(http, 503)


async def test_request_waits_for_a_router(
    start_gateway: StartGateway, second: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it every request during a router's restart would fail."""
    gateway = await start_gateway(second.address)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
        reader = Reader(http)
        await until_ready(http, 503, "not connected")
        await second.start()
        (await second.next()).send(encode("late"), finish=FinishReason.STOP)
        await reader.end()
        assert reader.text == "late"


async def test_router_of_another_model(start_gateway: StartGateway, tmp_path: Path) -> None:
    """Without it a gateway could send one model's tokens to another's engines and answer nonsense."""
    other = await FakeRouter(f"unix:{tmp_path}/other.sock", "another-model").start()
    gateway = await start_gateway(other.address)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
        await until_ready(http, 503, "another-model")
    await other.kill()


async def test_lost_terminal_event(
    http: httpx.AsyncClient, router: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it a request whose last token came just before its router died would generate beyond its end."""
    by_length = Reader(http, max_tokens=3)
    (await router.next()).send(encode("One two three")[:3])
    await by_length.until("One two three")
    by_end = Reader(http)
    (await router.next()).send([*encode("Done"), 2])
    await by_end.until("Done")
    await router.kill()
    assert (await by_length.end())[-2]["choices"][0]["finish_reason"] == "length"
    assert (await by_end.end())[-2]["choices"][0]["finish_reason"] == "stop"
    await router.start()
    await until_ready(http)
    assert router.submitted.empty()


async def test_request_that_kills_routers_is_given_up(http: httpx.AsyncClient, router: FakeRouter) -> None:
    """Without it one poisonous request could take routers down for ever."""
    request = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
    for _ in range(4):
        await router.next()
        await router.kill()
        await router.start()
    response = await asyncio.wait_for(request, 10)
    assert response.status_code == 503
    assert "4 routers were lost" in response.json()["error"]["message"]


async def test_error_after_streaming_began(
    http: httpx.AsyncClient, router: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it a stream that failed would look like one that ended."""
    reader = Reader(http)
    submission = await router.next()
    submission.send(encode("So far"))
    await reader.until("So far")
    submission.send(encode(" so good"), error=OverloadedError("the queue is full"))
    events = await reader.end()
    assert reader.text == "So far so good"
    assert events[-1] == {
        "error": {"message": "the queue is full", "type": "rate_limit_error", "param": None, "code": "overloaded"}
    }


async def test_client_library_raises_stream_errors(client: openai.AsyncOpenAI, router: FakeRouter) -> None:
    """Without it the official client would take a broken stream for a short answer."""
    task = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True))
    submission = await router.next()
    submission.send(cached=0)
    stream = await task
    submission.send(error=OverloadedError("the queue is full"))
    with pytest.raises(openai.APIError, match="the queue is full"):
        async for _ in stream:
            pass


async def test_overload_before_the_stream_is_429(http: httpx.AsyncClient, router: FakeRouter) -> None:
    """Without it clients would not know to come back later."""
    request = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT | {"stream": True}))
    (await router.next()).send(error=OverloadedError("the queue is full"))
    response = await request
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"


async def test_what_a_router_must_not_send(
    http: httpx.AsyncClient, router: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it one wrong update could end the session and every request on it."""
    bystander = Reader(http)
    other = await router.next()
    request = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
    submission = await router.next()
    stray = session_pb2.RequestUpdate(key=10**6, token_ids=[5])
    router.send_raw(session_pb2.SessionResponse(step=session_pb2.StepFrame(updates=[stray])))
    finished = session_pb2.Finished(reason=request_pb2.FINISH_REASON_UNSPECIFIED)
    wrong = session_pb2.RequestUpdate(key=submission.key, finished=finished)
    router.send_raw(session_pb2.SessionResponse(step=session_pb2.StepFrame(updates=[wrong])))
    assert (await request).status_code == 500
    other.send(encode("fine"), finish=FinishReason.STOP)
    await bystander.end()
    assert bystander.text == "fine"
    assert len(router.peers) == 1


async def test_broken_protocol_reconnects(
    http: httpx.AsyncClient, router: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it a frame that makes no sense could be taken for one that does."""
    reader = Reader(http)
    await router.next()
    router.send_raw(session_pb2.SessionResponse(welcome=session_pb2.Welcome(model=MODEL)))
    (await router.next()).send(encode("again"), finish=FinishReason.STOP)
    await reader.end()
    assert reader.text == "again"
    assert len(router.peers) == 2


async def test_router_cancels(http: httpx.AsyncClient, router: FakeRouter) -> None:
    """Without it a request that a router took back would hang or look complete."""
    request = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
    (await router.next()).send(finish=FinishReason.CANCELLED)
    assert (await request).json()["error"]["code"] == "cancelled"


@pytest.mark.parametrize("stop", ["Paris", ["zzz", "is Par"], "France is Paris."])
async def test_stop_string(
    http: httpx.AsyncClient,
    router: FakeRouter,
    encode: Callable[[str], list[int]],
    text_model: TextModel,
    stop: Any,
) -> None:
    """Without it part of a stop string could reach the client, or the engine go on behind it."""
    reader = Reader(http, stop=stop, stream_options={"include_usage": True})
    submission = await router.next()
    tokens = encode(ANSWER + " And much more.")
    for token in tokens:
        submission.send([token])
    await cancelled(submission)
    events = await reader.end()
    wanted = stop if isinstance(stop, str) else stop[-1]
    assert reader.text == ANSWER[: ANSWER.index(wanted)]
    assert events[-3]["choices"][0]["finish_reason"] == "stop"
    counts = range(1, len(tokens) + 1)
    needed = next(count for count in counts if wanted in text_model.tokenizer.decode(tokens[:count]))
    assert events[-2]["usage"]["completion_tokens"] == needed


async def test_stop_string_in_one_of_several_prompts(
    client: openai.AsyncOpenAI, router: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it a choice that has met its stop string would go on until the others have ended."""
    task = asyncio.create_task(client.completions.create(model=MODEL, prompt=["a", "b"], stop="!"))
    first, second = await router.next(), await router.next()
    second.send(encode("Slow"))
    first.send(encode("Quick!"))
    await cancelled(first)
    second.send(encode(" but sure"), finish=FinishReason.STOP)
    assert [choice.text for choice in (await task).choices] == ["Quick", "Slow but sure"]


async def test_held_back_text_comes_at_the_end(
    http: httpx.AsyncClient, router: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it the beginning of a stop string that never came whole would be lost."""
    reader = Reader(http, stop="Paris, Texas")
    submission = await router.next()
    tokens = encode("It is Paris")
    submission.send(tokens[:-1])
    submission.send(tokens[-1:])
    await reader.until("It is ")
    submission.send(finish=FinishReason.LENGTH)
    assert (await reader.end())[-2]["choices"][0]["finish_reason"] == "length"
    assert reader.text == "It is Paris"


async def test_slow_reader_gets_everything(
    gateway: Gateway, http: httpx.AsyncClient, router: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it a client that reads slowly could lose text, or hold up everybody else's."""
    body = json.dumps(CHAT | {"stream": True}).encode()
    reading, writing = await asyncio.open_connection(*gateway.url.removeprefix("http://").split(":"), limit=1 << 24)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writing.transport.pause_reading()  # type: ignore[attr-defined]
    writing.write(head.encode() + body)
    submission = await router.next()
    words = encode(" word") * submission.request.stop.max_tokens
    for word in words:
        submission.send([word])
    submission.send(finish=FinishReason.LENGTH)
    quick = Reader(http)
    (await router.next()).send(encode("quick"), finish=FinishReason.STOP)
    await quick.end()
    writing.transport.resume_reading()  # type: ignore[attr-defined]
    raw = await asyncio.wait_for(reading.read(), 20)
    writing.close()
    assert len(words) > 8000
    assert raw.count(b" word") == len(words)
    assert b"data: [DONE]" in raw


async def test_many_at_once(http: httpx.AsyncClient, router: FakeRouter, encode: Callable[[str], list[int]]) -> None:
    """Without it updates could reach the wrong request, or one could end twice or never."""
    count = 100

    async def answer_all() -> None:
        submissions = [await router.next() for _ in range(count)]
        texts = {
            s.key: encode(f"answer {s.request.sampling.seed} " + "x" * (s.request.sampling.seed % 7))
            for s in submissions
        }
        while any(texts.values()):
            frame = session_pb2.StepFrame()
            for submission in submissions:
                if tokens := texts[submission.key]:
                    update = frame.updates.add(key=submission.key, token_ids=tokens[:1])
                    del tokens[0]
                    if not tokens:
                        update.finished.reason = request_pb2.FINISH_REASON_STOP
            router.send_raw(session_pb2.SessionResponse(step=frame))

    answering = asyncio.create_task(answer_all())
    bodies = [CHAT | {"seed": seed} for seed in range(count)]
    async with httpx.AsyncClient(base_url=http.base_url, timeout=30, limits=httpx.Limits()) as wide:
        responses = await asyncio.gather(*(wide.post("/v1/chat/completions", json=body) for body in bodies))
    await answering
    for seed, response in enumerate(responses):
        assert response.json()["choices"][0]["message"]["content"] == f"answer {seed} " + "x" * (seed % 7)


class TestSentencePiece:
    """A model whose tokens carry the space before a word."""

    @pytest.fixture
    def served_model(self) -> ServedModel:
        text = TextModel(
            tokenizer=sentence_piece(),
            chat_template="{{ messages[0].content }}",
            bos_token="<s>",
            eos_token="</s>",
            add_bos=True,
            vocab_size=265,
            max_model_len=64,
            eos_token_ids=(1,),
        )
        return ServedModel((MODEL,), text)

    async def test_first_space(self, client: openai.AsyncOpenAI, router: FakeRouter) -> None:
        """Without it every chat's answer would begin with a space, or a completion would lose its first one."""
        chat = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=QUESTION))
        (await router.next()).send([2, 3, 1], finish=FinishReason.STOP)
        assert (await chat).choices[0].message.content == "Hello world"
        text = asyncio.create_task(client.completions.create(model=MODEL, prompt="Hello"))
        (await router.next()).send([3, 1], finish=FinishReason.STOP)
        assert (await text).choices[0].text == " world"


class TestGrace:
    """A gateway that is asked to stop."""

    async def test_in_flight_finishes(
        self, start_gateway: StartGateway, router: FakeRouter, encode: Callable[[str], list[int]]
    ) -> None:
        """Without it a rolling update would cut answers off."""
        gateway = await start_gateway(router.address, grace=10.0)
        async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
            await until_ready(http)
            reader = Reader(http)
            submission = await router.next()
            submission.send(encode("Almost"))
            await reader.until("Almost")
            closing = asyncio.create_task(gateway.close())
            with pytest.raises(httpx.ConnectError):
                async with asyncio.timeout(10):
                    while True:
                        # A connection that was made just before the end may also break.
                        with contextlib.suppress(httpx.ReadError, httpx.RemoteProtocolError):
                            async with httpx.AsyncClient(base_url=gateway.url) as late:
                                await late.get("/health")
            submission.send(encode(" there"), finish=FinishReason.STOP)
            assert (await reader.end())[-1] == "[DONE]"
            assert reader.text == "Almost there"
            await asyncio.wait_for(closing, 5)

    async def test_late_ones_get_an_error(
        self, start_gateway: StartGateway, router: FakeRouter, encode: Callable[[str], list[int]]
    ) -> None:
        """Without it a request that outlasts the grace period would end without a word, or never."""
        gateway = await start_gateway(router.address, grace=0.3)
        async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
            await until_ready(http)
            reader = Reader(http)
            unary = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
            for _ in range(2):
                (await router.next()).send(encode("Too long"))
            await reader.until("Too long")
            await asyncio.wait_for(gateway.close(), 10)
            assert (await reader.end())[-1]["error"]["code"] == "unavailable"
            assert (await unary).status_code == 503
