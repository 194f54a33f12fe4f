"""The public gRPC service, through a real channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import pytest
from fake_router import Answer, FakeRouter
from gateway_testing import ANSWER, MODEL
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from quire.gateway.server import Gateway
from quire.service.checkpoint import TextModel
from quire.service.errors import InvalidRequestError
from quire.service.grpc_server import channel
from quire.service.request import Constraint, ConstraintKind, FinishReason
from quire.v1 import inference_pb2, inference_pb2_grpc, request_pb2

CHAT = inference_pb2.Prompt(chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="Hi")]))


@pytest.fixture
async def dialed(gateway: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    async with channel(gateway.grpc_address) as dialed:
        yield dialed


@pytest.fixture
def stub(dialed: grpc.aio.Channel) -> inference_pb2_grpc.InferenceServiceAsyncStub:
    return inference_pb2_grpc.InferenceServiceStub(dialed)


async def test_generate(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, router: FakeRouter, text_model: TextModel
) -> None:
    """Without it the service could answer another text, reason or usage than the HTTP API does."""
    response = await stub.Generate(inference_pb2.GenerateRequest(prompt=CHAT))
    request = (await router.next()).request
    (choice,) = response.choices
    assert choice.text == ANSWER
    assert response.model == MODEL
    assert response.request_id == request.request_id
    assert choice.finish_reason == request_pb2.FINISH_REASON_STOP
    assert response.usage.prompt_tokens == len(request.prompt_token_ids)
    assert response.usage.cached_tokens == 16
    assert response.usage.completion_tokens == len(text_model.tokenizer.encode(ANSWER).ids) + 1
    assert "<|im_start|>user\nHi<|im_end|>" in text_model.tokenizer.decode(
        request.prompt_token_ids, skip_special_tokens=False
    )


async def test_generate_stream(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, router: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it options could be dropped on this path, or the last message lack its reason and usage."""
    options = inference_pb2.GenerationOptions(
        max_tokens=50,
        temperature=0.5,
        top_p=0.75,
        top_k=3,
        seed=2**64 - 1,
        stop=["Paris"],
        constraint=request_pb2.Constraint(regex=".*"),
        priority=4,
        min_tokens=2,
        stop_token_ids=[7],
        min_p=0.125,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias=[request_pb2.LogitBias(token_id=9, bias=-100)],
        bad_words=["word"],
        cache_salt="mine",
    )
    prompt = inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(token_ids=[5, 6]))
    call = stub.GenerateStream(inference_pb2.GenerateStreamRequest(model=MODEL, prompt=prompt, options=options))
    messages = [message async for message in call]
    assert "".join(message.text for message in messages) == ANSWER[: ANSWER.index("Paris")]
    assert [message.HasField("finish_reason") for message in messages] == [*[False] * (len(messages) - 1), True]
    assert messages[-1].usage.prompt_tokens == 2
    request = (await router.next()).request
    assert request.prompt_token_ids == (5, 6)
    assert request.stop.max_tokens == 50
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.5, 0.75, 3)
    assert request.sampling.seed == 2**64 - 1
    assert request.constraint == Constraint(ConstraintKind.REGEX, ".*")
    assert request.priority == 4
    assert request.deadline_unix_ms is None
    assert (request.stop.min_tokens, request.stop.stop_token_ids) == (2, (7,))
    sampling = request.sampling
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.125, 0.25, -0.5)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.5, ((9, -100.0),))
    assert sampling.bad_words == tuple(tuple(encode(form)) for form in ("word", " word"))
    assert request.cache_key.salt == "mine"


