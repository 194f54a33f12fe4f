"""Log-probabilities in both shapes, echo, and several choices, with the official client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fake_router import Answer, FakeRouter, made_up_logprobs
from gateway_testing import ANSWER, MODEL

from quire.service.checkpoint import TextModel
from quire.service.request import FinishReason, PromptLogprobs
from quire.v1 import session_pb2

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
# Its tokens cut characters in two.
EMOJI = "naïve 👩‍👩‍👧 日本語"


async def test_chat(client: openai.AsyncOpenAI, router: FakeRouter, encode: Callable[[str], list[int]]) -> None:
    """Without it tokens could be missing, the end token be among them, or bytes not add up to the text."""
    completion = await client.chat.completions.create(model=MODEL, messages=QUESTION, logprobs=True, top_logprobs=2)
    (choice,) = completion.choices
    assert (await router.next()).request.logprobs == 2
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert "".join(entry.token for entry in content) == ANSWER
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode() == ANSWER
    assert [entry.logprob for entry in content] == [-0.5] * len(encode(ANSWER))
    assert [[top.logprob for top in entry.top_logprobs] for entry in content] == [[-0.5, -9999.0]] * len(content)
    assert content[0].top_logprobs[0].token == content[0].token


async def test_chat_without_top(client: openai.AsyncOpenAI, router: FakeRouter) -> None:
    """Without it `logprobs` alone would do nothing."""
    completion = await client.chat.completions.create(model=MODEL, messages=QUESTION, logprobs=True)
    assert completion.choices[0].logprobs is not None
    assert completion.choices[0].logprobs.content is not None
    assert completion.choices[0].logprobs.content[0].top_logprobs == []
    assert (await router.next()).request.logprobs == 0
    completion = await client.chat.completions.create(model=MODEL, messages=QUESTION)
    assert completion.choices[0].logprobs is None
    assert (await router.next()).request.logprobs is None


async def test_completion(client: openai.AsyncOpenAI, encode: Callable[[str], list[int]]) -> None:
    """Without it the older shape's lists would not belong together."""
    completion = await client.completions.create(model=MODEL, prompt="x", logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    assert logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens) == ANSWER
    assert logprobs.token_logprobs == [-0.5] * len(encode(ANSWER))
    for token, offset, top in zip(logprobs.tokens, logprobs.text_offset, logprobs.top_logprobs, strict=True):
        assert ANSWER[offset:].startswith(token)
        assert top[token] == -0.5
        assert len(top) == 2
    none = await client.completions.create(model=MODEL, prompt="x", logprobs=0)
    assert none.choices[0].logprobs is not None
    assert none.choices[0].logprobs.top_logprobs == [{token: -0.5} for token in logprobs.tokens]


async def test_echo(client: openai.AsyncOpenAI, router: FakeRouter, encode: Callable[[str], list[int]]) -> None:
    """Without it prompts could not be scored, which is what evaluation harnesses do with this."""
    prompt = "Once upon a time 日本"
    completion = await client.completions.create(model=MODEL, prompt=prompt, echo=True, logprobs=1)
    (choice,) = completion.choices
    assert choice.text == prompt + ANSWER
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.text_offset is not None
    size = len(encode(prompt))
    assert len(logprobs.tokens) == size + len(encode(ANSWER))
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == [-0.5] * (len(logprobs.tokens) - 1)
    assert logprobs.text_offset[size] == len(prompt)
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    assert (await router.next()).request.prompt_logprobs == 1
    plain = await client.completions.create(model=MODEL, prompt=encode(prompt), echo=True)
    assert plain.choices[0].text == prompt + ANSWER
    assert (await router.next()).request.prompt_logprobs is None


async def test_echo_alone(client: openai.AsyncOpenAI, router: FakeRouter, encode: Callable[[str], list[int]]) -> None:
    """Without it scoring a prompt would always cost and show a token after it."""
    completion = await client.completions.create(model=MODEL, prompt="One two", echo=True, logprobs=0, max_tokens=0)
    (choice,) = completion.choices
    assert (choice.text, choice.finish_reason) == ("One two", "length")
    assert choice.logprobs is not None
    assert len(choice.logprobs.tokens or []) == len(encode("One two"))
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 0
    assert (await router.next()).request.stop.max_tokens == 1


