"""The process of a rank above 0, as rank 0 and other hosts' nodes start it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from quire.engine.config import CoreConfig

# The exit status of a rank that can't join the others or load its part: a flag or the model is wrong.
CANT_JOIN = 2


@dataclass(frozen=True, slots=True)
class FollowerSpec:
    """Which rank it is, of how many, and of which of its host's GPUs."""

    rank: int
    size: int
    local_rank: int

    def command(self, *where: str) -> list[str]:
        """The program and its arguments; `where` are flags that say how it comes to rank 0."""
        given = (f"--rank={self.rank}", f"--size={self.size}", f"--local-rank={self.local_rank}")
        return [sys.executable, "-m", "quire.engine.parallel.followers", *given, *where]


def followers_of(config: CoreConfig) -> list[FollowerSpec]:
    """Those on the host of `config.node_rank`: all of its ranks, but for rank 0."""
    first = config.node_rank * config.ranks_per_node
    return [
        FollowerSpec(first + index, config.tensor_parallel_size, index)
        for index in range(config.ranks_per_node)
        if first + index
    ]