async def test_text_prompt_and_deadline(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, router: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it a client's deadline would not reach the engine, which would go on in vain."""
    prompt = inference_pb2.Prompt(text="Once")
    await stub.Generate(inference_pb2.GenerateRequest(prompt=prompt), timeout=30)
    request = (await router.next()).request
    assert list(request.prompt_token_ids) == encode("Once")
    assert request.stop.max_tokens == 16
    assert request.deadline_unix_ms is not None


async def test_list_models(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    """Without it a client could not find out what is served."""
    response = await stub.ListModels(inference_pb2.ListModelsRequest())
    assert [(model.name, model.max_model_len) for model in response.models] == [
        (MODEL, 8192),
        ("alias/with-slash", 8192),
    ]


async def test_choices_and_logprobs(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, router: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it choices could be mixed up, their prompt be counted twice, or tokens lack their bytes."""
    options = inference_pb2.GenerationOptions(n=2, seed=5, logprobs=2, prompt_logprobs=0)
    prompt = inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(token_ids=[5, 6, 7]))
    response = await stub.Generate(inference_pb2.GenerateRequest(prompt=prompt, options=options))
    tokens = encode(ANSWER)
    for choice in response.choices:
        assert [entry.token_id for entry in choice.logprobs] == tokens
        assert b"".join(entry.token for entry in choice.logprobs).decode() == choice.text == ANSWER
        assert [top.token_id for top in choice.logprobs[0].top] == [tokens[0], tokens[0] + 1]
        assert (choice.logprobs[0].logprob, choice.logprobs[0].rank) == (-0.5, 1)
    assert [entry.token_id for entry in response.prompt_logprobs] == [6, 7]
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (3, 2 * (len(tokens) + 1))
    requests = [(await router.next()).request for _ in range(2)]
    assert [request.sampling.seed for request in requests] == [5, 6]
    options.ClearField("prompt_logprobs")
    texts, logprobs = ["", ""], [b"", b""]
    stream = stub.GenerateStream(inference_pb2.GenerateStreamRequest(prompt=prompt, options=options))
    messages = [message async for message in stream]
    for message in messages:
        texts[message.choice] += message.text
        logprobs[message.choice] += b"".join(entry.token for entry in message.logprobs)
    assert texts == [ANSWER, ANSWER] == [raw.decode() for raw in logprobs]
    assert sum(message.HasField("finish_reason") for message in messages) == 2
    assert [message.HasField("usage") for message in messages] == [*[False] * (len(messages) - 1), True]
    assert messages[-1].usage == response.usage


async def test_tokenize(stub: inference_pb2_grpc.InferenceServiceAsyncStub, router: FakeRouter) -> None:
    """Without it a client would count tokens otherwise than a generation does."""
    response = await stub.Tokenize(inference_pb2.TokenizeRequest(prompt=CHAT))
    await stub.Generate(inference_pb2.GenerateRequest(prompt=CHAT))
    assert tuple(response.token_ids) == (await router.next()).request.prompt_token_ids
    assert response.max_model_len == 8192
    back = await stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=response.token_ids))
    assert back.text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def request_of(
    chat: inference_pb2.Chat | None = None, token_ids: Sequence[int] = (), **options: Any
) -> inference_pb2.GenerateRequest:
    prompt = CHAT if chat is None else inference_pb2.Prompt(chat=chat)
    if token_ids:
        prompt = inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(token_ids=token_ids))
    return inference_pb2.GenerateRequest(prompt=prompt, options=inference_pb2.GenerationOptions(**options))


def said(**fields: Any) -> inference_pb2.GenerateRequest:
    message = inference_pb2.ChatMessage(**{"role": "user", "content": "Hi", **fields})
    return request_of(inference_pb2.Chat(messages=[HI, message]))


def offered(choice: inference_pb2.ToolChoice | None = None, **fields: Any) -> inference_pb2.GenerateRequest:
    tool = inference_pb2.Tool(**{"name": "now", **fields})
    return request_of(inference_pb2.Chat(messages=[HI], tools=[tool], tool_choice=choice))


def must(**fields: Any) -> inference_pb2.ToolChoice:
    return inference_pb2.ToolChoice(mode=inference_pb2.TOOL_CHOICE_MODE_REQUIRED, **fields)


HI = inference_pb2.ChatMessage(role="user", content="Hi")
CALL = inference_pb2.ToolCall(id="c", name="now", arguments="{}")
NAN, INFINITY = float("nan"), float("inf")

BAD_REQUESTS: list[tuple[inference_pb2.GenerateRequest, str, str]] = [
    (request, "INVALID_ARGUMENT", field)
    for request, field in (
        (inference_pb2.GenerateRequest(), "prompt"),
        (inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt()), "prompt"),
        (inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text="")), "prompt"),
        (inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(token_ids=inference_pb2.TokenIds())), "prompt"),
        (request_of(token_ids=[1, 60000]), "prompt.token_ids.token_ids[1]"),
        (request_of(token_ids=[2**32 - 1]), "prompt.token_ids.token_ids[0]"),
        (request_of(token_ids=[5] * 8192), "prompt"),
        (request_of(inference_pb2.Chat()), "prompt.chat.messages"),
        (said(role="x"), "prompt.chat.messages[1].role"),
        (said(role=""), "prompt.chat.messages[1].role"),
        (said(role="function"), "prompt.chat.messages[1].role"),
        (said(role="tool"), "prompt.chat.messages[1].tool_call_id"),
        (said(tool_call_id="c"), "prompt.chat.messages[1].tool_call_id"),
        (said(tool_calls=[CALL]), "prompt.chat.messages[1].tool_calls"),
        (said(reasoning="hm"), "prompt.chat.messages[1].reasoning"),
        (
            said(role="assistant", tool_calls=[inference_pb2.ToolCall(id="c", name="now", arguments="{")]),
            "prompt.chat.messages[1].tool_calls[0].arguments",
        ),
        (
            said(role="assistant", tool_calls=[CALL, inference_pb2.ToolCall(id="d", name="now", arguments="[]")]),
            "prompt.chat.messages[1].tool_calls[1].arguments",
        ),
        (offered(name=""), "prompt.chat.tools[0].name"),
        (offered(name="a b"), "prompt.chat.tools[0].name"),
        (offered(parameters="{"), "prompt.chat.tools[0].parameters"),
        (offered(parameters="5"), "prompt.chat.tools[0].parameters"),
        (offered(parameters='{"type": "string"}'), "prompt.chat.tools[0].parameters.type"),
        (offered(inference_pb2.ToolChoice()), "prompt.chat.tool_choice.mode"),
        (offered(inference_pb2.ToolChoice(mode=9)), "prompt.chat.tool_choice.mode"),  # type: ignore[arg-type]
        (offered(must(names=["then"])), "prompt.chat.tool_choice.names"),
        (request_of(inference_pb2.Chat(messages=[HI], tool_choice=must())), "prompt.chat.tool_choice"),
        (
            request_of(inference_pb2.Chat(messages=[HI], tools=[inference_pb2.Tool(name="now")] * 2)),
            "prompt.chat.tools[1].name",
        ),
        (request_of(inference_pb2.Chat(messages=[HI], template_settings="[")), "prompt.chat.template_settings"),
        (
            request_of(inference_pb2.Chat(messages=[HI], template_settings='{"messages": 1}')),
            "prompt.chat.template_settings",
        ),
        (request_of(n=0), "options.n"),
        (request_of(n=129), "options.n"),
        (request_of(max_tokens=0), "options.max_tokens"),
        (request_of(max_tokens=9000), "options.max_tokens"),
        (request_of(max_tokens=2**32 - 1), "options.max_tokens"),
        (request_of(min_tokens=3, max_tokens=2), "options.min_tokens"),
        (request_of(min_tokens=9000), "options.min_tokens"),
        (request_of(temperature=NAN), "options.temperature"),
        (request_of(temperature=INFINITY), "options.temperature"),
        (request_of(temperature=-1), "options.temperature"),
        (request_of(top_p=2), "options.top_p"),
        (request_of(top_p=0), "options.top_p"),
        (request_of(top_p=NAN), "options.top_p"),
        (request_of(top_k=2**32 - 1), "options.top_k"),
        (request_of(min_p=1.5), "options.min_p"),
        (request_of(presence_penalty=NAN), "options.presence_penalty"),
        (request_of(frequency_penalty=3), "options.frequency_penalty"),
        (request_of(repetition_penalty=0), "options.repetition_penalty"),
        (request_of(logit_bias=[request_pb2.LogitBias(token_id=1, bias=101)]), "options.logit_bias"),
        (request_of(logit_bias=[request_pb2.LogitBias(token_id=1, bias=NAN)]), "options.logit_bias"),
        (request_of(logit_bias=[request_pb2.LogitBias(token_id=60000)]), "options.logit_bias"),
        (request_of(logit_bias=[request_pb2.LogitBias(token_id=1)] * 1025), "options.logit_bias"),
        (request_of(bad_words=[""]), "options.bad_words"),
        (request_of(bad_words=["a"] * 257), "options.bad_words"),
        (request_of(bad_words=["a b c d " * 20]), "options.bad_words"),
        (request_of(stop=[""]), "options.stop"),
        (request_of(stop=["a"] * 17), "options.stop"),
        (request_of(stop_token_ids=[60000]), "options.stop_token_ids"),
        (request_of(stop_token_ids=[1] * 129), "options.stop_token_ids"),
        (request_of(logprobs=21), "options.logprobs"),
        (request_of(prompt_logprobs=21), "options.prompt_logprobs"),
        (request_of(priority=1, ignore_eos=True, constraint=request_pb2.Constraint(regex="a")), "options.ignore_eos"),
        (request_of(constraint=request_pb2.Constraint()), "options.constraint"),
        (request_of(constraint=request_pb2.Constraint(json_object=False)), "options.constraint.json_object"),
    )
] + [(inference_pb2.GenerateRequest(model="other", prompt=CHAT), "NOT_FOUND", "model")]


async def test_bad_requests(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub,
    gateway: Gateway,
    router: FakeRouter,
    subtests: pytest.Subtests,
) -> None:
    """Without it a wrong field could be accepted, be named as the HTTP API calls it, or leave something behind."""
    for request, code, field in BAD_REQUESTS:
        for stream in (False, True):
            with subtests.test(f"{field} {'streaming' if stream else ''}"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    if stream:
                        streaming = inference_pb2.GenerateStreamRequest.FromString(request.SerializeToString())
                        await stub.GenerateStream(streaming).read()
                    else:
                        await stub.Generate(request)
                assert (caught.value.code().name, field_of(caught.value)) == (code, field)
                assert router.submitted.empty()
    assert gateway._sessions.in_flight == 0


def field_of(error: grpc.aio.AioRpcError) -> object:
    return dict(error.trailing_metadata() or ()).get("quire-field")


async def test_bad_bytes(dialed: grpc.aio.Channel, router: FakeRouter) -> None:
    """Without it a message that is none could fail the server instead of the call."""
    generate = dialed.unary_unary("/quire.v1.InferenceService/Generate")
    for raw in (b"\xff", b"\x0a\x02\xff\xfe", b"\x12\xff\xff\xff\xff\x0f", b"\x12\x03\x0a\x01\xff"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(raw)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, raw
    assert router.submitted.empty()


async def test_bad_tokenize(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    """Without it token ids beyond the vocabulary would be a failure of ours."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[1, 60000]))
    assert field_of(caught.value) == "token_ids[1]"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Tokenize(inference_pb2.TokenizeRequest(model="other", prompt=CHAT))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_message_limit(stub: inference_pb2_grpc.InferenceServiceAsyncStub, router: FakeRouter) -> None:
    """Without it one call could fill the memory, though HTTP's bodies are limited."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text="x " * (3 << 20))))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert router.submitted.empty()


async def test_health_and_reflection(dialed: grpc.aio.Channel, gateway: Gateway, router: FakeRouter) -> None:
    """Without it Kubernetes and grpcurl would not know what to make of the port."""
    health = health_pb2_grpc.HealthStub(dialed)
    watch = health.Watch(health_pb2.HealthCheckRequest(service="quire.v1.InferenceService"))
    async with asyncio.timeout(10):
        while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
            pass
        await router.kill()
        while (await watch.read()).status != health_pb2.HealthCheckResponse.NOT_SERVING:
            pass
    listing = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in reflection_pb2_grpc.ServerReflectionStub(dialed).ServerReflectionInfo(iter([listing])):
        names = {service.name for service in answer.list_services_response.service}
        assert "quire.v1.InferenceService" in names
        break


class TestByHand:
    """The test plays the router."""

    @pytest.fixture
    def answer(self) -> Answer | None:
        return None

    @pytest.mark.parametrize("stream", [True, False])
    async def test_cancel(
        self,
        stub: inference_pb2_grpc.InferenceServiceAsyncStub,
        router: FakeRouter,
        encode: Callable[[str], list[int]],
        stream: bool,
    ) -> None:
        """Without it an engine would go on generating for a client that cancelled."""
        call = (
            stub.GenerateStream(inference_pb2.GenerateStreamRequest(prompt=CHAT))
            if stream
            else stub.Generate(inference_pb2.GenerateRequest(prompt=CHAT))
        )
        reading: Awaitable[Any] = call.read() if stream else call  # type: ignore[union-attr]
        task = asyncio.ensure_future(reading)
        submission = await router.next()
        submission.send(encode("Hi"), cached=0)
        if stream:
            await task
        call.cancel()
        await asyncio.wait_for(submission.cancelled.wait(), 10)
        await asyncio.wait([task])

    async def test_error_in_the_middle(
        self, stub: inference_pb2_grpc.InferenceServiceAsyncStub, router: FakeRouter, encode: Callable[[str], list[int]]
    ) -> None:
        """Without it a stream that failed would look like one that ended."""
        request = inference_pb2.GenerateStreamRequest(
            prompt=CHAT, options=inference_pb2.GenerationOptions(constraint=request_pb2.Constraint(lark="?"))
        )
        call = stub.GenerateStream(request)
        task = asyncio.ensure_future(call.read())
        submission = await router.next()
        submission.send(encode("Part"))
        assert (await task).text == "Part"
        submission.send(error=InvalidRequestError("the grammar has no start", field="constraint"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert dict(caught.value.trailing_metadata() or ())["quire-field"] == "options.constraint.lark"

    async def test_length(
        self, stub: inference_pb2_grpc.InferenceServiceAsyncStub, router: FakeRouter, encode: Callable[[str], list[int]]
    ) -> None:
        """Without it an output cut by max_tokens could look complete."""
        task = asyncio.ensure_future(stub.Generate(request_of(max_tokens=2)))
        (await router.next()).send(encode("One two"), finish=FinishReason.LENGTH)
        response = await task
        assert response.choices[0].finish_reason == request_pb2.FINISH_REASON_LENGTH
        assert response.choices[0].text == "One two"
