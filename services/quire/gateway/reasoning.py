"""What a model thinks before it answers, told apart from the answer where its template marks it.

`model` finds out whether a template marks it and whether a prompt has opened it already; `answer` parses with it.
"""

from __future__ import annotations

from enum import Enum

from quire.gateway.deltas import Part, Reasoning
from quire.gateway.markup import split_at

OPEN, CLOSE = "<think>", "</think>"


class Thinking(Enum):
    """What an output begins with."""

    NEVER = "never"
    # Thoughts, if it begins with their tag.
    TAGGED = "tagged"
    # Thoughts: the prompt ends with their tag.
    OPENED = "opened"


def thinking_after(prompt: str) -> Thinking:
    """What follows `prompt`, which a template that marks thoughts has written."""
    end = prompt.rstrip()
    if end.endswith(OPEN):
        return Thinking.OPENED
    # A prompt that closes them has asked for an answer without.
    return Thinking.NEVER if end.endswith(CLOSE) else Thinking.TAGGED


class ReasoningParser:
    """Splits an output. `answering` is True once all that follows belongs to the answer: then it need not be fed.

    Blanks around thoughts are dropped.
    """

    def __init__(self, thinking: Thinking) -> None:
        self.answering = thinking is Thinking.NEVER
        self._thinking = thinking is Thinking.OPENED
        # The opening tag may come, and is dropped. After it was closed, blanks are.
        self._beginning = True
        self._closed = False
        self._held = ""

    def feed(self, text: str) -> list[Part]:
        """What is certain now and was not before; a `str` belongs to the answer."""
        self._held += text
        if self._beginning and not self._begin():
            return []
        if self._thinking:
            return self._think()
        return self._answer()

    def flush(self) -> list[Part]:
        """What was held back. Call it once, at the output's end."""
        held, self._held = self._held, ""
        if not self._thinking:
            return [held] if held and not self._closed else []
        held = held.rstrip()
        return [Reasoning(held)] if held else []

    def _begin(self) -> bool:
        """Whether it is known what the output begins with."""
        ahead = self._held.lstrip()
        if OPEN.startswith(ahead):
            return False
        if ahead.startswith(OPEN):
            self._thinking = True
            ahead = ahead.removeprefix(OPEN).lstrip()
        if self._thinking:
            self._held = ahead
            if not ahead:
                return False
        self._beginning = False
        return True

    def _think(self) -> list[Part]:
        before, closed, rest = split_at(self._held, CLOSE)
        thoughts = before.rstrip()
        self._held = rest if closed else before[len(thoughts) :] + rest
        parts: list[Part] = [Reasoning(thoughts)] if thoughts else []
        if closed:
            self._thinking, self._closed = False, True
            parts += self._answer()
        return parts

    def _answer(self) -> list[Part]:
        answer = self._held.lstrip() if self._closed else self._held
        self._held = ""
        if not answer:
            return []
        self.answering = True
        return [answer]
