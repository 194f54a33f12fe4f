"""Memory of the host that a GPU may read by itself, so that nobody copies for it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_Rows = npt.NDArray[np.int32]


class HostMemory:
    """What a GPU reads again and again from arrays of others, up to `num_rows` of so many words.

    Whoever leaves its rows in the same memory twice has it registered with the driver; other rows are copied to memory
    that is. The last rows must have been read before `readable` is called again.
    """

    def __init__(self, num_rows: int, num_words: int) -> None:
        self._copied = torch.empty(num_rows, num_words, dtype=torch.int32, pin_memory=True)
        # Held, as another array may else come to lie there.
        self._last: npt.NDArray[np.generic] | None = None
        self._registered: npt.NDArray[np.generic] | None = None
        self._may_register = True

    def readable(self, rows: _Rows) -> Tensor:
        """The rows where the GPU can read them, on the host."""
        memory = _memory(rows)
        if self._may_register and memory is self._last and memory is not self._registered:
            self._register(memory)
        self._last = memory
        if memory is self._registered:
            return torch.from_numpy(rows)
        copied = self._copied[: len(rows)]
        # Not by torch, whose threads would wait for more in busy loops, where those that make the next masks want to
        # run.
        copied.numpy()[:] = rows
        return copied

    def close(self) -> None:
        """Lets go of what is registered."""
        if self._registered is not None:
            _runtime().cudaHostUnregister(self._registered.ctypes.data)
        self._registered = self._last = None

    def _register(self, memory: npt.NDArray[np.generic]) -> None:
        self.close()
        if int(_runtime().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)):
            self._may_register = False
            # Else the next launch would be told of it.
            with suppress(RuntimeError):
                torch.zeros(1, device="cuda")
        else:
            self._registered = memory


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _memory(rows: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """The array that `rows` are a part of."""
    while isinstance(rows.base, np.ndarray):
        rows = rows.base
    return rows
