"""Rows in others' memory, read by a GPU: the same whether their memory is new, used again, or changes."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from quire.engine.gpu.host_memory import HostMemory

ROWS, WORDS = 40, 1503

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def shared() -> np.ndarray:
    """As a sidecar's file is mapped: rows twice."""
    return np.frombuffer(mmap.mmap(-1, 2 * ROWS * WORDS * 4), dtype="<i4").reshape(2 * ROWS, WORDS)


def read(memory: HostMemory, rows: np.ndarray) -> tuple[bool, bool]:
    """Whether the GPU reads what is there, and whether it does so where it is."""
    found = memory.readable(rows)
    copied = found.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    return bool((copied.cpu().numpy() == rows).all()), found.data_ptr() == rows.ctypes.data and found.is_pinned()


def test_memory_that_comes_again_is_read_in_place(shared: np.ndarray) -> None:
    """A GPU would read old rows, or wait for each copy."""
    memory, draw = HostMemory(ROWS, WORDS), np.random.default_rng(0)
    for step in range(6):
        first = step % 2 * ROWS
        rows = shared[first : first + 7 + step]
        rows[:] = draw.integers(-(2**31), 2**31, rows.shape)
        assert read(memory, rows) == (True, step > 0)
    memory.close()
    assert not torch.from_numpy(shared).is_pinned()


def test_new_memory_each_time_is_copied() -> None:
    """To register what is gone a moment later would take longer than to copy it, and leave its pages locked."""
    memory, draw, kept = HostMemory(ROWS, WORDS), np.random.default_rng(0), []
    for _ in range(4):
        rows = draw.integers(-(2**31), 2**31, (ROWS, WORDS)).astype(np.int32)
        kept.append(rows)
        assert read(memory, rows) == (True, False)
    memory.close()


def test_a_new_file_takes_the_place_of_the_old_one(shared: np.ndarray) -> None:
    """A sidecar that was started again has another file: the old one would stay locked in memory."""
    memory, other = HostMemory(ROWS, WORDS), np.zeros((2 * ROWS, WORDS), np.int32)
    assert [read(memory, shared[:3])[1], read(memory, shared[3:5])[1]] == [False, True]
    other[:] = 7
    assert [read(memory, other[:3]), read(memory, other[ROWS:])] == [(True, False), (True, True)]
    assert not torch.from_numpy(shared).is_pinned()
    shared[:] = 9
    assert read(memory, shared[:ROWS]) == (True, False)
    memory.close()
    assert not torch.from_numpy(other).is_pinned()
