"""Calls told apart from text while an output comes. `answer` has one of these for each output that may call tools.

Both parsers are state machines over the text so far: what they say does not depend on how it was split. Text that may
yet become a tag or a call waits; tags never come out as text.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from enum import Enum, auto
from typing import Protocol

from quire.gateway.deltas import Part, ToolCallArguments, ToolCallStart
from quire.gateway.markup import split_at
from quire.gateway.tools.call_scanner import CallScanner
from quire.gateway.tools.choice import ToolFormat

HERMES_OPEN, HERMES_CLOSE = "<tool_call>", "</tool_call>"
LLAMA_TAG = "<|python_tag|>"

_BLANKS = " \t\r\n"
_SEPARATORS = _BLANKS + ";,"


class ToolParser(Protocol):
    """`num_calls` counts the calls that have begun."""

    @property
    def num_calls(self) -> int: ...

    def feed(self, text: str) -> list[Part]:
        """What is certain now and was not before."""

    def flush(self) -> list[Part]:
        """What was held back. Call it once, at the output's end."""


def tool_parser(tool_format: ToolFormat, names: Collection[str]) -> ToolParser:
    """The parser of an output of a model that was offered the tools `names`."""
    return HermesParser() if tool_format is ToolFormat.HERMES else Llama3JsonParser(names)


