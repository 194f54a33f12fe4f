"""Grammars that hold calls to their tools' schemas, compiled by the sidecar's own compiler and run over real tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from quire.gateway.answer import Answer, AnswerParser
from quire.gateway.grammar import compose
from quire.gateway.reasoning import Thinking
from quire.gateway.tools.choice import Tool, ToolChoice, ToolFormat
from quire.service.checkpoint import TextModel
from quire.service.errors import InvalidRequestError
from quire.service.request import Constraint, ConstraintKind
from quire.sidecar.grammar.compile import build_tokenizer, compile_constraint

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"type": "string", "maxLength": 12}},
}
WEATHER, NOW = Tool("get_weather", "", CITY), Tool("now")
STRICT = Tool("get_weather", "", CITY, strict=True)
HERMES, LLAMA = ToolFormat.HERMES, ToolFormat.LLAMA3_JSON

Accepts = Callable[[Constraint, str], bool]


@pytest.fixture(scope="module")
def tokenizer(text_model: TextModel) -> LLTokenizer:
    return build_tokenizer(text_model)


@pytest.fixture
def accepts(tokenizer: LLTokenizer, encode: Callable[[str], list[int]]) -> Accepts:
    """Whether an output may be this text, and end there."""

    compiled: dict[Constraint, LLMatcher] = {}

    def accepts(constraint: Constraint, text: str) -> bool:
        if constraint not in compiled:
            compiled[constraint] = compile_constraint(tokenizer, constraint)
        matcher = compiled[constraint].deep_copy()
        tokens = encode(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    return accepts


def call(name: str, arguments: Any, style: ToolFormat = HERMES) -> str:
    body = json.dumps({"name": name, "arguments" if style is HERMES else "parameters": arguments})
    return f"<tool_call>\n{body}\n</tool_call>" if style is HERMES else body


def grammar(
    choice: ToolChoice, style: ToolFormat, thinking: Thinking = Thinking.NEVER, answer: Constraint | None = None
) -> Constraint:
    constraint = compose(answer, thinking, choice, style, json.dumps)
    assert constraint is not None
    return constraint


@pytest.mark.parametrize("style", ToolFormat)
def test_required(accepts: Accepts, style: ToolFormat) -> None:
    """Without it `required` could give text, unknown names, or arguments that don't match."""
    held = grammar(ToolChoice((WEATHER, NOW), required=True), style)
    good, now = call("get_weather", {"city": "Lima"}, style), call("now", {"any": [1]}, style)
    between = "\n" if style is HERMES else "; "
    assert accepts(held, good)
    assert accepts(held, f"{good}{between}{now}")
    for wrong in (
        "It is sunny.",
        "",
        call("then", {}, style),
        call("get_weather", {}, style),
        call("get_weather", {"city": 5}, style),
        call("get_weather", {"city": "far too long a name"}, style),
        call("get_weather", {"city": "Lima", "day": 1}, style),
        call("now", [], style),
        f"{good} and more",
    ):
        assert not accepts(held, wrong), wrong
    single = grammar(ToolChoice((WEATHER, NOW), required=True, parallel=False), style)
    assert accepts(single, good)
    assert not accepts(single, f"{good}{between}{now}")


@pytest.mark.parametrize("style", ToolFormat)
def test_strict_tools_leave_text_free(accepts: Accepts, style: ToolFormat) -> None:
    """Without it a strict tool's schema would not hold unless a call was required, or no text could be written."""
    held = grammar(ToolChoice((STRICT, NOW)), style)
    good = call("get_weather", {"city": "Lima"}, style)
    for fine in ("It is < 5° or so.", good):
        assert accepts(held, fine), fine
    assert not accepts(held, call("get_weather", {"city": 5}, style))
    if style is HERMES:
        assert accepts(held, f"Let me see.\n{good}\n{good}")
        assert not accepts(held, f"Let me see. {call('get_weather', {})}")


def test_nothing_is_held_unless_it_has_to_be() -> None:
    """Without it every request with tools would pay for a grammar."""
    assert compose(None, Thinking.TAGGED, ToolChoice((WEATHER, NOW)), HERMES, json.dumps) is None
    assert compose(None, Thinking.OPENED, ToolChoice(), HERMES, json.dumps) is None
    answer = Constraint(ConstraintKind.REGEX, "a")
    assert compose(answer, Thinking.NEVER, ToolChoice(), HERMES, json.dumps) is answer


