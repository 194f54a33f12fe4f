"""The official client against a real gateway on loopback."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import httpx
import openai
import pytest
from fake_router import FakeRouter
from gateway_testing import ANSWER, MODEL

from quire.gateway.server import Gateway
from quire.service.checkpoint import TextModel
from quire.service.request import Constraint, ConstraintKind

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


async def test_chat(client: openai.AsyncOpenAI, router: FakeRouter, text_model: TextModel) -> None:
    """Without it the plainest chat could come back wrong: text, finish reason, usage, or the prompt's template."""
    completion = await client.chat.completions.create(model=MODEL, messages=QUESTION)
    choice = completion.choices[0]
    assert choice.message.content == ANSWER
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    request = (await router.next()).request
    prompt = text_model.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(request.prompt_token_ids)
    assert completion.usage.completion_tokens == len(text_model.tokenizer.encode(ANSWER).ids) + 1
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 16
    assert completion.id.startswith("chatcmpl-")
    assert completion.model == MODEL


async def test_streaming_chat(client: openai.AsyncOpenAI) -> None:
    """Without it a stream could lack its role, its end or its usage, or deliver the text in one piece."""
    stream = await client.chat.completions.create(
        model=MODEL, messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content for chunk in chunks[1:-2]]
    assert "".join(text or "" for text in texts) == ANSWER
    assert len(texts) > 1
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_stream_helper_and_sync_client(gateway: Gateway) -> None:
    """Without it the client's blocking half and its `stream` helper, which checks the order of events, could fail."""

    def talk() -> tuple[str | None, str | None]:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as sync:
            whole = sync.chat.completions.create(model=MODEL, messages=QUESTION).choices[0].message.content
            with sync.chat.completions.stream(model=MODEL, messages=QUESTION) as stream:
                final = stream.get_final_completion()
            return whole, final.choices[0].message.content

    assert await asyncio.to_thread(talk) == (ANSWER, ANSWER)


