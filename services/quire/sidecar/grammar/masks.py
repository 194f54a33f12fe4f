"""Rows of token masks in memory that the engine maps too."""

from __future__ import annotations

import mmap
import os

import numpy as np
import numpy.typing as npt

from quire.service.errors import InvalidRequestError


def map_masks(path: str, rows: int, vocab_size: int) -> npt.NDArray[np.int32]:
    """The file at `path` as int32 [rows, ceil(vocab_size / 32)], shared with whoever else maps it.

    The memory is unmapped when the array and its views are gone. Raises InvalidRequestError if the file is not
    exactly that large, so that no other file can be written to.
    """
    words = -(-vocab_size // 32)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidRequestError(
            f"open.path is {path!r}, which can't be opened ({error.strerror}): share its folder with the sidecar",
            field="open.path",
        ) from error
    try:
        size = os.fstat(descriptor).st_size
        if size != rows * words * 4 or not size:
            raise InvalidRequestError(
                f"open.path has {size} bytes: {rows} rows of {words} words need {rows * words * 4}", field="open.path"
            )
        return np.frombuffer(mmap.mmap(descriptor, size), dtype="<i4").reshape(rows, words)
    finally:
        os.close(descriptor)
