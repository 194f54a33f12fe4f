"""CUDA graphs of a function that does the same every time, up to a size: captured when they are first wanted."""

from __future__ import annotations

import gc
import logging
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any

import torch

logger = logging.getLogger(__name__)


class Graphs:
    """All captured graphs of a runner; they share one pool of memory, since they run one after another.

    What a captured function returns is overwritten by the next graph that runs: results belong into memory of the
    caller's. Without `enabled` functions just run.

    Functions with collectives in them must be captured on all ranks or on none: `agree` tells whether all others could,
    too (`quire.engine.parallel.group.Group.agree`). `alone` is for functions of this rank only.
    """

    def __init__(
        self, stream: torch.cuda.Stream | None, *, enabled: bool, agree: Callable[[bool], bool] | None = None
    ) -> None:
        self._enabled = enabled and stream is not None
        self._stream = stream
        self._agree = agree
        self._pool: Any = torch.cuda.graph_pool_handle() if self._enabled else None
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.alone = self
        if agree is not None:
            self.alone = Graphs(stream, enabled=enabled)
            self.alone._pool = self._pool

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Lets go of all graphs: NCCL's connections don't end before those that use them."""
        self._graphs.clear()
        self.alone._graphs.clear()

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Runs `function` on the stream: from its graph if it was called under this key before.

        The first call runs it as it is, which compiles its kernels, and captures it after that.
        """
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        function()
        if self._enabled:
            graph = self._try_to_capture(function)
            if graph is not None:
                self._graphs[key] = graph
            else:
                self._enabled = False
                logger.warning(
                    "no GPU memory is left for graph %d: steps of other sizes run kernel by kernel; lower "
                    "--gpu-memory-utilization",
                    len(self._graphs) + 1,
                )

    def _try_to_capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """None if memory does not suffice, here or on another rank."""
        graph = None
        with suppress(torch.OutOfMemoryError):
            graph = self._capture(function)
        return graph if self._agree is None or self._agree(graph is not None) else None

    def _capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would also wait for the device, collect garbage and empty the cache: a pause for requests.
        # Garbage that is collected meanwhile may be graphs, whose end would break this one's capture.
        collects = gc.isenabled()
        gc.disable()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            function()
        finally:
            graph.capture_end()
            if collects:
                gc.enable()
        return graph


class Sizes:
    """The sizes that graphs are captured for; everything is rounded up to one of them."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.all = tuple(sorted(set(sizes)))

    def __call__(self, count: int) -> int | None:
        """The smallest size that holds `count`, or None."""
        index = bisect_left(self.all, count)
        return self.all[index] if index < len(self.all) else None


def batch_sizes(limit: int) -> Sizes:
    """For steps of one token a sequence: padding costs little, since they read weights and pages."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, limit, 32)]
    return Sizes([size for size in sizes if size < limit] + [limit])


def token_sizes(limit: int) -> Sizes:
    """For steps with prompts in them: padding costs arithmetic, so there is at most about 6% of it from 512 on.

    Not 448: what cuBLAS chooses for it takes a fifth longer than for 480.
    """
    sizes = [16, 32, *range(64, 448, 32), 480, *range(512, 1024, 64), *range(1024, limit, 128)]
    return Sizes([size for size in sizes if size < limit] + [limit])
