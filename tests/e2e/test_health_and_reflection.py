"""Every server behind `quire serve`, asked as probes and grpcurl ask."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from served import Served, descendants

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    ("module", "services"),
    [
        ("quire.router", {"quire.v1.SessionService"}),
        ("quire.engine", {"quire.v1.SessionService", "quire.v1.EngineService"}),
        ("quire.sidecar", {"quire.v1.GrammarService"}),
    ],
)
def test_each_server_tells_how_it_is_and_what_it_offers(served: Served, module: str, services: set[str]) -> None:
    """Kubernetes restarts what has no health, and nobody can look into what has no reflection. The gateway's public
    service is asked in test_grpc_client."""
    commands = [command for command in descendants(served.process.pid).values() if module in command]
    assert commands
    for command in commands:
        (address,) = (word.removeprefix("--listen=") for word in command if word.startswith("--listen="))
        with grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for name in ("", *services):
                # The second engine may still load when the first one makes the whole ready.
                watch = stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=60)
                assert any(answer.status == health_pb2.HealthCheckResponse.SERVING for answer in watch)
                watch.cancel()
            assert services <= set(ProtoReflectionDescriptorDatabase(channel).get_services())
