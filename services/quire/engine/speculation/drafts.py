"""Where the core gets drafts that are made on the host: asked for before a step is planned.

Imports neither gRPC nor protobuf: the offline API drafts in process, the server asks the sidecar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Drafter(StrEnum):
    """Who proposed tokens; the values name it in metrics."""

    FORCED = "forced"  # a grammar that allows nothing else
    SUFFIX = "suffix"  # what followed the same tokens before
    EAGLE = "eagle"  # a head that reads the model's hidden states


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """Up to `num_tokens` tokens that may follow a sequence's `token_ids`, of which `num_prompt_tokens` are its prompt.

    A source knows what it was told before and takes in what is new. `tenant` is the request's cache salt: what one
    tenant's requests said is never proposed to another's.
    """

    sequence: int
    token_ids: Sequence[int]
    num_tokens: int
    tenant: str = ""
    num_prompt_tokens: int = 0


class DraftTicket(Protocol):
    """Drafts on their way."""

    def wait(self) -> Mapping[int, tuple[int, ...]]:
        """Those of each sequence for which there are any; blocks until they are there or would be too late to help."""


class DraftSource(Protocol):
    """Proposes tokens for the core. All calls come from the core's thread."""

    def begin(self, requests: Sequence[DraftRequest], released: Sequence[int]) -> DraftTicket:
        """Asks for drafts and returns at once; `released` sequences have ended."""

    def close(self) -> None:
        """Lets go of everything."""
