"""A rule of the resource in both its forms: CEL for the API server, Python for `quire manifests render`.

They stand side by side in one object, and a test feeds the same bad specs to both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec


@dataclass(frozen=True, slots=True)
class Rule:
    """What must hold of a struct, or of one of its fields if `on` names one; `message` says what to change.

    `cel` sees the value as `self`, `holds` gets it as Python has it. A field that is absent is not looked at.
    """

    cel: str
    message: str
    holds: Callable[[Any], bool]
    on: str = ""


def matches(on: str, pattern: str, message: str) -> Rule:
    """The field `on` matches `pattern` as a whole (a regular expression that RE2 and Python read alike)."""
    compiled = re.compile(pattern, re.ASCII)
    escaped = pattern.replace("\\", "\\\\")
    return Rule(f"self.matches('^(?:{escaped})$')", message, lambda value: bool(compiled.fullmatch(value)), on)


def each_matches(on: str, pattern: str, message: str) -> Rule:
    """So does each entry of the list `on`."""
    compiled = re.compile(pattern, re.ASCII)
    escaped = pattern.replace("\\", "\\\\")
    return Rule(
        f"self.all(entry, entry.matches('^(?:{escaped})$'))",
        message,
        lambda values: all(compiled.fullmatch(value) for value in values),
        on,
    )


class Spec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, rename="camel"):
    """A part of the resource. Its docstring and its fields' descriptions are what `kubectl explain` says."""

    rules: ClassVar[tuple[Rule, ...]] = ()

    def __post_init__(self) -> None:
        for rule in self.rules:
            value = getattr(self, rule.on) if rule.on else self
            if value is not None and not rule.holds(value):
                # msgspec adds where in the document it was.
                raise ValueError(rule.message)
