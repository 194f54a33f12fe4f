"""An output's text taken apart: thoughts, answer, calls. And put together again, for those who want it whole."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from quire.gateway.deltas import Delta, Part, Reasoning, Score, Scores, ToolCallArguments, ToolCallStart
from quire.gateway.reasoning import ReasoningParser, Thinking
from quire.gateway.tools.choice import ToolFormat
from quire.gateway.tools.parser import tool_parser


class AnswerParser:
    """Parses one output; `tools` are the names of those that it may call."""

    def __init__(self, thinking: Thinking, tool_format: ToolFormat, tools: Collection[str]) -> None:
        self._reasoning = ReasoningParser(thinking)
        self._tools = tool_parser(tool_format, tools) if tools else None

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._tools.num_calls if self._tools is not None else 0

    def feed(self, text: str) -> list[Part]:
        """What is certain now and was not before."""
        if not text:
            return []
        return self._answer([text] if self._reasoning.answering else self._reasoning.feed(text))

    def flush(self) -> list[Part]:
        """What was held back. Call it once, at the output's end."""
        parts = self._answer(self._reasoning.flush())
        return parts if self._tools is None else parts + self._tools.flush()

    def _answer(self, parts: list[Part]) -> list[Part]:
        if self._tools is None:
            return parts
        told_apart: list[Part] = []
        for part in parts:
            told_apart += self._tools.feed(part) if isinstance(part, str) else [part]
        return told_apart


@dataclass(slots=True)
class Call:
    """A call to a tool; `arguments` is JSON text, as far as the model wrote any."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Answer:
    """A whole output; `add` every delta of it."""

    calls: list[Call] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    _text: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The answer's text."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        """The thoughts before it."""
        return "".join(self._reasoning)

    def add(self, delta: Delta) -> None:
        """More of it."""
        match delta:
            case str():
                self._text.append(delta)
            case Reasoning(text):
                self._reasoning.append(text)
            case ToolCallStart(_, call_id, name):
                self.calls.append(Call(call_id, name))
            case ToolCallArguments(index, text):
                self.calls[index].arguments += text
            case Scores(tokens):
                self.scores.extend(tokens)
