"""PEM files of certificates and keys: read and checked at once, not at the first handshake.

`tls` (what servers show) and `peer_tls` (what clients trust and show) use it. Paths come with the flag that named them,
for the messages.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path

from quire.service.errors import ConfigError


def read_pem(paths: Mapping[str, str]) -> list[bytes]:
    """The contents of the file that each flag names, empty for an empty path. Raises ConfigError."""
    pem = []
    for flag, path in paths.items():
        try:
            pem.append(Path(path).read_bytes() if path else b"")
        except OSError as error:
            raise ConfigError(f"{flag}: can't read {path}: {error.strerror}", field=flag) from error
    return pem


def check_unchanged(paths: Mapping[str, str], pem: list[bytes]) -> None:
    """Raises ConfigError if the files are not what `read_pem` has read: between the two they were looked at apart."""
    if read_pem(paths) != pem:
        raise ConfigError(
            f"{next(iter(paths))}: the files change while they are read: replace them at once, as Kubernetes does"
        )


def load_chain(context: ssl.SSLContext, certificate: tuple[str, str], key: tuple[str, str]) -> None:
    """Has `context` show a certificate; both arguments are (flag, path). Raises ConfigError."""
    try:
        context.load_cert_chain(certificate[1], key[1], password=_no_password)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{' '.join(certificate)}, {' '.join(key)}: {error}: give a PEM chain and its own key, without a password",
            field=field_of(certificate[0]),
        ) from error


def load_ca(context: ssl.SSLContext, flag: str, path: str) -> None:
    """Has `context` trust the certificates in a file. Raises ConfigError."""
    try:
        context.load_verify_locations(path)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"{flag} {path}: {error}: give PEM certificates", field=field_of(flag)) from error


def field_of(flag: str) -> str:
    """The field of a config that a flag sets."""
    return flag.removeprefix("--").replace("-", "_")


def _no_password() -> str:
    # Without it OpenSSL would ask in the terminal.
    return ""