class _Calls:
    """The parts of an output so far, calls numbered; blanks around calls are dropped."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._parts: list[Part] = []
        self._blanks = ""
        self._after_call = False

    def text(self, text: str) -> None:
        """More text; its last blanks wait for what comes next."""
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        text = self._blanks + text
        shown = text.rstrip()
        self._blanks = text[len(shown) :]
        if shown:
            self._parts.append(shown)

    def begin(self, name: str) -> None:
        """The next call begins."""
        self._blanks = ""
        self._after_call = True
        self._parts.append(ToolCallStart(self.num_calls, f"call_{secrets.token_hex(12)}", name))
        self.num_calls += 1

    def arguments(self, scanner: CallScanner) -> None:
        """What the scanner of the call that began last has found."""
        if text := scanner.take_arguments():
            self._parts.append(ToolCallArguments(self.num_calls - 1, text))

    def take(self, *, end: bool = False) -> list[Part]:
        """The parts since the last time; at the end the waiting blanks too, if there was no call."""
        if end and not self.num_calls and self._blanks:
            self._parts.append(self._blanks)
        taken, self._parts = self._parts, []
        return taken


class _Hermes(Enum):
    TEXT = auto()
    CALL = auto()
    CLOSING = auto()


class HermesParser:
    """`<tool_call>` and one object, or several, up to `</tool_call>`; what is no call in there comes out as text."""

    def __init__(self) -> None:
        self._calls = _Calls()
        self._state = _Hermes.TEXT
        self._held = ""
        self._scanner = CallScanner()
        self._begun = False
        self._body = ""

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._calls.num_calls

    def feed(self, text: str) -> list[Part]:
        """What is certain now and was not before."""
        self._held += text
        while self._held and self._step():
            pass
        return self._calls.take()

    def flush(self) -> list[Part]:
        """What was held back; of a call that was cut off before its name, what there is of it."""
        if self._state is _Hermes.TEXT:
            self._calls.text(self._held)
        elif self._state is _Hermes.CALL and not self._begun:
            self._calls.text(self._body)
        return self._calls.take(end=True)

    def _step(self) -> bool:
        """Whether the state changed, so that what is left may mean something."""
        match self._state:
            case _Hermes.TEXT:
                return self._text()
            case _Hermes.CALL:
                return self._call()
            case _Hermes.CLOSING:
                return self._closing()

    def _text(self) -> bool:
        before, tag, self._held = split_at(self._held, HERMES_OPEN, HERMES_CLOSE)
        if before:
            self._calls.text(before)
        if tag:
            self._enter(_Hermes.CALL if tag == HERMES_OPEN else _Hermes.TEXT)
        return bool(tag)

    def _enter(self, state: _Hermes) -> None:
        self._state = state
        if state is _Hermes.CALL:
            self._scanner, self._begun, self._body = CallScanner(), False, ""

    def _call(self) -> bool:
        scanner = self._scanner
        end = scanner.feed(self._held)
        if not self._begun:
            self._body += self._held[:end]
        self._held = self._held[end:]
        if scanner.name is not None:
            if not self._begun:
                self._begun = True
                self._calls.begin(scanner.name)
            self._calls.arguments(scanner)
        if scanner.failed and not self._begun:
            self._held = self._body + self._held
            self._enter(_Hermes.TEXT)
            return True
        if scanner.failed or scanner.done:
            self._enter(_Hermes.CLOSING)
            return True
        return False

    def _closing(self) -> bool:
        before, found, rest = split_at(self._held, HERMES_CLOSE)
        # A list of calls goes on.
        begin = before.find("{")
        if begin >= 0 and self._scanner.done:
            self._held = self._held[begin:]
            self._enter(_Hermes.CALL)
            return True
        self._held = rest
        if found:
            self._enter(_Hermes.TEXT)
        return bool(found)


class _Llama(Enum):
    START = auto()
    CALL = auto()
    BETWEEN = auto()
    TEXT = auto()


class Llama3JsonParser:
    """An output that is an object which calls one of `names`, or several with ";" between them; all else is text.

    After `<|python_tag|>` an object is a call whatever it names.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._calls = _Calls()
        self._names = names
        self._state = _Llama.START
        self._held = ""
        self._tagged = False
        self._scanner = CallScanner()
        self._begun = False
        self._body = ""

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._calls.num_calls

    def feed(self, text: str) -> list[Part]:
        """What is certain now and was not before."""
        self._held += text
        while self._held and self._step():
            pass
        return self._calls.take()

    def flush(self) -> list[Part]:
        """What was held back."""
        if self._state in (_Llama.START, _Llama.TEXT):
            self._calls.text(self._held)
        elif self._state is _Llama.BETWEEN:
            self._calls.text(self._held.lstrip(_SEPARATORS))
        elif self._state is _Llama.CALL and not self._begun:
            self._calls.text(self._body)
        return self._calls.take(end=True)

    def _step(self) -> bool:
        match self._state:
            case _Llama.START:
                return self._start(_BLANKS)
            case _Llama.BETWEEN:
                return self._start(_SEPARATORS)
            case _Llama.CALL:
                return self._call()
            case _Llama.TEXT:
                return self._text()

    def _start(self, skipped: str) -> bool:
        """Decides what comes: a call, or text."""
        ahead = self._held.lstrip(skipped)
        if ahead.startswith("{"):
            self._scanner, self._begun = CallScanner(), False
            self._body, self._held = self._held[: -len(ahead)], ahead
            self._state = _Llama.CALL
        elif ahead.startswith(LLAMA_TAG):
            self._held, self._tagged = ahead.removeprefix(LLAMA_TAG), True
        elif LLAMA_TAG.startswith(ahead):
            return False
        else:
            self._state = _Llama.TEXT
        return True

    def _call(self) -> bool:
        scanner = self._scanner
        end = scanner.feed(self._held)
        if not self._begun:
            self._body += self._held[:end]
        self._held = self._held[end:]
        if scanner.name is not None and not self._begun and (self._tagged or scanner.name in self._names):
            self._begun = True
            self._calls.begin(scanner.name)
        if self._begun:
            self._calls.arguments(scanner)
        elif scanner.failed or scanner.name is not None:
            self._held = self._body + self._held
            self._state = _Llama.TEXT
            return True
        if scanner.failed or scanner.done:
            self._state = _Llama.BETWEEN
            return True
        return False

    def _text(self) -> bool:
        before, found, self._held = split_at(self._held, LLAMA_TAG)
        if before:
            self._calls.text(before)
        if found:
            self._state, self._tagged = _Llama.START, True
        return bool(found)
