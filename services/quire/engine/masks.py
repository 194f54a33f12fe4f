"""Where the core gets its token masks: asked for when a step is launched, waited for when its logits are there.

Imports neither gRPC nor protobuf: the offline API fills masks in process, the server gets them from the sidecar.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from quire.service.errors import QuireError
from quire.service.request import Constraint


class MaskRequest(NamedTuple):
    """The mask of a sequence's next token, after all of `token_ids`, and one more after each of `drafts`.

    The first `num_prompt_tokens` are not bound by the constraint. The core goes on appending to `token_ids`: who reads
    them later than in `begin` may find more.

    A source knows what it was told before: it consumes what is new and starts over (a replay) if it lost its state.
    Drafts are never consumed: those that are kept come as output tokens of the sequence's next request. `max_forced` is
    how many tokens to report that the constraint forces after the drafts. `tenant` is the request's cache salt.
    """

    sequence: int
    constraint: Constraint
    token_ids: Sequence[int]
    tenant: str = ""
    drafts: Sequence[int] = ()
    max_forced: int = 0
    num_prompt_tokens: int = 0

    @property
    def num_outputs(self) -> int:
        """How many output tokens there are."""
        return len(self.token_ids) - self.num_prompt_tokens

    def outputs(self, start: int, end: int | None = None) -> Sequence[int]:
        """The output tokens from one of them up to another."""
        first = self.num_prompt_tokens
        return self.token_ids[first + start : None if end is None else first + end]


@dataclass(frozen=True, slots=True)
class DraftResult:
    """The constraint allows the first `num_drafts` drafts, and after them only the text of `forced`.

    Masks allow other tokens of the same text, too: forced tokens are drafts that are likely to be kept, no more.
    """

    num_drafts: int
    forced: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class MaskBatch:
    """`rows` is uint32 [requests + drafts, ceil(vocab_size / 32)], bits as in grammar.proto; valid until the next
    `begin`. `first_rows` tells where each request's are. Rows after a draft that is not allowed say nothing.

    A sequence in `errors` has no mask: its request ends with that error. `results` are those of sequences that had
    drafts or asked for forced tokens.
    """

    rows: npt.NDArray[np.uint32]
    errors: dict[int, QuireError]
    results: dict[int, DraftResult] = field(default_factory=dict)


def first_rows(requests: Sequence[MaskRequest]) -> list[int]:
    """The batch's row of each request's next token; without drafts, its place among the requests."""
    ends = accumulate((1 + len(request.drafts) for request in requests), initial=0)
    return list(ends)[: len(requests)]


class MaskTicket(Protocol):
    """Masks on their way."""

    def arrives(self, seconds: float) -> bool:
        """Whether `wait` has an answer at once; blocks for up to so many seconds until it has one.

        A source in process may always say yes. One that has lost the other side says no at once, and yes when the other
        side is back or the deadline has passed.
        """

    def wait(self) -> MaskBatch:
        """Blocks until the rows are filled, or until the deadline; then all rows are errors."""


class MaskSource(Protocol):
    """Fills masks for the core. All calls come from the core's thread."""

    def begin(self, requests: Sequence[MaskRequest], released: Sequence[int]) -> MaskTicket:
        """Starts to fill the requests' rows and returns at once; `released` sequences have ended."""

    def close(self) -> None:
        """Lets go of everything."""
