"""TLS from files, for HTTP and gRPC alike, loaded again when they change: new connections get the new certificate.

Connections that are open keep what they began with. A Kubernetes Secret of type kubernetes.io/tls has `tls.crt` and
`tls.key`, and cert-manager adds `ca.crt`.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from quire.service.pem import check_unchanged, load_ca, load_chain, read_pem
from quire.service.reload import Reloaded
from quire.service.tls_files import TlsFiles


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
        paths = [path for path in files.paths.values() if path]
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
    pem = read_pem(files.paths)
    context = _context(files)
    check_unchanged(files.paths, pem)
    certificate, key, client_ca = pem
    pair = (key, certificate)
    return _Loaded(context, grpc.ssl_server_certificate_configuration([pair], client_ca or None))


def _context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    certificate, key, (flag, client_ca) = files.paths.items()
    load_chain(context, certificate, key)
    if not client_ca:
        return context
    load_ca(context, flag, client_ca)
    context.verify_mode = ssl.CERT_REQUIRED
    # A session that is resumed would not be checked against a new CA.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    return context
