"""A rank above 0: loads its part of the model and runs what rank 0 runs.

`python -m quire.engine.parallel.followers`, started by rank 0 on its own host, and by `quire.engine.parallel.node` on
others. It ends when rank 0 does, or who started it, whatever it is waiting for.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from quire.engine.parallel.links import Link, LinkLostError, as_json
from quire.engine.parallel.messages import (
    Begin,
    End,
    Failed,
    Hello,
    Join,
    Launch,
    Loaded,
    Measure,
    Measured,
    Prepare,
    Refused,
)
from quire.engine.parallel.processes import CANT_JOIN
from quire.engine.parallel.rendezvous import reach
from quire.service.errors import ConfigError, InternalError, QuireError
from quire.service.logs import LogFormat, setup_logging

if TYPE_CHECKING:
    from quire.engine.gpu.runner import GpuRunner

# When a rank dies others fail, too. Rank 0 knows which was first, and ends them before they say so.
_PATIENCE_S = 5.0

M = TypeVar("M")

logger = logging.getLogger(__name__)


class Follower:
    """One rank, over its link to rank 0."""

    def __init__(self, rank: int, local_rank: int, link: Link, *, on_this_host: bool) -> None:
        """`on_this_host`: rank 0 is."""
        self._rank = rank
        self._local_rank = local_rank
        self._link = link
        self._on_this_host = on_this_host

    def run(self) -> None:
        """Follows rank 0 to its end. Raises LinkLostError if that comes unexpectedly, ConfigError if this can't join,
        and whatever breaks a step."""
        join = self._expect(Join)
        self._link.set_timeout(None)
        self._link.on_hang_up(self._leader_is_gone)
        try:
            self._follow(self._load(join))
        except LinkLostError:
            raise
        except QuireError as error:
            self._link.send(as_json(Failed(error.message)))
            raise
        except Exception as error:
            threading.Event().wait(_PATIENCE_S)
            self._link.send(as_json(Failed(f"{type(error).__name__}: {error}")))
            raise

    def _follow(self, runner: GpuRunner) -> None:
        while True:
            match self._link.receive_pickle():
                case Launch(plan):
                    runner.launch(plan, masked=False)
                case Prepare():
                    runner.prepare()
                case End():
                    return
                case message:
                    raise InternalError(f"rank 0 says {type(message).__name__} between steps")

    def _load(self, join: Join) -> GpuRunner:
        config = join.config
        if config.interpreted:
            # Triton reads it when it is imported.
            os.environ["TRITON_INTERPRET"] = "1"
        # Rank 0 has heard of this process before it imports torch, which takes seconds.
        from torch._C._distributed_c10d import TCPStore

        from quire.engine.gpu.loading import choose_device, choose_kv_dtype, load_part, new_runner, size_pages
        from quire.engine.parallel.group import Group
        from quire.engine.parallel.shards import Shard
        from quire.service.checkpoint.locate import locate

        device = choose_device(config, self._local_rank)
        if device is None:
            raise InternalError("rank 0 has a GPU, or does as if, and this rank has none")
        own, leader = (join.host, join.host) if self._on_this_host else self._link.addresses
        size = config.tensor_parallel_size
        timeout = timedelta(seconds=config.rendezvous_timeout_s)
        store = TCPStore(leader, join.port, size, is_master=False, timeout=timeout)
        group = Group.join(Shard(self._rank, size), device, store, own)
        checkpoint, kv_dtype = locate(config.model), choose_kv_dtype(config.kv_cache_dtype, device)
        model = load_part(config, checkpoint, device, kv_dtype, lambda *_: None, group)
        self._link.send(as_json(Loaded()))
        measure = self._expect(Measure)
        limits, max_model_len = measure.limits, measure.max_model_len
        self._link.send(as_json(Measured(size_pages(config, model, limits, max_model_len, None))))
        num_pages = self._expect(Begin).num_pages
        return new_runner(config, model, num_pages, limits, max_model_len, None)

    def _expect(self, kind: type[M]) -> M:
        message = self._link.receive_pickle()
        if isinstance(message, Refused):
            raise ConfigError(f"rank {self._rank} was turned away: {message.reason}", field="node_rank")
        if isinstance(message, End):
            raise LinkLostError("rank 0 ended before it was ready")
        if not isinstance(message, kind):
            raise InternalError(f"rank 0 says {type(message).__name__} where {kind.__name__} is expected")
        return message

    def _leader_is_gone(self) -> None:
        if not self._on_this_host:
            logger.error("rank 0 is gone: rank %d ends", self._rank)
        os._exit(1)


def main(argv: list[str] | None = None) -> int:
    """Follows rank 0 to its end: 0, CANT_JOIN for a flag or a model that is wrong, 1 if anything else breaks."""
    arguments = _parser().parse_args(argv)
    setup_logging(f"rank-{arguments.rank}", level=arguments.log_level, style=LogFormat(arguments.log_format))
    # Ctrl-C is for who started this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if arguments.watch_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    on_this_host = arguments.fd >= 0
    try:
        hello = Hello(arguments.rank, arguments.size, socket.gethostname(), os.getpid())
        if on_this_host:
            link = Link(socket.socket(fileno=arguments.fd))
            link.send(as_json(hello))
        else:
            link = reach(arguments.master_addr, arguments.master_port, hello, arguments.timeout)
        Follower(arguments.rank, arguments.local_rank, link, on_this_host=on_this_host).run()
    except LinkLostError as error:
        if not on_this_host:
            logger.error("rank %d ends: %s", arguments.rank, error.message)
        return 1
    except ConfigError as error:
        # Rank 0 says it where it is on this host.
        if not on_this_host:
            logger.error("%s", error.message)
        return CANT_JOIN
    except Exception:
        logger.exception("rank %d failed", arguments.rank)
        return 1
    return 0


def _end_with_stdin() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m quire.engine.parallel.followers", description=__doc__)
    add = parser.add_argument
    add("--rank", type=int, required=True)
    add("--size", type=int, required=True, help="how many ranks there are")
    add("--local-rank", type=int, required=True, help="which of this host's GPUs")
    add("--fd", type=int, default=-1, help="a socket to rank 0, on its own host")
    add("--master-addr", default="", help="rank 0's host, on others")
    add("--master-port", type=int, default=0)
    add("--timeout", type=float, default=0.0, metavar="SECONDS", help="by when rank 0 must be there")
    add("--watch-stdin", action="store_true", help="ends at the end of standard input")
    add("--log-level", default="warning")
    add("--log-format", default="text", choices=[style.value for style in LogFormat])
    return parser


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    # Not by Python's way, which takes down connections that may wait for ranks that are gone.
    os._exit(status)
