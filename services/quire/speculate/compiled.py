"""Functions that a GPU runs as few kernels, by torch.compile, for any number of rows; a CPU runs them as written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Compiled(Generic[_P, _R]):
    """`function`, whose first argument is a tensor [rows, …]; a decorator.

    A tensor that has as many rows may have another number in the next call without being compiled again.
    """

    def __init__(self, function: Callable[_P, _R]) -> None:
        self._function = function
        self._compiled: Callable[_P, _R] | None = None

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        first = args[0]
        if not isinstance(first, Tensor) or not _compiles(first.device.type):
            return self._function(*args, **kwargs)
        if self._compiled is None:
            # Importing the compiler takes seconds, and a CPU needs none of it.
            self._compiled = torch.compile(self._function)
        for given in args:
            if isinstance(given, Tensor) and given.ndim and given.shape[0] == first.shape[0]:
                torch._dynamo.maybe_mark_dynamic(given, 0)
        return self._compiled(*args, **kwargs)


@contextmanager
def as_written() -> Iterator[None]:
    """Within it nothing is compiled: for few calls, for which it takes too long. A decorator, too."""
    with torch.compiler.set_stance("force_eager"):
        yield


@cache
def _compiles(device_type: str) -> bool:
    if device_type != "cuda":
        return False
    # Without Triton or for a card that it does not know, functions run as they are written.
    from torch.utils._triton import has_triton

    return bool(has_triton())
