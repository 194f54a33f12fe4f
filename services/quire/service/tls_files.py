"""Which files TLS is made of, and the flags that name them. `tls` has servers use them, `peer_tls` clients."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quire.service.errors import ConfigError
from quire.service.pem import field_of

# By the kind of peer: its CA, our certificate and key, its name.
_FLAGS = {
    "router": ("--router-tls-ca", "--router-tls-cert", "--router-tls-key", "--router-tls-name"),
    "engine": ("--engine-tls-ca", "--engine-tls-cert", "--engine-tls-key", "--engine-tls-name"),
    "server": ("--tls-ca", "--tls-cert", "--tls-key", "--tls-name"),
}


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files. With `client_ca` only clients with a certificate that it signed may connect."""

    certificate: str
    key: str
    client_ca: str = ""

    def __post_init__(self) -> None:
        if self.client_ca and not self.certificate and not self.key:
            raise ConfigError(
                "--tls-client-ca is given without --tls-cert and --tls-key: give those too", field="tls_client_ca"
            )
        if not self.certificate or not self.key:
            raise ConfigError("--tls-cert and --tls-key belong together: give both or neither", field="tls_cert")

    @classmethod
    def given(cls, certificate: str, key: str, client_ca: str) -> TlsFiles | None:
        """None, plain text, if nothing is given. Raises ConfigError if half of it is."""
        return cls(certificate, key, client_ca) if certificate or key or client_ca else None

    @classmethod
    def of_flags(cls, arguments: argparse.Namespace) -> TlsFiles | None:
        """What the flags of `add_tls_flags` ask for. Raises ConfigError."""
        return cls.given(arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca)

    @property
    def paths(self) -> Mapping[str, str]:
        """By the flag that named them."""
        return {"--tls-cert": self.certificate, "--tls-key": self.key, "--tls-client-ca": self.client_ca}


def add_tls_flags(option: Callable[..., Any], what: str) -> None:
    """The flags of a server; `what` is served plain without them."""
    option("--tls-cert", default="", metavar="FILE", help=f"PEM chain for {what}; without it plain")
    option("--tls-key", default="", metavar="FILE", help="its PEM key")
    option("--tls-client-ca", default="", metavar="FILE", help="clients need a certificate that it signed")


@dataclass(frozen=True, slots=True)
class PeerTlsFiles:
    """Paths of PEM files, for peers of one kind: "router", "engine", or "server" for one of any kind.

    `ca` has signed their certificates; `certificate` and `key` are shown to those that ask for one. `name` is what the
    certificates say if that is not the host in the peers' addresses, as where engines are found by their pods' IPs.
    """

    peer: str
    ca: str
    certificate: str = ""
    key: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        ca, certificate, key, name = _FLAGS[self.peer]
        if not self.ca:
            raise ConfigError(
                f"{certificate}, {key} or {name} is given without {ca}: give that too", field=field_of(ca)
            )
        if bool(self.certificate) != bool(self.key):
            raise ConfigError(
                f"{certificate} and {key} belong together: give both or neither", field=field_of(certificate)
            )

    @classmethod
    def of_flags(cls, arguments: argparse.Namespace, peer: str) -> PeerTlsFiles | None:
        """What the flags of `add_peer_flags` ask for, None if that is plain text. Raises ConfigError."""
        given = [getattr(arguments, field_of(flag)) for flag in _FLAGS[peer]]
        return cls(peer, *given) if any(given) else None

    @property
    def paths(self) -> Mapping[str, str]:
        """By the flag that named them."""
        ca, certificate, key, _ = _FLAGS[self.peer]
        return {ca: self.ca, certificate: self.certificate, key: self.key}


def add_peer_flags(option: Callable[..., Any], peer: str) -> None:
    """The flags of the way to peers of one kind."""
    ca, certificate, key, name = _FLAGS[peer]
    option(ca, default="", metavar="FILE", help=f"PEM CAs of the {peer}s' certificates; without it plain")
    option(certificate, default="", metavar="FILE", help=f"PEM chain for {peer}s that ask clients for one")
    option(key, default="", metavar="FILE", help="its PEM key")
    option(name, default="", metavar="NAME", help="in their certificates, if not their address")
