"""TLS on the way to another service: whom to trust and what to show, loaded again when the files change.

The gateway's links to routers and the router's to engines make their channels here. gRPC can't change the certificates
of a channel in Python: a link makes a new channel for each session, and gives up one that can't connect when there are
new files. A session that stands keeps what it began with.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence

import grpc

from quire.service.grpc_server import channel
from quire.service.pem import check_unchanged, load_ca, load_chain, read_pem
from quire.service.reload import Reloaded
from quire.service.tls_files import PeerTlsFiles


class Dialer:
    """Makes channels to peers of one kind, plain ones without `files`. Raises ConfigError if those can't be used.

    `reloaded(ok)` hears of later attempts; `files` is to be watched by the service that uses it.
    """

    def __init__(self, files: PeerTlsFiles | None = None, reloaded: Callable[[bool], None] = lambda ok: None) -> None:
        self._name = "" if files is None else files.name
        self._heard = reloaded
        self._renewal = asyncio.Event()
        self.files: Reloaded[grpc.ChannelCredentials] | None = None
        if files is not None:
            paths = [path for path in files.paths.values() if path]
            self.files = Reloaded(f"TLS to {files.peer}s", paths, lambda: _load(files), self._loaded)

    @property
    def renewal(self) -> asyncio.Event:
        """Set once there are new files: channels made before that do not know them."""
        return self._renewal

    def channel(self, address: str, options: Sequence[tuple[str, int]] = ()) -> grpc.aio.Channel:
        """A channel that shows and trusts what was loaded last; `options` come before those that all share."""
        credentials = None if self.files is None else self.files.value
        return channel(address, credentials, name=self._name, options=options)

    def _loaded(self, ok: bool) -> None:
        self._heard(ok)
        if ok:
            self._renewal.set()
            self._renewal = asyncio.Event()


def _load(files: PeerTlsFiles) -> grpc.ChannelCredentials:
    pem = read_pem(files.paths)
    (ca_flag, ca), *pair = files.paths.items()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    load_ca(context, ca_flag, ca)
    if files.certificate:
        load_chain(context, *pair)
    check_unchanged(files.paths, pem)
    trusted, certificate, key = pem
    return grpc.ssl_channel_credentials(trusted, key or None, certificate or None)
