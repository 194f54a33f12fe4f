"""Output types as Python programs write them, compiled as the sidecar would."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

import pytest
from llguidance import LLMatcher, LLTokenizer
from outlines.types import CFG, JsonSchema, Regex
from outlines.types.dsl import String, either
from pydantic import BaseModel

from quire.service.checkpoint import TextModel
from quire.service.errors import InvalidRequestError
from quire.service.request import Constraint, ConstraintKind
from quire.sidecar.grammar.compile import build_tokenizer, compile_constraint
from quire.sidecar.grammar.output_types import constraint_of


class Person(BaseModel):
    name: str
    age: int


@dataclass
class Point:
    x: int
    y: int


class Color(Enum):
    RED = "red"
    GREEN = "grün"


@pytest.fixture(scope="module")
def tokenizer(smollm: TextModel) -> LLTokenizer:
    return build_tokenizer(smollm)


def matches(tokenizer: LLTokenizer, constraint: Constraint, text: str) -> bool:
    matcher: LLMatcher = compile_constraint(tokenizer, constraint).deep_copy()
    return matcher.consume_tokens(tokenizer.tokenize_str(text)) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("output_type", "kind", "good", "bad"),
    [
        (Person, ConstraintKind.JSON_SCHEMA, '{"name": "Ana", "age": 3}', '{"name": "Ana"}'),
        (Point, ConstraintKind.JSON_SCHEMA, '{"x": 1, "y": -2}', '{"x": 1.5, "y": 2}'),
        (JsonSchema({"type": "array", "items": {"type": "null"}}), ConstraintKind.JSON_SCHEMA, "[null]", "[1]"),
        (Literal["a b-c", "d.e", "(f)"], ConstraintKind.REGEX, "a b-c", "dxe"),
        (Color, ConstraintKind.REGEX, "grün", "blau"),
        (int, ConstraintKind.REGEX, "-42", "4.2"),
        (bool, ConstraintKind.REGEX, "True", "1"),
        (Regex("[a-z]{3}"), ConstraintKind.REGEX, "abc", "abcd"),
        (either("yes", "no") + String("!"), ConstraintKind.REGEX, "no!", "no"),
        (CFG('start: "(" start? ")"'), ConstraintKind.LARK, "(())", "(()"),
        (Constraint(ConstraintKind.REGEX, "x+"), ConstraintKind.REGEX, "xx", "y"),
    ],
)
def test_each_kind_of_output_type(
    tokenizer: LLTokenizer, output_type: object, kind: ConstraintKind, good: str, bad: str
) -> None:
    """A program's types would be refused, or stand for something else than they say."""
    constraint = constraint_of(output_type)
    assert constraint.kind is kind
    assert matches(tokenizer, constraint, good)
    assert not matches(tokenizer, constraint, bad)


@pytest.mark.parametrize(
    ("output_type", "words"),
    [
        (object(), "is no output type"),
        (JsonSchema({}, whitespace_pattern=" *"), "a whitespace_pattern is not supported"),
    ],
)
def test_what_is_no_output_type(output_type: object, words: str) -> None:
    """A mistake would surface as a traceback from deep inside outlines."""
    with pytest.raises(InvalidRequestError, match=words) as caught:
        constraint_of(output_type)
    assert caught.value.field == "constraint"