async def test_completion_defaults(
    client: openai.AsyncOpenAI, router: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it completions could go through the chat template or ignore OpenAI's default of 16 tokens."""
    completion = await client.completions.create(model=MODEL, prompt="The capital of France is")
    request = (await router.next()).request
    assert list(request.prompt_token_ids) == encode("The capital of France is")
    assert request.stop.max_tokens == 16
    assert request.sampling.temperature == 1.0
    assert request.sampling.top_p == 1.0
    assert completion.choices[0].text == ANSWER
    assert completion.object == "text_completion"


async def test_length(client: openai.AsyncOpenAI, encode: Callable[[str], list[int]]) -> None:
    """Without it an output cut by max_tokens could look complete."""
    completion = await client.chat.completions.create(model=MODEL, messages=QUESTION, max_completion_tokens=3)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 3
    assert ANSWER.startswith(completion.choices[0].message.content or "?")


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts(client: openai.AsyncOpenAI, router: FakeRouter, stream: bool) -> None:
    """Without it the choices of a list of prompts could be mixed up or miss each other's usage."""
    if stream:
        texts = {0: "", 1: "", 2: ""}
        chunks = await client.completions.create(model=MODEL, prompt=["a", "b", "c"], stream=True)
        async for chunk in chunks:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == dict.fromkeys(range(3), ANSWER)
    else:
        completion = await client.completions.create(model=MODEL, prompt=["a", "b", "c"])
        assert [(choice.index, choice.text) for choice in completion.choices] == [(i, ANSWER) for i in range(3)]
        assert completion.usage is not None
        assert completion.usage.prompt_tokens == 3
    requests = [(await router.next()).request for _ in range(3)]
    assert len({request.request_id for request in requests}) == 3
    assert len({request.prompt_token_ids for request in requests}) == 3


async def test_token_prompts(client: openai.AsyncOpenAI, router: FakeRouter) -> None:
    """Without it token ids could be taken for several prompts, or tokenized again."""
    await client.completions.create(model=MODEL, prompt=[5, 6, 7])
    assert (await router.next()).request.prompt_token_ids == (5, 6, 7)
    completion = await client.completions.create(model=MODEL, prompt=[[5, 6], [7]])
    assert len(completion.choices) == 2
    assert [(await router.next()).request.prompt_token_ids for _ in range(2)] == [(5, 6), (7,)]


async def test_all_options_reach_the_wire(
    client: openai.AsyncOpenAI, router: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it an option could be validated and then forgotten."""
    await client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        max_tokens=40,
        temperature=0.25,
        top_p=0.5,
        seed=-3,
        user="somebody",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        n=1,
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=True,
        logprobs=False,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"7": -100, "9": 2},
        prompt_cache_key="x",
        safety_identifier="y",
        extra_body={
            "top_k": 7,
            "priority": -2,
            "cache_salt": "tenant",
            "regex": "[a-z]+",
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "min_tokens": 3,
            "stop_token_ids": [5, 6],
            "bad_words": ["word"],
            "skip_special_tokens": True,
            "include_stop_str_in_output": False,
        },
    )
    request = (await router.next()).request
    assert request.model == MODEL
    assert request.stop.max_tokens == 40
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.25, 0.5, 7)
    assert request.sampling.seed == 2**64 - 3
    assert request.priority == -2
    assert request.cache_key.salt == "tenant"
    assert request.constraint == Constraint(ConstraintKind.REGEX, "[a-z]+")
    sampling = request.sampling
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.125, 0.25, -0.5)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.5, ((7, -100.0), (9, 2.0)))
    assert sampling.bad_words == (tuple(encode("word")), tuple(encode(" word")))
    assert (request.stop.min_tokens, request.stop.stop_token_ids, request.stop.ignore_eos) == (3, (5, 6), False)
    await client.completions.create(model=MODEL, prompt="x", extra_body={"ignore_eos": True, "top_k": -1})
    request = (await router.next()).request
    assert (request.stop.ignore_eos, request.sampling.top_k) == (True, 0)


async def test_seeds_are_drawn(client: openai.AsyncOpenAI, router: FakeRouter) -> None:
    """Without it two requests without a seed could give the same answer at every temperature."""
    for _ in range(2):
        await client.chat.completions.create(model=MODEL, messages=QUESTION)
    assert (await router.next()).request.sampling.seed != (await router.next()).request.sampling.seed


SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint(ConstraintKind.JSON_OBJECT)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA, separators=(",", ":"))),
        ),
        ({"regex": "a|b"}, Constraint(ConstraintKind.REGEX, "a|b")),
        ({"grammar": 'start: "a"'}, Constraint(ConstraintKind.LARK, 'start: "a"')),
    ],
)
async def test_constraints(
    client: openai.AsyncOpenAI, router: FakeRouter, fields: dict[str, object], expected: Constraint | None
) -> None:
    """Without it a constraint could be lost on the way and the output be free."""
    await client.chat.completions.create(model=MODEL, messages=QUESTION, extra_body=fields)
    assert (await router.next()).request.constraint == expected


async def test_message_forms(client: openai.AsyncOpenAI, router: FakeRouter, text_model: TextModel) -> None:
    """Without it text parts, developer messages or an assistant message sent back as it came could be refused."""
    first = await client.chat.completions.create(model=MODEL, messages=QUESTION)
    await router.next()
    await client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]},
            first.choices[0].message.model_dump(),
            {"role": "user", "content": "Go on."},
        ],
    )
    prompt = text_model.tokenizer.decode((await router.next()).request.prompt_token_ids, skip_special_tokens=False)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne.\nTwo.<|im_end|>\n"
        f"<|im_start|>assistant\n{ANSWER}<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_tokenize_agrees_with_a_chat(
    http: httpx.AsyncClient, router: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it a client that counts tokens beforehand would be told other numbers than it is charged for."""
    await http.post("/v1/chat/completions", json={"model": MODEL, "messages": QUESTION})
    request = (await router.next()).request
    told = (await http.post("/tokenize", json={"model": MODEL, "messages": QUESTION})).json()
    assert told["tokens"] == list(request.prompt_token_ids)
    assert (told["count"], told["max_model_len"], told["token_strs"]) == (len(told["tokens"]), 8192, None)
    text = (await http.post("/detokenize", json={"tokens": told["tokens"]})).json()["prompt"]
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    bare = {"messages": QUESTION, "add_generation_prompt": False}
    opening = encode("<|im_start|>assistant\n")
    assert (await http.post("/tokenize", json=bare)).json()["tokens"] + opening == told["tokens"]
    for add in (None, True, False):
        body = {"prompt": "Hello you", "add_special_tokens": add, "return_token_strs": True}
        told = (await http.post("/tokenize", json=body)).json()
        assert (told["tokens"], told["token_strs"]) == (encode("Hello you"), ["Hello", "Ġyou"])
    missing = await http.post("/tokenize", json={"model": "x", "prompt": "x"})
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_models(client: openai.AsyncOpenAI) -> None:
    """Without it clients that ask for the models first would find none, or not the aliases."""
    models = await client.models.list()
    assert [model.id for model in models.data] == [MODEL, "alias/with-slash"]
    assert (await client.models.retrieve("alias/with-slash")).id == "alias/with-slash"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("nothing")
    assert caught.value.code == "model_not_found"


async def test_alias_is_answered_and_own_name_sent(client: openai.AsyncOpenAI, router: FakeRouter) -> None:
    """Without it an alias would reach engines that know only the model's own name."""
    completion = await client.completions.create(model="alias/with-slash", prompt="x")
    assert completion.model == "alias/with-slash"
    assert (await router.next()).request.model == MODEL


async def test_request_id_goes_back(client: openai.AsyncOpenAI, http: httpx.AsyncClient) -> None:
    """Without it nobody could find a client's request in the log."""
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL, messages=QUESTION, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert (await http.get("/nowhere")).headers["x-request-id"].startswith("req-")
    refused = await http.get("/health", headers={"X-Request-Id": "x" * 300})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "X-Request-Id"
