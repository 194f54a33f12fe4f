"""The command that probes run in pods whose servers speak TLS: its exit status is all that a kubelet sees."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from certificate_files import CertificateFiles, new_ca
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from quire.service.health import main

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@contextmanager
def serving(status: int, files: CertificateFiles | None = None) -> Iterator[str]:
    """A server with `status`, over TLS for those with a certificate if there are `files`; its address."""
    servicer = health.HealthServicer()
    servicer.set("", status)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    if files is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = (files.key.read_bytes(), files.certificate.read_bytes())
        credentials = grpc.ssl_server_credentials([pair], files.ca.read_bytes(), require_client_auth=True)
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_it_tells_who_serves(capsys: pytest.CaptureFixture[str]) -> None:
    """A pod that only loads must get no requests, and one that is gone must be started again."""
    with serving(SERVING) as address:
        assert main([address]) == 0
    assert main([address, "--timeout=2"]) == 1
    assert f"{address}: UNAVAILABLE" in capsys.readouterr().err
    with serving(NOT_SERVING) as address:
        assert main([address]) == 1
    assert f"{address}: NOT_SERVING" in capsys.readouterr().err


def test_over_tls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a name that is not its address; a server of another CA is none of ours."""
    files = CertificateFiles(tmp_path / "ours").write(new_ca(), "demo.models.svc")
    others = CertificateFiles(tmp_path / "others").write(new_ca(), "demo.models.svc")
    flags = [f"--tls-cert={files.certificate}", f"--tls-key={files.key}", "--tls-name=demo.models.svc"]
    with serving(SERVING, files) as address:
        assert main([address, f"--tls-ca={files.ca}", *flags]) == 0
        assert main([address, f"--tls-ca={others.ca}", *flags, "--timeout=2"]) == 1
        assert main([address, "--timeout=2"]) == 1
        assert main([address, *flags]) == 2
    assert "--tls-ca" in capsys.readouterr().err
