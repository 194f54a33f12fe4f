"""Where the core gets its token masks: asked for when a step is launched, waited for when its logits are there.

Imports neither gRPC nor protobuf: the offline API fills masks in process, the server gets them from the sidecar.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from quire.service.errors import QuireError
from quire.service.request import Constraint


@dataclass(frozen=True, slots=True)
class MaskRequest:
    """The mask of a sequence's next token, after all of `output_token_ids`.

    A source knows what it was told before: it consumes what is new and starts over (a replay) if it lost its state.
    """

    sequence: int
    constraint: Constraint
    output_token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class MaskBatch:
    """`rows` is uint32 [requests, ceil(vocab_size / 32)], bits as in grammar.proto; valid until the next `begin`.

    A sequence in `errors` has no mask: its request ends with that error.
    """

    rows: npt.NDArray[np.uint32]
    errors: dict[int, QuireError]


class MaskTicket(Protocol):
    """Masks on their way."""

    def wait(self) -> MaskBatch:
        """Blocks until the rows are filled, or until the deadline; then all rows are errors."""


class MaskSource(Protocol):
    """Fills masks for the core. All calls come from the core's thread."""

    def begin(self, requests: Sequence[MaskRequest], released: Sequence[int]) -> MaskTicket:
        """Starts to fill row i for `requests[i]` and returns at once; `released` sequences have ended."""

    def close(self) -> None:
        """Lets go of everything."""
