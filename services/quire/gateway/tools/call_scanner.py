"""One call, a JSON object, while its text comes in pieces: the name as soon as it is there, the arguments as they come.

Not a JSON parser: a model's mistakes inside the arguments are the client's to see, as with OpenAI. It only has to find
the members, and the end of each value, at every possible split of the text.
"""

from __future__ import annotations

import json
import re
from enum import Enum, auto

_NAMES = ("name", "function")
_ARGUMENTS = ("arguments", "parameters")

_BLANK = re.compile(r"[ \t\r\n]*")
# Models that were trained on lists of calls put even one into brackets.
_BEFORE = re.compile(r"[ \t\r\n\[]*")
_STRING_STOPS = re.compile(r'["\\]')
# No JSON holds "<" outside a string: the model went on to its closing tag and left a bracket out.
_NESTED_STOPS = re.compile(r'["{}\[\]<]')
_PRIMITIVE_STOPS = re.compile(r"[,}\]<\s]")


class _State(Enum):
    OPEN = auto()
    KEY = auto()
    KEY_TEXT = auto()
    COLON = auto()
    VALUE = auto()
    STRING = auto()
    NESTED = auto()
    NESTED_STRING = auto()
    PRIMITIVE = auto()
    AFTER = auto()
    DONE = auto()
    FAILED = auto()


class CallScanner:
    """`name` is None until it is known. After `done` or `failed` nothing more is taken."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._state = _State.OPEN
        self._token = ""
        self._escaped = False
        self._depth = 0
        self._key = ""
        self._arguments = ""
        self._has_arguments = False

    @property
    def done(self) -> bool:
        """Whether the object has ended and is a call."""
        return self._state is _State.DONE

    @property
    def failed(self) -> bool:
        """Whether this is no call, or not one any more."""
        return self._state is _State.FAILED

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        position = 0
        while position < len(text) and not (self.done or self.failed):
            position = self._step(text, position)
        return position

    def take_arguments(self) -> str:
        """The arguments' text since the last time."""
        taken, self._arguments = self._arguments, ""
        return taken

    def _step(self, text: str, position: int) -> int:
        match self._state:
            case _State.STRING | _State.KEY_TEXT:
                return self._string(text, position)
            case _State.NESTED:
                return self._nested(text, position)
            case _State.NESTED_STRING:
                return self._nested_string(text, position)
            case _State.PRIMITIVE:
                return self._primitive(text, position)
        blank = _BEFORE if self._state is _State.OPEN else _BLANK
        position = blank.match(text, position).end()  # type: ignore[union-attr]
        if position < len(text):
            return self._punctuation(text[position], position)
        return position

    def _punctuation(self, character: str, position: int) -> int:
        match self._state, character:
            case _State.OPEN, "{":
                self._state = _State.KEY
            case (_State.KEY, '"') | (_State.VALUE, '"'):
                self._state = _State.KEY_TEXT if self._state is _State.KEY else _State.STRING
                self._token = ""
            case (_State.KEY, "}") | (_State.AFTER, "}"):
                self._end()
            case _State.COLON, ":":
                self._state = _State.VALUE
            case _State.VALUE, "{" | "[":
                self._state, self._depth = _State.NESTED, 0
                return position
            case _State.VALUE, _ if character.isalnum() or character == "-":
                self._state, self._token = _State.PRIMITIVE, ""
                return position
            case _State.AFTER, ",":
                self._state = _State.KEY
            case _:
                self._state = _State.FAILED
                return position
        return position + 1

    def _string(self, text: str, position: int) -> int:
        position, closed, raw = self._until_quote(text, position)
        self._token += raw
        if not closed:
            return position
        try:
            value = json.loads(f'"{self._token}"', strict=False)
        except ValueError:
            self._state = _State.FAILED
            return position
        if self._state is _State.KEY_TEXT:
            self._key, self._state = value, _State.COLON
            return position
        self._state = _State.AFTER
        if self._key in _NAMES and self.name is None:
            self.name = value or None
        elif self._wanted:
            # Arguments that are a string are JSON text already.
            self._add(value)
            self._has_arguments = True
        return position

    def _until_quote(self, text: str, position: int) -> tuple[int, bool, str]:
        """(where the text goes on, whether a closing quote was found, what is before it)."""
        begin = position
        while position < len(text):
            if self._escaped:
                self._escaped = False
                position += 1
                continue
            found = _STRING_STOPS.search(text, position)
            if found is None:
                return len(text), False, text[begin:]
            position = found.end()
            if found[0] == '"':
                return position, True, text[begin : position - 1]
            self._escaped = True
        return position, False, text[begin:position]

    def _nested(self, text: str, position: int) -> int:
        found = _NESTED_STOPS.search(text, position)
        end = len(text) if found is None else found.end()
        match found and found[0]:
            case "<":
                end -= 1
                self._state = _State.FAILED
            case '"':
                self._state = _State.NESTED_STRING
            case "{" | "[":
                self._depth += 1
            case "}" | "]":
                self._depth -= 1
                if not self._depth:
                    self._state = _State.AFTER
        if self._wanted:
            self._add(text[position:end])
            self._has_arguments = self._state is _State.AFTER
        return end

    def _nested_string(self, text: str, position: int) -> int:
        end, closed, _ = self._until_quote(text, position)
        if closed:
            self._state = _State.NESTED
        if self._wanted:
            self._add(text[position:end])
        return end

    def _primitive(self, text: str, position: int) -> int:
        found = _PRIMITIVE_STOPS.search(text, position)
        end = len(text) if found is None else found.start()
        self._token += text[position:end]
        if found is not None:
            self._state = _State.AFTER
            if self._wanted and self._token != "null":
                self._add(self._token)
                self._has_arguments = True
        return end

    def _end(self) -> None:
        if self.name is None:
            self._state = _State.FAILED
            return
        if not self._has_arguments:
            self._arguments = "{}"
        self._state = _State.DONE

    @property
    def _wanted(self) -> bool:
        return self._key in _ARGUMENTS and not self._has_arguments

    def _add(self, text: str) -> None:
        self._arguments += text
