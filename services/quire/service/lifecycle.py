"""How a service process lives: until SIGTERM, SIGINT or the death of the supervisor that started it.

Called by every service's `__main__`. A supervisor (`quire serve`) starts its children with `QUIRE_SUPERVISED=1` and a
pipe as standard input: the pipe's end tells them that it is gone, however it went, so none is left behind.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable

from quire.service.errors import ConfigError, QuireError

SUPERVISED = "QUIRE_SUPERVISED"

logger = logging.getLogger(__name__)


def run_service(
    main: Callable[[asyncio.Event], Awaitable[None]],
    *,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> int:
    """Runs `main(stop)` on a new event loop and returns the exit status; `stop` is set when the process should end.

    `main` returns when it has shut down. A ConfigError becomes one line on standard error and status 2, any other
    QuireError one and status 1.
    """
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(_run(main))
    except QuireError as error:
        logger.error("%s", error.message)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


async def _run(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if os.environ.get(SUPERVISED):
        loop.add_reader(sys.stdin.fileno(), _at_end_of_stdin, loop, stop)
    await main(stop)


def _at_end_of_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        loop.remove_reader(sys.stdin.fileno())
        stop.set()