async def test_streamed(client: openai.AsyncOpenAI) -> None:
    """Without it a stream's tokens could come without their numbers, or with another event's."""
    stream = await client.completions.create(model=MODEL, prompt="Once", echo=True, logprobs=0, stream=True)
    text, tokens, offsets = "", "", []
    async for chunk in stream:
        (choice,) = chunk.choices
        text += choice.text
        if choice.logprobs is not None:
            tokens += "".join(choice.logprobs.tokens or [])
            offsets += choice.logprobs.text_offset or []
    assert text == tokens == "Once" + ANSWER
    assert offsets == sorted(set(offsets))
    chat = await client.chat.completions.create(model=MODEL, messages=QUESTION, logprobs=True, stream=True)
    shown = ""
    async for event in chat:
        (told,) = event.choices
        if told.logprobs is not None:
            shown += "".join(entry.token for entry in told.logprobs.content or [])
            assert told.delta.content == "".join(entry.token for entry in told.logprobs.content or [])
    assert shown == ANSWER


async def test_prompt_logprobs(http: httpx.AsyncClient, encode: Callable[[str], list[int]]) -> None:
    """Without it vLLM's users could not score a prompt."""
    ids = encode("One two three")
    body = {"model": MODEL, "prompt": "One two three", "prompt_logprobs": 1}
    (choice,) = (await http.post("/v1/completions", json=body)).json()["choices"]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1] == {str(ids[1]): {"logprob": -0.5, "rank": 1, "decoded_token": " two"}}
    chat = {"model": MODEL, "messages": QUESTION, "prompt_logprobs": 0}
    assert len((await http.post("/v1/chat/completions", json=chat)).json()["prompt_logprobs"]) > 10


@pytest.mark.parametrize("stream", [False, True])
async def test_several_choices(client: openai.AsyncOpenAI, router: FakeRouter, stream: bool) -> None:
    """Without it choices would be the same draw, be mixed up, or their prompt be counted for each."""
    if stream:
        texts = ["", "", ""]
        usage = None
        events = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, n=3, seed=7, stream=True, stream_options={"include_usage": True}
        )
        async for event in events:
            for choice in event.choices:
                texts[choice.index] += choice.delta.content or ""
            usage = event.usage or usage
    else:
        completion = await client.chat.completions.create(model=MODEL, messages=QUESTION, n=3, seed=7)
        assert [choice.index for choice in completion.choices] == [0, 1, 2]
        texts = [choice.message.content or "" for choice in completion.choices]
        usage = completion.usage
    assert texts == [ANSWER] * 3
    requests = [(await router.next()).request for _ in range(3)]
    assert [request.sampling.seed for request in requests] == [7, 8, 9]
    assert len({request.request_id for request in requests}) == 3
    assert len({request.prompt_token_ids for request in requests}) == 1
    assert usage is not None
    assert usage.prompt_tokens == len(requests[0].prompt_token_ids)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 16


async def test_choices_of_several_prompts(client: openai.AsyncOpenAI, router: FakeRouter) -> None:
    """Without it choices of different prompts could change places."""
    completion = await client.completions.create(model=MODEL, prompt=["a", "b c"], n=2, echo=True)
    assert [choice.text for choice in completion.choices] == [f"{p}{ANSWER}" for p in ("a", "a", "b c", "b c")]
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 3


