"""Ranks of several hosts find one another, or it is said who did not come where."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from quire.engine.config import CoreConfig
from quire.engine.parallel.links import Link, LinkLostError
from quire.engine.parallel.messages import Hello, Refused
from quire.engine.parallel.rendezvous import accept, listen, reach
from quire.service.errors import ConfigError

HOST = "127.0.0.1"


def config(port: int, timeout_s: float = 20.0) -> CoreConfig:
    return CoreConfig(
        tensor_parallel_size=4, nnodes=2, master_addr=HOST, master_port=port, rendezvous_timeout_s=timeout_s
    )


def test_strangers_and_misfits_keep_nobody_out() -> None:
    """A port scan, or a node with other flags, must neither join nor stop those who should."""
    with listen(HOST, 0) as listener, ThreadPoolExecutor() as pool:
        port = listener.getsockname()[1]
        waiting = pool.submit(accept, listener, config(port), range(2, 4), time.monotonic() + 20)
        with socket.create_connection((HOST, port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert stranger.recv(100) == b""
        refused = {
            "--tensor-parallel-size 8 and node 0 with 4: give the same": Hello(2, 8, "h", 1),
            "rank 1 is not of another node: give each node its own --node-rank": Hello(1, 4, "h", 1),
        }
        first = reach(HOST, port, Hello(2, 4, "h", 1), 20)
        refused["rank 2 is there already"] = Hello(2, 4, "h", 1)
        for words, hello in refused.items():
            link = reach(HOST, port, hello, 20)
            answer = link.receive_pickle()
            assert isinstance(answer, Refused) and words in answer.reason
            with pytest.raises(LinkLostError):
                link.receive_pickle()
            link.close()
        second = reach(HOST, port, Hello(3, 4, "h", 1), 20)
        links = waiting.result()
        assert sorted(links) == [2, 3]
        for link in (*links.values(), first, second):
            link.close()


def test_who_did_not_come() -> None:
    """Whoever looks at a start that hangs wants to know which node to look at, and what it should have reached."""
    with listen(HOST, 0) as listener:
        port = listener.getsockname()[1]
        with ThreadPoolExecutor() as pool:
            deadline = time.monotonic() + 0.5
            waiting = pool.submit(accept, listener, config(port, 0.5), range(2, 4), deadline)
            link = reach(HOST, port, Hello(2, 4, "h", 1), 20)
            with pytest.raises(ConfigError, match=rf"of 4 ranks .* come to {HOST}:{port} within 0.5 s: 3; start every"):
                waiting.result()
        with pytest.raises(LinkLostError):
            link.receive_pickle()
        link.close()
    with pytest.raises(ConfigError, match=rf"rank 2 did not reach rank 0 at {HOST}:{port} within 0.1 s \(.*refused"):
        reach(HOST, port, Hello(2, 4, "h", 1), 0.1)


def test_a_port_that_is_taken() -> None:
    """Two engines of one host with the default port would wait for each other's ranks."""
    with listen(HOST, 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--master-port is {port}, .*in use"):
            listen(HOST, port)


def test_a_link_that_hangs_up_is_heard_by_who_waits_elsewhere() -> None:
    """A follower in a collective reads nothing: what ends it is that rank 0's end is closed."""
    ours, theirs = socket.socketpair()
    link, heard = Link(ours), threading.Event()
    link.on_hang_up(heard.set)
    theirs.sendall(b"something to read, which is no end")
    theirs.close()
    assert heard.wait(20)
    link.close()
