"""A batch's token masks, filled in parallel. The sidecar calls it for engines, the offline API in process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from quire.service.errors import QuireError
from quire.sidecar.grammar.matcher import SequenceMatcher


class MaskRow(NamedTuple):
    """The mask of `sequence`'s next token, `accepted` being its output tokens since its last mask, goes into `row`."""

    sequence: int
    row: int
    matcher: SequenceMatcher
    accepted: list[int]


class MaskFiller:
    """The threads that compute masks; 0 is one for each core that this process may use."""

    def __init__(self, threads: int) -> None:
        self._executor = LLExecutor(threads or _num_cores())

    def fill(self, rows: Sequence[MaskRow], bitmask: npt.NDArray[np.int32]) -> dict[int, QuireError]:
        """Fills rows of `bitmask`, int32 [R, ceil(vocab_size / 32)]; releases the GIL.

        Returns, by sequence, the errors of those that have no mask.
        """
        matchers = []
        for row in rows:
            row.matcher.consume(row.accepted)
            if row.matcher.error is None:
                matchers.append((row.matcher.matcher, row.row))
        if len(matchers) == 1:
            fill_next_token_bitmask(matchers[0][0], bitmask, matchers[0][1])
        elif matchers:
            fill_next_token_bitmask_par(self._executor, matchers, bitmask)
        # Computing a mask may exceed the limits too.
        return {row.sequence: error for row in rows if (error := row.matcher.error) is not None}


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
