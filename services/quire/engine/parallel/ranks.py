"""Rank 0's hold on its followers: starts those of this host, waits for those of others, and hears when one is lost."""

from __future__ import annotations

import logging
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch._C._distributed_c10d import TCPStore

from quire.engine.config import CoreConfig
from quire.engine.parallel.group import Group
from quire.engine.parallel.links import LOOPBACK, Link, LinkLostError, pickled
from quire.engine.parallel.messages import End, Failed, FromFollower, Hello, Join, ToFollower
from quire.engine.parallel.processes import FollowerSpec, followers_of
from quire.engine.parallel.rendezvous import accept, listen
from quire.engine.parallel.shards import Shard
from quire.service.errors import InternalError

# A follower ends so soon after it was told to, and after its link is closed.
_END_S = 5.0
# What breaks here when a rank dies may be noticed before its death is.
_NOTICE_S = 10.0

M = TypeVar("M")
OnLost = Callable[[str], None]

logger = logging.getLogger(__name__)


class LostRankError(InternalError):
    """A rank is gone, and with it a part of the model."""


@dataclass(frozen=True, slots=True)
class _Lost:
    reason: str


class Ranks:
    """All ranks but this one, 0. Made by `gather`; `close` it.

    Once one is lost nothing can be computed any more: `on_lost` hears why, in another thread, as this one may wait for
    that rank; without it whatever waits is made to fail, and raises LostRankError.
    """

    def __init__(self, config: CoreConfig, on_lost: OnLost | None) -> None:
        self._config = config
        self._on_lost = on_lost
        self._links: dict[int, Link] = {}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._readers: list[threading.Thread] = []
        self._messages: queue.Queue[tuple[int, FromFollower | _Lost]] = queue.Queue()
        self._lost = threading.Event()
        self._reason = ""
        self._closing = False
        self._group: Group | None = None

    @classmethod
    def gather(cls, config: CoreConfig, device: torch.device, on_lost: OnLost | None = None) -> Ranks:
        """Returns when all are there and know one another.

        Raises ConfigError that says which are missing, LostRankError if one ends.
        """
        ranks = cls(config, on_lost)
        try:
            ranks._meet(device)
        except BaseException:
            ranks.close()
            raise
        return ranks

    @property
    def group(self) -> Group:
        """This rank's place among all of them."""
        if self._group is None:
            raise InternalError("the ranks have not met")
        return self._group

    def send(self, message: ToFollower) -> None:
        """To all of them. Raises LostRankError."""
        frame = pickled(message)
        for link in self._links.values():
            try:
                link.send(frame)
            except LinkLostError as error:
                raise self._failure() from error

    def expect(self, kind: type[M]) -> list[M]:
        """The next message of each of them; raises LostRankError if one is lost or can't go on."""
        found: dict[int, M] = {}
        while len(found) < len(self._links):
            rank, message = self._messages.get()
            if isinstance(message, _Lost):
                raise LostRankError(message.reason)
            if rank in found or not isinstance(message, kind):
                raise InternalError(f"rank {rank} says {type(message).__name__} where {kind.__name__} is expected")
            found[rank] = message
        return list(found.values())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """For what computes with the others: raises LostRankError instead of what a lost rank makes of it."""
        self._check()
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self._lost.wait(_NOTICE_S):
                raise self._failure() from error
            raise
        self._check()

    def close(self) -> None:
        """Ends them: none is left on this host."""
        if self._closing:
            return
        self._closing = True
        if not self._lost.is_set():
            for link in self._links.values():
                with suppress(LinkLostError):
                    link.send(pickled(End()))
            deadline = time.monotonic() + _END_S
            for reader in self._readers:
                reader.join(max(0.0, deadline - time.monotonic()))
        for link in self._links.values():
            link.close()
        for process in self._processes.values():
            try:
                process.wait(0 if self._lost.is_set() else _END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _meet(self, device: torch.device) -> None:
        config = self._config
        deadline = time.monotonic() + config.rendezvous_timeout_s
        several = config.nnodes > 1
        listener = listen(config.master_addr, config.master_port) if several else None
        for spec in followers_of(config):
            self._start(spec)
        host = LOOPBACK
        if listener is not None:
            with listener:
                others = range(config.ranks_per_node, config.tensor_parallel_size)
                remote = accept(listener, config, others, deadline)
            self._links |= remote
            host = next(iter(remote.values())).addresses[0]
        for rank, link in self._links.items():
            reader = threading.Thread(target=self._read, args=(rank, link), daemon=True)
            self._readers.append(reader)
            reader.start()
        # Those of this host say it here.
        self._expect_hellos()
        with listen(LOOPBACK if not several else config.master_addr, 0) as meeting:
            port = meeting.getsockname()[1]
            store = TCPStore(
                LOOPBACK, port, config.tensor_parallel_size, is_master=True, wait_for_workers=False,
                timeout=timedelta(seconds=config.rendezvous_timeout_s), master_listen_fd=meeting.detach(),
            )  # fmt: skip
        self.send(Join(config, host, port))
        with self.watched():
            self._group = Group.join(Shard(0, config.tensor_parallel_size), device, store, host)

    def _start(self, spec: FollowerSpec) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            self._processes[spec.rank] = subprocess.Popen(
                spec.command(f"--fd={fd}"), pass_fds=[fd], stdin=subprocess.DEVNULL
            )
        self._links[spec.rank] = Link(ours)

    def _expect_hellos(self) -> None:
        for _ in self._processes:
            rank, message = self._messages.get()
            if isinstance(message, _Lost):
                raise LostRankError(message.reason)
            if not isinstance(message, Hello):
                raise InternalError(f"rank {rank} begins with {type(message).__name__}")

    def _read(self, rank: int, link: Link) -> None:
        try:
            while not isinstance(message := link.receive_json(), Failed):
                self._messages.put((rank, message))
            self._lose(rank, f"rank {rank} failed: {message.reason}")
        except LinkLostError:
            if not self._closing:
                self._lose(rank, f"rank {rank} {self._end_of(rank)}: without it the model can't go on")

    def _end_of(self, rank: int) -> str:
        process = self._processes.get(rank)
        if process is None:
            return f"on {self._links[rank].addresses[1]} is gone (its node's log says why)"
        try:
            status = process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    def _lose(self, rank: int, reason: str) -> None:
        if self._lost.is_set() or self._closing:
            return
        self._reason = reason
        self._lost.set()
        self._messages.put((rank, _Lost(reason)))
        if self._on_lost is not None:
            self._on_lost(reason)
        elif self._group is not None:
            self._group.abort()

    def _check(self) -> None:
        if self._lost.is_set():
            raise self._failure()

    def _failure(self) -> LostRankError:
        self._lost.wait(_NOTICE_S)
        return LostRankError(self._reason or "the connection to a rank is gone")
