"""TLS as clients meet it: certificates from files, new ones while the gateway runs, and client certificates."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme
from certificate_files import CertificateFiles, leaf, new_ca
from cryptography import x509
from fake_router import Answer, FakeRouter
from gateway_testing import ANSWER, MODEL, StartGateway, eventually, until_ready
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire.gateway.server import Gateway
from quire.service.errors import ConfigError
from quire.service.tls import Tls
from quire.service.tls_files import TlsFiles
from quire.v1 import inference_pb2, inference_pb2_grpc


class Files:
    """Certificate, key and the CA of the clients, as an operator would put them into files."""

    def __init__(self, folder: Path) -> None:
        self.certificate, self.key, self.client_ca = folder / "tls.crt", folder / "tls.key", folder / "ca.crt"

    def write(self, leaf: trustme.LeafCert) -> None:
        """One after the other, as a careless operator does: between the two they don't fit."""
        self.certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        self.key.write_bytes(leaf.private_key_pem.bytes())

    @property
    def flags(self) -> dict[str, str]:
        return {"tls_cert": str(self.certificate), "tls_key": str(self.key)}


@pytest.fixture
def ca() -> trustme.CA:
    return new_ca()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def start(start_gateway: StartGateway, router: FakeRouter) -> Callable[..., Any]:
    async def start(**config: Any) -> Gateway:
        fields = {"grpc_listen": "127.0.0.1:0", "reload_interval": 0.02}
        return await start_gateway(router.address, **fields | config)

    return start


def trusting(ca: trustme.CA, client: trustme.LeafCert | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    if client is not None:
        client.configure_cert(context)
    return context


async def served_serial(url: str, context: ssl.SSLContext) -> int:
    """The serial number of the certificate that a new connection is shown."""
    _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]), ssl=context)
    certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(certificate).serial_number


def serial(leaf: trustme.LeafCert) -> int:
    return x509.load_pem_x509_certificate(leaf.cert_chain_pems[0].bytes()).serial_number


async def generate(address: str, ca: trustme.CA, client: trustme.LeafCert | None = None) -> str:
    """Over a new gRPC channel."""
    pair = (client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes()) if client else (None, None)
    credentials = grpc.ssl_channel_credentials(ca.cert_pem.bytes(), *pair)
    # A channel of its own, not one that was used before.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(address.replace("127.0.0.1", "localhost"), credentials, options) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text="Hi"))
        return (await stub.Generate(request, timeout=10)).choices[0].text