ANSWERS = [
    (Constraint(ConstraintKind.JSON_OBJECT), '{"a": 1}', "text"),
    (Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "integer"}'), "12", "1.5"),
    (Constraint(ConstraintKind.REGEX, "a/b\n\\d+"), "a/b\n12", "a/b"),
    (Constraint(ConstraintKind.LARK, 'start: A "}"\nA: /[xy]+/'), "xyx}", "}"),
]


@pytest.mark.parametrize(("answer", "good", "bad"), ANSWERS, ids=[answer.kind.value for answer, *_ in ANSWERS])
def test_thoughts_come_before_a_constraint(accepts: Accepts, answer: Constraint, good: str, bad: str) -> None:
    """Without it a model that thinks could not, or its thoughts had to be JSON."""
    tagged = grammar(ToolChoice(), HERMES, Thinking.TAGGED, answer)
    opened = grammar(ToolChoice(), HERMES, Thinking.OPENED, answer)
    for fine in (good, f"<think>\n{bad} {{\n</think>\n\n{good}"):
        assert accepts(tagged, fine), fine
    assert not accepts(tagged, bad)
    assert not accepts(tagged, f"<think>{good}")
    assert accepts(opened, f"Hm.\n</think>\n\n{good}")
    assert not accepts(opened, good)
    assert not accepts(opened, f"Hm.</think>{bad}")


@pytest.mark.parametrize(("answer", "good", "bad"), ANSWERS, ids=[answer.kind.value for answer, *_ in ANSWERS])
def test_constraint_or_call(accepts: Accepts, answer: Constraint, good: str, bad: str) -> None:
    """Without it a client that asks for JSON and offers tools would get no call, or an answer that is no JSON."""
    either = grammar(ToolChoice((WEATHER,)), HERMES, answer=answer)
    assert accepts(either, good)
    assert accepts(either, call("get_weather", {"city": "Lima"}))
    assert not accepts(either, bad)
    must = grammar(ToolChoice((WEATHER,), required=True), HERMES, answer=answer)
    assert not accepts(must, good)


def test_tags_that_are_special_tokens(text_model: TextModel, tokenizer: LLTokenizer) -> None:
    """Without it models whose tags are tokens of their own would be held to spelling them out."""
    tags = {"<tool_call>": 3, "</tool_call>": 4, "<think>": 5, "</think>": 6}
    choice = ToolChoice((STRICT,))
    held = compose(None, Thinking.TAGGED, choice, HERMES, lambda tag: f"<[{tags[tag]}]>")
    assert held is not None
    body = text_model.tokenizer.encode('\n{"name": "get_weather", "arguments": {"city": "Lima"}}\n').ids
    text = text_model.tokenizer.encode("Well.").ids
    for tokens, fine in (
        ([3, *body, 4], True),
        ([5, *text, 6, 3, *body, 4], True),
        ([*text, 3, *body, 4], True),
        (text, True),
        ([3, *text], False),
    ):
        matcher = compile_constraint(tokenizer, held).deep_copy()
        consumed = matcher.try_consume_tokens(tokens) == len(tokens)
        assert (consumed and matcher.is_accepting()) is fine, tokens


def test_schema_that_is_no_json() -> None:
    """Without it a broken schema would be a failure of ours, where it has to be embedded."""
    for source in ("{", "[1]", "[" * 100_000):
        with pytest.raises(InvalidRequestError):
            grammar(ToolChoice(), HERMES, Thinking.TAGGED, Constraint(ConstraintKind.JSON_SCHEMA, source))


@pytest.mark.parametrize("style", ToolFormat)
def test_what_is_held_is_understood(accepts: Accepts, style: ToolFormat) -> None:
    """Without it the grammar could make the model write calls that the parser does not know."""
    output = call("get_weather", {"city": "Lima"}, style) + ("\n" if style is HERMES else "; ") + call("now", {}, style)
    assert accepts(grammar(ToolChoice((WEATHER, NOW), required=True), style), output)
    parser, answer = AnswerParser(Thinking.NEVER, style, ("get_weather", "now")), Answer()
    for part in [*parser.feed(output), *parser.flush()]:
        answer.add(part)
    assert [(call.name, call.arguments) for call in answer.calls] == [
        ("get_weather", '{"city": "Lima"}'),
        ("now", "{}"),
    ]
    assert answer.text == ""
