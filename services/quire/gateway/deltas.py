"""What an output is made of while it comes: text, which is a plain `str`, and what was told apart from it.

`answer.AnswerParser` makes them, `core.Output` passes them on, both servers write them in their own form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from quire.service.request import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The output's call number `index` (from 0) begins: it calls `name`."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the arguments, JSON text, of call number `index`."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Score:
    """A token with its log-probabilities; `offset` is where its text begins, in characters of the output.

    `logprobs` is None for a prompt's first token, which nothing comes before.
    """

    token_id: int
    offset: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class Scores:
    """The tokens of the text that comes next, or that came last if none does."""

    tokens: tuple[Score, ...]


Part: TypeAlias = str | Reasoning | ToolCallStart | ToolCallArguments
Delta: TypeAlias = Part | Scores
