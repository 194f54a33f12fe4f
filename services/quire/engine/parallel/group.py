"""What the ranks of a model compute together: NCCL between GPUs, Gloo between CPUs.

All of it may be captured in CUDA graphs, as NCCL's guide says under "Using NCCL with CUDA Graphs": whether a collective
is captured, and in which graph, must be the same on all ranks. Whoever captures one runs it once before, which makes
the connections that it needs, and in a capture mode that leaves other threads alone: torch's watches events.

The backends are used without `torch.distributed.init_process_group`, whose one default group belongs to the process.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from quire.engine.parallel.shards import Shard

# A rank that waits so long for another one ends with an error.
_TIMEOUT = timedelta(minutes=10)
# torch 2.13 has it under another name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group:
    """This process's place among the ranks. Every rank must call the same methods in the same order."""

    def __init__(self, shard: Shard, device: torch.device, ranks: dist.ProcessGroup) -> None:
        self.shard = shard
        self.rank, self.size = shard.rank, shard.size
        self._device = device
        self._ranks = ranks
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)

    @classmethod
    def join(cls, shard: Shard, device: torch.device, store: TCPStore, address: str) -> Group:
        """Returns when all ranks have called this; `address` is this host's, where the others reach it over Gloo."""
        ranks, kinds = dist.ProcessGroup(store, shard.rank, shard.size), dist.ProcessGroup.BackendType
        kind = kinds.NCCL if device.type == "cuda" else kinds.GLOO
        backend = _nccl(shard, store) if device.type == "cuda" else _gloo(shard, store, address)
        ranks._set_default_backend(kind)
        ranks._register_backend(device, kind, backend)
        group = cls(shard, device, ranks)
        group.agree(True)
        return group

    def sum(self, x: Tensor) -> None:
        """x, contiguous, becomes the sum of all ranks'."""
        dist.all_reduce(x, group=self._ranks)

    def gather_columns(self, x: Tensor, columns: int, out: Tensor | None = None) -> Tensor:
        """All ranks' columns side by side, [N, columns], contiguous: `out`, or new.

        x [N, C]: `Shard.vocabulary(columns)` of them.
        """
        share = -(-columns // self.size)
        gathered = torch.empty((self.size * x.shape[0], share), dtype=x.dtype, device=x.device)
        _all_gather(gathered, F.pad(x, (0, share - x.shape[1])).contiguous(), group=self._ranks)
        if out is None:
            out = torch.empty((x.shape[0], columns), dtype=x.dtype, device=x.device)
        for rank, part in enumerate(gathered.view(self.size, -1, share)):
            own = Shard(rank, self.size).vocabulary(columns)
            out[:, own.start : own.stop].copy_(part[:, : len(own)])
        return out

    def share(self, x: Tensor) -> None:
        """x, contiguous, becomes rank 0's."""
        dist.broadcast(x, group=self._ranks, group_src=0)

    def agree(self, fine: bool) -> bool:
        """Whether it is fine on all ranks. Waits for them."""
        self._flag.fill_(int(fine))
        self.sum(self._flag)
        return int(self._flag.item()) == self.size

    def abort(self) -> None:
        """Ends, from any thread, what waits on the GPU for a rank that is gone; over Gloo that ends by itself."""
        if self._device.type == "cuda":
            with contextlib.suppress(RuntimeError):
                self._ranks.abort()


def _nccl(shard: Shard, store: TCPStore) -> dist.ProcessGroupNCCL:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _TIMEOUT
    return dist.ProcessGroupNCCL(store, shard.rank, shard.size, options)


def _gloo(shard: Shard, store: TCPStore, address: str) -> dist.ProcessGroupGloo:
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = _TIMEOUT
    return dist.ProcessGroupGloo(store, shard.rank, shard.size, options)
