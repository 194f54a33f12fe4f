"""Gateway, router and engine over TCP with mutual TLS, and new certificates while they run."""

from __future__ import annotations

from pathlib import Path

import grpc
import httpx
import pytest
from certificate_files import CertificateFiles, new_ca
from cluster import Cluster
from tiny_checkpoint import tiny_checkpoint

from quire.service.grpc_server import channel
from quire.v1 import engine_pb2, engine_pb2_grpc

pytestmark = pytest.mark.e2e


async def test_services_trust_each_other_and_nobody_else(tmp_path: Path) -> None:
    """Without it whoever reaches a pod's port could have its tokens, or a renewed CA would part the services."""
    files = CertificateFiles(tmp_path / "certificates").write(new_ca())
    model = tiny_checkpoint(tmp_path / "tiny")
    cluster = Cluster(tmp_path, model, num_routers=1, num_engines=1, certificates=files)
    async with cluster.running(), httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:

        async def ask() -> str:
            body = {"model": "tiny", "prompt": "Once", "max_tokens": 8, "temperature": 0}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["text"])

        first = await ask()
        for name in (*cluster.routers, *cluster.engines):
            async with channel(cluster.dialled(name)) as stranger:
                with pytest.raises(grpc.aio.AioRpcError):
                    stub = engine_pb2_grpc.EngineServiceStub(stranger)
                    await stub.GetStatus(engine_pb2.GetStatusRequest(), timeout=5)

        # Nothing that was signed before is trusted by a process that starts now: the others must have the new files.
        files.write(new_ca())
        for name in (*cluster.engines, *cluster.routers):
            await cluster.kill(name)
            assert await ask() == first
        for name in (*cluster.routers, *cluster.engines, "gateway"):
            assert "Traceback" not in cluster.log(name), cluster.log(name)