async def test_both_apis(start: Callable[..., Any], files: Files, ca: trustme.CA) -> None:
    """Without it one of the two doors could stay plain, or streams break under TLS."""
    files.write(leaf(ca))
    gateway = await start(**files.flags)
    assert gateway.url.startswith("https://")
    async with httpx.AsyncClient(base_url=gateway.url, verify=trusting(ca), timeout=20) as http:
        await until_ready(http)
        body = {"model": MODEL, "prompt": "Hi", "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]"
    assert await generate(gateway.grpc_address, ca) == ANSWER
    with pytest.raises(httpx.ConnectError):
        async with httpx.AsyncClient() as stranger:
            await stranger.get(f"{gateway.url}/health")
    with pytest.raises(httpx.HTTPError):
        async with httpx.AsyncClient() as plain:
            await plain.get(f"{gateway.url.replace('https', 'http')}/health")


async def test_new_certificate(
    start: Callable[..., Any], files: Files, ca: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    """Without it a gateway would have to be restarted each time that a certificate is renewed."""
    first, second = leaf(ca), leaf(ca)
    files.write(first)
    gateway = await start(**files.flags)
    context = trusting(ca)
    async with httpx.AsyncClient(base_url=gateway.url, verify=context, timeout=20) as http:
        await until_ready(http)
        assert await served_serial(gateway.url, context) == serial(first)
        files.certificate.write_text("rubbish")
        await eventually(
            lambda: http.get("/metrics"), lambda answer: 'quire_gateway_file_stale{file="tls"} 1.0' in answer.text
        )
        assert "the old one stays" in caplog.text
        assert await served_serial(gateway.url, context) == serial(first)
        files.write(second)
        await eventually(lambda: served_serial(gateway.url, context), lambda shown: shown == serial(second))
        # Open connections go on.
        assert (await http.get("/health")).status_code == 200

    # A CA that the new channel alone trusts: gRPC shows the new certificate too.
    other = new_ca()
    third = leaf(other)
    files.write(third)
    await eventually(lambda: served_serial(gateway.url, _unchecked()), lambda shown: shown == serial(third))
    assert await generate(gateway.grpc_address, other) == ANSWER
    with pytest.raises(grpc.aio.AioRpcError):
        await generate(gateway.grpc_address, ca)


def _unchecked() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def test_client_certificates(start: Callable[..., Any], files: Files, ca: trustme.CA) -> None:
    """Without it mutual TLS would let strangers in, or go on trusting a CA that was taken out."""
    old, new = new_ca(), new_ca()
    files.write(leaf(ca))
    files.client_ca.write_bytes(old.cert_pem.bytes())
    gateway = await start(**files.flags, tls_client_ca=str(files.client_ca))

    async def status(client: trustme.LeafCert | None) -> int:
        try:
            async with httpx.AsyncClient(verify=trusting(ca, client), timeout=20) as http:
                return (await http.get(f"{gateway.url}/health")).status_code
        except httpx.TransportError:
            return 0

    known, stranger = leaf(old), leaf(new)
    assert [await status(client) for client in (known, stranger, None)] == [200, 0, 0]
    async with httpx.AsyncClient(base_url=gateway.url, verify=trusting(ca, known)) as http:
        await until_ready(http)
    assert await generate(gateway.grpc_address, ca, known) == ANSWER
    for client in (stranger, None):
        with pytest.raises(grpc.aio.AioRpcError):
            await generate(gateway.grpc_address, ca, client)

    files.client_ca.write_bytes(new.cert_pem.bytes())
    await eventually(lambda: status(stranger), lambda code: code == 200)
    assert await status(known) == 0
    assert await generate(gateway.grpc_address, ca, stranger) == ANSWER
    with pytest.raises(grpc.aio.AioRpcError):
        await generate(gateway.grpc_address, ca, known)


async def test_new_certificates_connect_a_gateway_that_waits(
    start_gateway: StartGateway, tmp_path: Path, answer: Answer
) -> None:
    """gRPC keeps a channel's certificates for good: without a new channel a gateway whose CA was renewed would answer
    503 until somebody restarts it."""
    of_router = CertificateFiles(tmp_path / "router").write(new_ca(), "routers")
    of_gateway = CertificateFiles(tmp_path / "gateway").write(new_ca(), "gateway")
    router = FakeRouter("127.0.0.1:0", MODEL, answer)
    router.credentials = Tls(of_router.of_server(), lambda ok: None).grpc_credentials()
    await router.start()
    try:
        gateway = await start_gateway(
            router.address, router_tls=of_gateway.of_client("router", "routers"), reload_interval=0.02
        )
        async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
            await until_ready(http, 503, "not connected yet")
            # Both have the same CA now.
            for file in ("certificate", "key", "ca"):
                getattr(of_gateway, file).write_bytes(getattr(of_router, file).read_bytes())
            await until_ready(http)
            answered = await http.post("/v1/completions", json={"model": MODEL, "prompt": "Hi"})
            assert answered.json()["choices"][0]["text"] == ANSWER
            assert 'quire_gateway_reloads_total{file="router_tls",outcome="ok"}' in (await http.get("/metrics")).text
    finally:
        await router.kill()


async def test_a_socket_stays_plain(start: Callable[..., Any], files: Files, ca: trustme.CA, tmp_path: Path) -> None:
    """Probes on the same machine have no certificate to show."""
    files.write(leaf(ca))
    files.client_ca.write_bytes(ca.cert_pem.bytes())
    socket = f"unix:{tmp_path}/probes.sock"
    await start(**files.flags, tls_client_ca=str(files.client_ca), grpc_listen=f"127.0.0.1:0,{socket}")
    async with grpc.aio.insecure_channel(socket) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)
    assert answer.status in (health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING)


def test_wrong_files_are_named(files: Files, ca: trustme.CA) -> None:
    """Without it a gateway would start and fail at each handshake, or ask for a password in the terminal."""

    def load(**paths: str) -> Tls:
        return Tls(TlsFiles(**{"certificate": str(files.certificate), "key": str(files.key)} | paths), lambda ok: None)

    files.write(leaf(ca))
    load()
    with pytest.raises(ConfigError, match="--tls-key: can't read /no/such"):
        load(key="/no/such")
    with pytest.raises(ConfigError, match="--tls-client-ca"):
        load(client_ca=str(files.key))
    with pytest.raises(ConfigError, match="belong together"):
        load(key="")
    files.key.write_bytes(leaf(ca).private_key_pem.bytes())
    with pytest.raises(ConfigError, match="its own key"):
        load()
