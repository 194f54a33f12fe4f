"""TLS from files, for HTTP and gRPC alike, loaded again when they change: new connections get the new certificate.

Connections that are open keep what they began with. A Kubernetes Secret of type kubernetes.io/tls has `tls.crt` and
`tls.key`, and cert-manager adds `ca.crt`.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from quire.service.errors import ConfigError
from quire.service.reload import Reloaded


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files. With `client_ca` only clients with a certificate that it signed may connect."""

    certificate: str
    key: str
    client_ca: str = ""

    def __post_init__(self) -> None:
        if not self.certificate or not self.key:
            raise ConfigError("--tls-cert and --tls-key belong together: give both or neither", field="tls_cert")


@dataclass(frozen=True, slots=True)
class _Loaded:
    context: ssl.SSLContext
    grpc: grpc.ServerCertificateConfiguration


class Tls:
    """What `files` hold. Raises ConfigError if they can't be used; `reloaded(ok)` hears of later attempts.

    `files` is to be watched by the service that uses it.
    """

    def __init__(self, files: TlsFiles, reloaded: Callable[[bool], None]) -> None:
        self._files = files
        paths = [path for path in (files.certificate, files.key, files.client_ca) if path]
        self.files = Reloaded("TLS certificate", paths, lambda: _load(files), reloaded)

    def context(self) -> ssl.SSLContext:
        """For servers that take one context for good: at each handshake it hands over to what was loaded last."""

        def hand_over(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, outer: ssl.SSLContext) -> None:
            connection.context = self.files.value.context

        context = _context(self._files)
        # Called at every handshake, whether or not the client names a server.
        context.sni_callback = hand_over
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`."""
        given = self.files.value

        # gRPC asks at each handshake, from a thread of its own, and keeps what it has if the answer is None.
        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            if self.files.value is given:
                return None
            given = self.files.value
            return given.grpc

        return grpc.dynamic_ssl_server_credentials(
            given.grpc,
            changed,  # type: ignore[arg-type]  # None is in its documentation
            bool(self._files.client_ca),
        )


def _load(files: TlsFiles) -> _Loaded:
    pem = _read(files)
    context = _context(files)
    if _read(files) != pem:
        raise ConfigError("--tls-cert: the files change while they are read: replace them at once, as Kubernetes does")
    certificate, key, client_ca = pem
    pair = (key, certificate)
    return _Loaded(context, grpc.ssl_server_certificate_configuration([pair], client_ca or None))


def _read(files: TlsFiles) -> tuple[bytes, bytes, bytes]:
    paths = {"--tls-cert": files.certificate, "--tls-key": files.key, "--tls-client-ca": files.client_ca}
    pem = []
    for flag, path in paths.items():
        try:
            pem.append(Path(path).read_bytes() if path else b"")
        except OSError as error:
            raise ConfigError(f"{flag}: can't read {path}: {error.strerror}", field=flag) from error
    return pem[0], pem[1], pem[2]


def _context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(files.certificate, files.key, password=_no_password)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"--tls-cert {files.certificate}, --tls-key {files.key}: {error}: give a PEM chain and its own key, "
            "without a password",
            field="tls_cert",
        ) from error
    if not files.client_ca:
        return context
    try:
        context.load_verify_locations(files.client_ca)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"--tls-client-ca {files.client_ca}: {error}: give PEM certificates", field="tls_client_ca"
        ) from error
    context.verify_mode = ssl.CERT_REQUIRED
    # A session that is resumed would not be checked against a new CA.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    return context


def _no_password() -> str:
    # Without it OpenSSL would ask in the terminal.
    return ""
