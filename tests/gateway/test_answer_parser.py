"""Thoughts, answers and calls told apart: at every split of the text, and whatever a model writes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quire.gateway.answer import Answer, AnswerParser
from quire.gateway.deltas import Part, Reasoning, ToolCallArguments, ToolCallStart
from quire.gateway.reasoning import Thinking, thinking_after
from quire.gateway.tools.choice import ToolFormat

TOOLS = ("now", "get_weather")
HERMES, LLAMA = ToolFormat.HERMES, ToolFormat.LLAMA3_JSON
ARGUMENTS = '{"city": "Paris }\\" </tool_call> <", "days": [1, {"a": null}]}'
ONE = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
TWO = '<tool_call>{"arguments": {}, "name": "now"}</tool_call>'

Told = tuple[str, str, list[tuple[str, str]]]


def parse(
    pieces: Iterable[str],
    style: ToolFormat = HERMES,
    thinking: Thinking = Thinking.NEVER,
    tools: tuple[str, ...] = TOOLS,
) -> Told:
    """(thoughts, text, calls) of an output that comes in `pieces`."""
    parser = AnswerParser(thinking, style, tools)
    parts: list[Part] = []
    for piece in pieces:
        parts += parser.feed(piece)
    parts += parser.flush()
    check_order(parts)
    whole = Answer()
    for part in parts:
        whole.add(part)
    assert parser.num_calls == len(whole.calls)
    assert len({call.id for call in whole.calls}) == len(whole.calls)
    return whole.reasoning, whole.text, [(call.name, call.arguments) for call in whole.calls]


def check_order(parts: list[Part]) -> None:
    """No part is empty; calls begin one after the other, each before its arguments."""
    begun = 0
    for part in parts:
        match part:
            case str(text) | Reasoning(text):
                assert text
            case ToolCallStart(index, _, name):
                assert (index, bool(name)) == (begun, True)
                begun += 1
            case ToolCallArguments(index, text):
                assert text
                assert index == begun - 1


CASES: list[tuple[ToolFormat, str, str, list[tuple[str, str]]]] = [
    (HERMES, "Hello <b>you</b>.", "Hello <b>you</b>.", []),
    (HERMES, " a < b \n", " a < b \n", []),
    (HERMES, "<tool_cal", "<tool_cal", []),
    (HERMES, ONE, "", [("get_weather", ARGUMENTS)]),
    (HERMES, f"Let me see.\n\n{ONE}\n{TWO}\n", "Let me see.", [("get_weather", ARGUMENTS), ("now", "{}")]),
    (HERMES, f"{TWO} Done. ", "Done.", [("now", "{}")]),
    (HERMES, '<tool_call>[{"name": "now"}, {"name": "then"}]</tool_call>', "", [("now", "{}"), ("then", "{}")]),
    (HERMES, '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("now", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "now", "arguments": null, "x": [1]}</tool_call>', "", [("now", "{}")]),
    (HERMES, '<tool_call>{"name": "n\\u00e9"}</tool_call>', "", [("né", "{}")]),
    # What models get wrong: no closing tag, no closing bracket, no JSON, no name.
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": 1}}', "", [("now", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": 1}\n</tool_call>ok', "ok", [("now", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": 1\n</tool_call>', "", [("now", '{"a": 1\n')]),
    (HERMES, "<tool_call>now()</tool_call> then", "now() then", []),
    (HERMES, f"<tool_call>oh <tool_call>{TWO} </tool_call>", "oh", [("now", "{}")]),
    (HERMES, '<tool_call>{"a": 1}</tool_call>', '{"a": 1}', []),
    (HERMES, '<tool_call>{"name": "now", "argu', "", [("now", "")]),
    (HERMES, '<tool_call>{"na', '{"na', []),
    (LLAMA, "Hello {you}.", "Hello {you}.", []),
    (LLAMA, '{"name": "now", "parameters": {"a": "}"}}', "", [("now", '{"a": "}"}')]),
    (LLAMA, ' {"parameters": {"a": 1}, "name": "now"} ', "", [("now", '{"a": 1}')]),
    (LLAMA, '{"type": "function", "function": "now", "parameters": {}}', "", [("now", "{}")]),
    (LLAMA, '{"name": "now"}; {"name": "get_weather", "parameters": {}}', "", [("now", "{}"), ("get_weather", "{}")]),
    (LLAMA, '<|python_tag|>{"name": "other", "parameters": {}}', "", [("other", "{}")]),
    (LLAMA, 'Wait. <|python_tag|>{"name": "now", "parameters": {}}', "Wait.", [("now", "{}")]),
    # JSON that is an answer.
    (LLAMA, '{"name": "Ann", "age": 5}', '{"name": "Ann", "age": 5}', []),
    (LLAMA, '{"answer": [1, 2]}', '{"answer": [1, 2]}', []),
    (LLAMA, '  {"a', '  {"a', []),
    (LLAMA, '{"name": "now"} and more', "and more", [("now", "{}")]),
]


@pytest.mark.parametrize(("style", "output", "text", "calls"), CASES, ids=range(len(CASES)))
def test_calls_at_every_split(style: ToolFormat, output: str, text: str, calls: list[tuple[str, str]]) -> None:
    """Without it a call could be missed, or a tag leak into the text, for the tokens of one model or another."""
    expected = ("", text, calls)
    assert parse([output], style) == expected
    assert parse(output, style) == expected
    for cut in range(1, len(output)):
        assert parse([output[:cut], output[cut:]], style) == expected, output[:cut]


@pytest.mark.parametrize(
    ("thinking", "output", "thoughts", "text"),
    [
        (Thinking.NEVER, "<think>a</think>b", "", "<think>a</think>b"),
        (Thinking.TAGGED, "<think>\nHm. <b> </b>\n\n</think>\n\nYes. ", "Hm. <b> </b>", "Yes. "),
        (Thinking.TAGGED, "\n<think></think>Yes", "", "Yes"),
        (Thinking.TAGGED, "  Yes <think>no</think>", "", "  Yes <think>no</think>"),
        (Thinking.TAGGED, "<thin", "", "<thin"),
        (Thinking.TAGGED, "<think>cut off </thi", "cut off </thi", ""),
        (Thinking.OPENED, "Hm.\n</think>\n\nYes", "Hm.", "Yes"),
        (Thinking.OPENED, "<think>\nHm.</think>Yes", "Hm.", "Yes"),
        (Thinking.OPENED, "\ncut off\n", "cut off", ""),
        (Thinking.OPENED, "</think>\n\n", "", ""),
    ],
)
def test_thoughts_at_every_split(thinking: Thinking, output: str, thoughts: str, text: str) -> None:
    """Without it thoughts would be shown as the answer, or the answer be taken for thoughts."""
    expected = (thoughts, text, [])
    assert parse(output, thinking=thinking, tools=()) == expected
    for cut in range(len(output)):
        assert parse([output[:cut], output[cut:]], thinking=thinking, tools=()) == expected, output[:cut]


def test_thoughts_then_calls() -> None:
    """Without it a call that a model only thinks about would be made."""
    output = f"<think>{TWO}</think>\n\nSo: {ONE}"
    assert parse(output, thinking=Thinking.TAGGED) == (TWO, "So:", [("get_weather", ARGUMENTS)])


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [
        ("<assistant>", Thinking.TAGGED),
        ("<assistant><think>\n", Thinking.OPENED),
        ("<assistant><think>\n\n</think>\n\n", Thinking.NEVER),
    ],
)
def test_what_a_prompt_opens(prompt: str, thinking: Thinking) -> None:
    """Without it templates that open or close the thoughts themselves would have them in the answer."""
    assert thinking_after(prompt) is thinking


fragments = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<|python_tag|>", "<think>", "</think>", "<", "</", ONE, TWO),
        *('{"name": "now", "arguments": {', '{"name": "now", "parameters": {', "}", "}}", "{", "[", "]", ";", ",", ":"),
        *('"', "\\", '"a": 1', '"name": "x"', "null", "text", " ", "\n", "é👩", ARGUMENTS),
    ]
)
outputs = st.lists(fragments, max_size=14).map("".join)


@settings(max_examples=400, deadline=None)
@given(output=outputs, cuts=st.lists(st.integers(0, 200), max_size=8), data=st.data())
@example(output='{"name": "now"};;<|python', cuts=[17, 18], data=None)
def test_any_output_at_any_split(output: str, cuts: list[int], data: st.DataObject | None) -> None:
    """Without it some text could be told apart otherwise, or lost, or its tags leak, for one split and not another."""
    thinking = data.draw(st.sampled_from(Thinking)) if data is not None else Thinking.NEVER
    edges = sorted({0, len(output), *(cut for cut in cuts if cut < len(output))})
    pieces = [output[start:end] for start, end in pairwise(edges)]
    for style in ToolFormat:
        whole = parse([output], style, thinking)
        assert parse(pieces, style, thinking) == whole
        assert parse(output, style, thinking) == whole
        tags = ("<tool_call>", "</tool_call>") if style is HERMES else ("<|python_tag|>",)
        assert not any(tag in whole[1] for tag in tags)


@settings(max_examples=200, deadline=None)
@given(
    arguments=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=8,
    ).map(lambda value: {"value": value}),
    indent=st.none() | st.integers(0, 2),
    style=st.sampled_from(ToolFormat),
)
def test_any_arguments_arrive_as_they_were_written(
    arguments: dict[str, object], indent: int | None, style: ToolFormat
) -> None:
    """Without it some JSON in the arguments, brackets and quotes in strings say, could end a call early."""
    key = "arguments" if style is HERMES else "parameters"
    body = json.dumps({"name": "now", key: arguments}, indent=indent, ensure_ascii=False)
    output = f"<tool_call>\n{body}\n</tool_call>" if style is HERMES else body
    _, text, [(name, written)] = parse(output, style)
    assert (text, name, json.loads(written)) == ("", "now", arguments)
