"""The public gRPC service, discovered by reflection and used, against real processes."""

from __future__ import annotations

import json

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from served import MODEL, Served

from quire.v1 import inference_pb2, inference_pb2_grpc, request_pb2

pytestmark = pytest.mark.e2e

FRANCE = inference_pb2.Prompt(
    chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="What is the capital of France?")])
)


@pytest.fixture
def stub(served: Served):
    with grpc.insecure_channel(served.grpc_address) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def test_generate_and_stream(stub) -> None:
    """The same core answers: unary and streaming must agree with each other and with the HTTP API's answer."""
    options = inference_pb2.GenerationOptions(temperature=0, max_tokens=30)
    whole = stub.Generate(inference_pb2.GenerateRequest(model=MODEL, prompt=FRANCE, options=options), timeout=60)
    (choice,) = whole.choices
    assert "Paris" in choice.text and choice.finish_reason == request_pb2.FINISH_REASON_STOP
    stream = stub.GenerateStream(inference_pb2.GenerateStreamRequest(prompt=FRANCE, options=options), timeout=60)
    messages = list(stream)
    assert "".join(message.text for message in messages) == choice.text
    assert [message.HasField("finish_reason") for message in messages] == [False] * (len(messages) - 1) + [True]
    assert messages[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_schema(stub) -> None:
    """Structured output is not an HTTP feature."""
    schema = {"type": "object", "properties": {"capital": {"type": "string", "maxLength": 20}}, "required": ["capital"]}
    options = inference_pb2.GenerationOptions(
        temperature=0, max_tokens=40, constraint=request_pb2.Constraint(json_schema=json.dumps(schema))
    )
    answer = stub.Generate(inference_pb2.GenerateRequest(prompt=FRANCE, options=options), timeout=60)
    assert set(json.loads(answer.choices[0].text)) >= {"capital"}


def test_models_and_a_bad_request(stub) -> None:
    """Errors carry gRPC's own status and name the field."""
    (model,) = stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10).models
    assert model.name == MODEL and model.max_model_len == 8192
    with pytest.raises(grpc.RpcError) as error:
        stub.Generate(
            inference_pb2.GenerateRequest(prompt=FRANCE, options=inference_pb2.GenerationOptions(top_p=7)), timeout=10
        )
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "top_p" in error.value.details()


def test_health_and_reflection(served: Served) -> None:
    """grpcurl, Kubernetes' probes and load balancers live on these two."""
    with grpc.insecure_channel(served.grpc_address) as channel:
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert status.status == health_pb2.HealthCheckResponse.SERVING
        assert "quire.v1.InferenceService" in ProtoReflectionDescriptorDatabase(channel).get_services()