class TestByHand:
    """The test plays the router."""

    @pytest.fixture
    def answer(self) -> Answer | None:
        return None

    async def test_cut_characters(
        self, client: openai.AsyncOpenAI, router: FakeRouter, encode: Callable[[str], list[int]], text_model: TextModel
    ) -> None:
        """Without it a token that is part of a character would have no bytes, or others than its own."""
        asking = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=QUESTION, logprobs=True))
        tokens = encode(EMOJI)
        (await router.next()).send([*tokens, *text_model.eos_token_ids[:1]], finish=FinishReason.STOP)
        (choice,) = (await asking).choices
        assert choice.message.content == EMOJI
        assert choice.logprobs is not None
        content = choice.logprobs.content or []
        assert len(content) == len(tokens)
        assert b"".join(bytes(entry.bytes or []) for entry in content).decode() == EMOJI
        cut = [entry for entry in content if entry.token.startswith("bytes:")]
        assert cut
        assert all(entry.token == "bytes:" + "".join(f"\\x{b:02x}" for b in entry.bytes or []) for entry in cut)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_stop_strings_take_tokens_back(
        self, client: openai.AsyncOpenAI, router: FakeRouter, encode: Callable[[str], list[int]], stream: bool
    ) -> None:
        """Without it tokens would be listed whose text is not part of the answer."""
        asking: Any = asyncio.create_task(
            client.completions.create(model=MODEL, prompt="x", logprobs=0, stop="is Paris", stream=stream)
        )
        submission = await router.next()
        for token in encode(ANSWER):
            submission.send([token])
        if stream:
            text, tokens = "", []
            async for chunk in await asking:
                text += chunk.choices[0].text
                tokens += chunk.choices[0].logprobs.tokens if chunk.choices[0].logprobs else []
        else:
            (choice,) = (await asking).choices
            text, tokens = choice.text, choice.logprobs.tokens
        assert text == "The capital of France "
        # The blank before the stop string belongs to a token that reaches into it.
        assert "".join(tokens) == "The capital of France is"

    async def test_stop_tokens_are_no_text(
        self, client: openai.AsyncOpenAI, router: FakeRouter, encode: Callable[[str], list[int]]
    ) -> None:
        """Without it a token that ends an output would be shown."""
        tokens = encode("One two")
        extra = {"stop_token_ids": tokens[-1:], "min_tokens": 1}
        asking = asyncio.create_task(client.completions.create(model=MODEL, prompt="x", logprobs=0, extra_body=extra))
        submission = await router.next()
        assert (submission.request.stop.stop_token_ids, submission.request.stop.min_tokens) == ((tokens[-1],), 1)
        submission.send(tokens, finish=FinishReason.STOP)
        completion = await asking
        assert completion.choices[0].text == "One"
        assert completion.choices[0].logprobs is not None
        assert completion.choices[0].logprobs.tokens == ["One"]
        assert completion.usage is not None
        assert completion.usage.completion_tokens == 2

    async def test_ignored_end_is_lost_nowhere(
        self, http: httpx.AsyncClient, router: FakeRouter, encode: Callable[[str], list[int]], text_model: TextModel
    ) -> None:
        """Without it an end token that ends nothing would end a request whose router was lost."""
        body = {"model": MODEL, "prompt": "x", "ignore_eos": True, "max_tokens": 9}
        asking = asyncio.create_task(http.post("/v1/completions", json=body))
        submission = await router.next()
        submission.send([*encode("One"), *text_model.eos_token_ids[:1]])
        await router.kill()
        await router.start()
        again = await router.next()
        again.send(encode(" two"), finish=FinishReason.LENGTH)
        assert (await asking).json()["choices"][0]["text"].endswith(" two")

    async def test_numbers_that_do_not_fit_are_an_error(
        self, http: httpx.AsyncClient, router: FakeRouter, encode: Callable[[str], list[int]]
    ) -> None:
        """Without it a peer's mistake would break the session of everybody, or pair tokens with others' numbers."""
        body = {"model": MODEL, "prompt": "One two", "logprobs": 1}
        tokens = encode("One two")
        asking = asyncio.create_task(http.post("/v1/completions", json=body))
        submission = await router.next()
        submission.send(tokens, logprobs=[made_up_logprobs(tokens[0], 1)])
        await asyncio.wait_for(submission.cancelled.wait(), 10)
        assert "log-probabilities" in (await asking).json()["error"]["message"]
        asking = asyncio.create_task(http.post("/v1/completions", json=body))
        update = session_pb2.RequestUpdate(key=(await router.next()).key, token_ids=tokens[:1])
        update.logprobs.add(logprob=-1, rank=1, top_token_ids=[1, 2], top_logprobs=[-1])
        router.send_raw(session_pb2.SessionResponse(step=session_pb2.StepFrame(updates=[update])))
        assert (await asking).status_code == 500
        asking = asyncio.create_task(http.post("/v1/completions", json=body | {"prompt_logprobs": 0}))
        submission = await router.next()
        submission.send(tokens, prompt_logprobs=PromptLogprobs(5, ()), finish=FinishReason.STOP)
        assert "prompt" in (await asking).json()["error"]["message"]
        assert (await http.get("/ready")).status_code == 200
