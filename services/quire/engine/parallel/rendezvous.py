"""How the ranks of several hosts find one another: followers come to rank 0's address until all are there."""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections.abc import Collection

from quire.engine.config import CoreConfig
from quire.engine.parallel.links import Link, LinkLostError, as_json, pickled
from quire.engine.parallel.messages import FromFollower, Hello, Refused
from quire.service.errors import ConfigError

# What connects says in so many seconds who it is.
_HELLO_S = 5.0
# Between two attempts to reach a host that is not there yet.
_RETRY_S = 0.25

logger = logging.getLogger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """A listener for ranks of other hosts, on all addresses; for those of this one, if `host` is its loopback.

    Raises ConfigError if the port can't be had; 0 is any.
    """
    try:
        if _is_loopback(host):
            return socket.create_server((host, port))
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        raise ConfigError(
            f"--master-port is {port}, and ranks can't be waited for there ({error.strerror}): choose another one, the "
            "same on all nodes",
            field="master_port",
        ) from error


def accept(listener: socket.socket, config: CoreConfig, ranks: Collection[int], deadline: float) -> dict[int, Link]:
    """A link to each of `ranks`, which have said Hello; `deadline` is on time.monotonic's clock.

    Raises ConfigError that names those that did not come.
    """
    links: dict[int, Link] = {}
    try:
        while len(links) < len(ranks):
            ready, _, _ = select.select([listener], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = ", ".join(str(rank) for rank in ranks if rank not in links)
                raise ConfigError(
                    f"of {config.tensor_parallel_size} ranks these did not come to "
                    f"{config.master_addr}:{config.master_port} within {config.rendezvous_timeout_s:g} s: {missing}; "
                    "start every node with the same --master-addr and --master-port, and see that this one's port is "
                    "open to the others",
                    field="master_addr",
                )
            connection, _ = listener.accept()
            _welcome(Link(connection), config.tensor_parallel_size, ranks, links)
    except BaseException:
        for link in links.values():
            link.close()
        raise
    return links


def reach(host: str, port: int, hello: Hello, timeout_s: float) -> Link:
    """A follower's link to rank 0, which was told `hello`; raises ConfigError if nobody is there in time."""
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while True:
        try:
            left = max(0.1, deadline - time.monotonic())
            link = Link(socket.create_connection((host, port), timeout=min(left, _HELLO_S)))
            link.set_timeout(left)
            link.send(as_json(hello))
            return link
        except (OSError, LinkLostError) as error:
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"rank {hello.rank} did not reach rank 0 at {host}:{port} within {timeout_s:g} s ({error}): start "
                    "node 0 with the same --master-addr and --master-port, and see that its port is open to this node",
                    field="master_addr",
                ) from error
        pause.wait(_RETRY_S)


def _welcome(link: Link, size: int, ranks: Collection[int], links: dict[int, Link]) -> None:
    """Adds the link of a rank that fits to `links`, and closes any other."""
    try:
        link.set_timeout(_HELLO_S)
        hello = link.receive_json()
        link.set_timeout(None)
        reason = _misfit(hello, size, ranks, links)
        if not reason and isinstance(hello, Hello):
            links[hello.rank] = link
            return
        logger.warning("a rank was turned away: %s", reason)
        link.send(pickled(Refused(reason)))
    except LinkLostError as error:
        logger.warning("a connection was closed: %s", error.message)
    link.close()


def _misfit(hello: FromFollower, size: int, ranks: Collection[int], links: dict[int, Link]) -> str:
    """Why a follower can't join; empty if it can."""
    if not isinstance(hello, Hello):
        return "it did not say who it is"
    if hello.size != size:
        return f"it was started with --tensor-parallel-size {hello.size} and node 0 with {size}: give the same"
    if hello.rank not in ranks:
        return f"rank {hello.rank} is not of another node: give each node its own --node-rank, and the same --nnodes"
    if hello.rank in links:
        return f"rank {hello.rank} is there already: give each node its own --node-rank"
    return ""


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.")
