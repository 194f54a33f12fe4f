"""The public gRPC service, through a real channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
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
    assert response.text == ANSWER
    assert response.model == MODEL
    assert response.request_id == request.request_id
    assert response.finish_reason == request_pb2.FINISH_REASON_STOP
    assert response.usage.prompt_tokens == len(request.prompt_token_ids)
    assert response.usage.cached_tokens == 16
    assert response.usage.completion_tokens == len(text_model.tokenizer.encode(ANSWER).ids) + 1
    assert "<|im_start|>user\nHi<|im_end|>" in text_model.tokenizer.decode(
        request.prompt_token_ids, skip_special_tokens=False
    )


async def test_generate_stream(stub: inference_pb2_grpc.InferenceServiceAsyncStub, router: FakeRouter) -> None:
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


def with_options(**fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(prompt=CHAT, options=inference_pb2.GenerationOptions(**fields))


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (inference_pb2.GenerateRequest(), "INVALID_ARGUMENT", "prompt"),
        (inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text="")), "INVALID_ARGUMENT", "prompt"),
        (
            inference_pb2.GenerateRequest(
                prompt=inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(token_ids=[1, 60000]))
            ),
            "INVALID_ARGUMENT",
            "prompt.token_ids.token_ids[1]",
        ),
        (
            inference_pb2.GenerateRequest(
                prompt=inference_pb2.Prompt(
                    chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="x", content="y")])
                )
            ),
            "INVALID_ARGUMENT",
            "prompt.chat.messages[0].role",
        ),
        (inference_pb2.GenerateRequest(model="other", prompt=CHAT), "NOT_FOUND", "model"),
        (with_options(max_tokens=0), "INVALID_ARGUMENT", "options.max_tokens"),
        (with_options(max_tokens=9000), "INVALID_ARGUMENT", "options.max_tokens"),
        (with_options(temperature=float("nan")), "INVALID_ARGUMENT", "options.temperature"),
        (with_options(top_p=2), "INVALID_ARGUMENT", "options.top_p"),
        (with_options(stop=[""]), "INVALID_ARGUMENT", "options.stop"),
        (with_options(constraint=request_pb2.Constraint()), "INVALID_ARGUMENT", "options.constraint"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_bad_requests(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub,
    request_: inference_pb2.GenerateRequest,
    code: str,
    field: str,
) -> None:
    """Without it a wrong field could be accepted, or named as the HTTP API calls it."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(request_)
    assert caught.value.code().name == code
    assert dict(caught.value.trailing_metadata() or ())["quire-field"] == field


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
        task = asyncio.ensure_future(stub.Generate(with_options(max_tokens=2)))
        (await router.next()).send(encode("One two"), finish=FinishReason.LENGTH)
        response = await task
        assert response.finish_reason == request_pb2.FINISH_REASON_LENGTH
        assert response.text == "One two"
