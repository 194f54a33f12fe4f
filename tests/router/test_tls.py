"""TLS between a router and its engines: who is refused, and new certificates while both run."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
import trustme
from certificate_files import CertificateFiles, new_ca
from fake_engine import FakeEngine
from router_testing import assert_whole, connected, gateway, metric, prompt_of, request_of, router, until

from quire.router.__main__ import main
from quire.service.errors import ConfigError
from quire.service.peer_tls import Dialer
from quire.service.tls import Tls
from quire.service.tls_files import PeerTlsFiles
from quire.v1 import engine_pb2, engine_pb2_grpc

ENGINES = "engines.models.svc"


@pytest.fixture
def ca() -> trustme.CA:
    return new_ca()


@pytest.fixture
def engine_files(tmp_path: Path, ca: trustme.CA) -> CertificateFiles:
    return CertificateFiles(tmp_path / "engine-tls").write(ca, ENGINES)


@pytest.fixture
def router_files(tmp_path: Path, ca: trustme.CA) -> CertificateFiles:
    return CertificateFiles(tmp_path / "router-tls").write(ca, "router")


def engine(files: CertificateFiles) -> FakeEngine:
    fake = FakeEngine("127.0.0.1:0", "engine-0")
    fake.credentials = Tls(files.of_server(), lambda ok: None).grpc_credentials()
    return fake


async def answers(dialer: Dialer, fake: FakeEngine) -> bool:
    """Whether a new channel gets through."""
    async with dialer.channel(fake.address) as channel:
        try:
            await engine_pb2_grpc.EngineServiceStub(channel).GetStatus(engine_pb2.GetStatusRequest(), timeout=5)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            return False
    return True


async def test_new_certificates_connect_a_router_that_waits(
    tmp_path: Path, engine_files: CertificateFiles, router_files: CertificateFiles
) -> None:
    """gRPC keeps a channel's certificates for good: without a new channel a router whose CA was renewed would wait for
    its engines until somebody restarts it."""
    old = Dialer(router_files.of_client("engine", ENGINES))
    fake = await engine(engine_files).start()
    config = {"engine_tls": router_files.of_client("engine", ENGINES), "reload_interval": 0.02}
    try:
        async with router(tmp_path, [fake], **config) as service, gateway(service) as session:
            request = request_of(prompt_of(1))
            await assert_whole(session.submit(request), request)
            await fake.kill()
            await until(lambda: not connected(service, 1))

            other = new_ca()
            fake.credentials = Tls(engine_files.write(other, ENGINES).of_server(), lambda ok: None).grpc_credentials()
            await fake.start()
            assert not await answers(old, fake)
            router_files.certificate.write_text("rubbish")
            await until(lambda: metric(service, "file_stale", file="engine_tls") == 1)
            router_files.write(other, "router")
            await until(lambda: connected(service, 1))
            assert metric(service, "file_stale", file="engine_tls") == 0
            again = request_of(prompt_of(2))
            await assert_whole(session.submit(again), again)
    finally:
        await fake.kill()


async def test_a_session_outlives_new_certificates(
    tmp_path: Path, engine_files: CertificateFiles, router_files: CertificateFiles, ca: trustme.CA
) -> None:
    """A renewal every few weeks must not move every stream."""
    fake = await engine(engine_files).start()
    config = {"engine_tls": router_files.of_client("engine", ENGINES), "reload_interval": 0.02}
    try:
        async with router(tmp_path, [fake], **config) as service, gateway(service) as session:
            fake.hold_at(3)
            request = request_of(prompt_of(1))
            stream = session.submit(request)
            await stream.until_tokens(3)
            router_files.write(ca, "router")
            await until(lambda: metric(service, "reloads_total", file="engine_tls", outcome="ok") >= 1)
            fake.hold_at(None)
            await assert_whole(stream, request)
            assert fake.sessions_opened == 1
    finally:
        await fake.kill()


async def test_who_is_refused(tmp_path: Path, engine_files: CertificateFiles, router_files: CertificateFiles) -> None:
    """An engine takes only routers that its CA signed, a router only engines whose name and CA are the right ones."""
    fake = await engine(engine_files).start()
    try:
        stranger = CertificateFiles(tmp_path / "stranger").write(new_ca(), "router")
        trusting = PeerTlsFiles("engine", str(router_files.ca), str(stranger.certificate), str(stranger.key), ENGINES)
        good = router_files.of_client("engine", ENGINES)
        assert await answers(Dialer(good), fake)
        for bad in (
            None,
            trusting,
            PeerTlsFiles("engine", str(router_files.ca), name=ENGINES),
            router_files.of_client("engine"),
            router_files.of_client("engine", "other.models.svc"),
            PeerTlsFiles("engine", str(stranger.ca), good.certificate, good.key, ENGINES),
        ):
            assert not await answers(Dialer(bad), fake), bad
    finally:
        await fake.kill()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine-tls-cert", "a"], "is given without --engine-tls-ca"),
        (["--engine-tls-ca", "a", "--engine-tls-key", "b"], "--engine-tls-cert and --engine-tls-key belong together"),
        (["--engine-tls-ca", "/no/such"], "--engine-tls-ca: can't read /no/such"),
        (["--tls-cert", "a"], "--tls-cert and --tls-key belong together"),
        (["--tls-client-ca", "a"], "--tls-client-ca is given without"),
        (["--tls-cert", "/no/such", "--tls-key", "b"], "--tls-cert: can't read /no/such"),
        (["--reload-interval", "0"], "--reload-interval is 0"),
    ],
)
def test_wrong_flags_are_named(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A router must not start plain because a flag was forgotten, nor fail at each handshake."""
    assert main(["--listen", f"unix:{tmp_path}/r", "--engines", "unix:/x", *flags]) == 2
    assert message in capsys.readouterr().err


def test_rubbish_is_named(tmp_path: Path, router_files: CertificateFiles) -> None:
    """gRPC itself would say so only at the first handshake."""
    good = router_files.of_client("engine")
    with pytest.raises(ConfigError, match=f"--engine-tls-ca {good.key}: .*give PEM certificates"):
        Dialer(PeerTlsFiles("engine", good.key))
    with pytest.raises(ConfigError, match=r"--engine-tls-cert .*its own key"):
        Dialer(PeerTlsFiles("engine", good.ca, good.certificate, good.certificate))
