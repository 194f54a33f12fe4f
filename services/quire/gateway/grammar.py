"""The one constraint of an output that may think, call tools and answer, each in a form of its own.

`core` composes it for every request that needs it. It is a grammar in Lark's syntax as llguidance reads it, with the
client's schemas and grammars embedded (https://github.com/guidance-ai/llguidance, docs/syntax.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from quire.gateway.reasoning import CLOSE, OPEN, Thinking
from quire.gateway.tools.choice import ToolChoice, ToolFormat
from quire.gateway.tools.parser import HERMES_CLOSE, HERMES_OPEN
from quire.service.errors import InvalidRequestError
from quire.service.request import Constraint, ConstraintKind

# The blanks that a JSON constraint allows by itself; embedded, a schema has to say so.
_JSON_BLANKS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}

# A tag as Lark writes it: a string, or a special token's id.
Literal = Callable[[str], str]


def compose(
    constraint: Constraint | None,
    thinking: Thinking,
    choice: ToolChoice,
    tool_format: ToolFormat,
    literal: Literal,
) -> Constraint | None:
    """What holds an output to `constraint`, to calls that match their tools' schemas, or to either.

    Thoughts come before and are free. `literal` gives a tag's form for the model's tokenizer. None: nothing is held.
    Raises InvalidRequestError if a schema that has to be embedded is no JSON.
    """
    enforced = bool(choice.tools) and (choice.enforced or constraint is not None)
    if constraint is None and not enforced:
        return None
    if not enforced and thinking is Thinking.NEVER:
        return constraint
    rules = _thought_rules(thinking, literal)
    body = []
    if enforced:
        body.append("calls")
        rules += _call_rules(choice, tool_format, literal)
    if constraint is not None and not choice.required:
        body.append("answer")
        rules.append(f"answer: {_embedded(constraint)}")
    if constraint is None and not choice.required:
        rules += _free_text_rules(choice, tool_format, literal)
        body.append("free")
    start = {Thinking.NEVER: "body", Thinking.TAGGED: "(think BLANKS?)? body", Thinking.OPENED: "thought BLANKS? body"}
    rules = [f"start: {start[thinking]}", f"body: {' | '.join(body)}", *rules]
    return Constraint(ConstraintKind.LARK, "\n".join(rules) + "\n")


def _thought_rules(thinking: Thinking, literal: Literal) -> list[str]:
    if thinking is Thinking.NEVER:
        return []
    close = literal(CLOSE)
    rules = [r"BLANKS: /\s+/"]
    if close.startswith("<"):
        rules.append(f"thought: /(?s:.*)/ {close}")
    else:
        rules.append(f"thought[suffix={close}]: /(?s:.*)/")
    return [*rules, f"think: {literal(OPEN)} thought"] if thinking is Thinking.TAGGED else rules


def _call_rules(choice: ToolChoice, tool_format: ToolFormat, literal: Literal) -> list[str]:
    more = choice.max_calls - 1
    repeated = f" (SEPARATOR call){{0,{more}}}" if more else ""
    if tool_format is ToolFormat.HERMES:
        rules = [f'call: {literal(HERMES_OPEN)} "\\n" function "\\n" {literal(HERMES_CLOSE)}']
        separator, key = "\n", "arguments"
    else:
        rules = ["call: function"]
        separator, key = "; ", "parameters"
    if more:
        rules.append(f"SEPARATOR: {json.dumps(separator)}")
    rules.append(f"calls: call{repeated}")
    functions = []
    for index, tool in enumerate(choice.tools):
        held = tool.strict or choice.required
        head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "{key}": ')
        functions.append(f"function_{index}")
        rules.append(f'function_{index}: {head} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: {_json(tool.parameters if held and tool.parameters is not None else {})}")
    rules.append(f"function: {' | '.join(functions)}")
    return rules


def _free_text_rules(choice: ToolChoice, tool_format: ToolFormat, literal: Literal) -> list[str]:
    """Text in which no call begins, or text and calls that end it."""
    if tool_format is ToolFormat.LLAMA3_JSON:
        return [r"free: /\s*[^{\s](?s:.*)/"]
    opening = literal(HERMES_OPEN)
    if opening.startswith("<"):
        # A special token is no part of any text.
        return ["free: /(?s:.+)/ calls?"]
    more = f" (SEPARATOR call){{0,{choice.max_calls - 1}}}" if choice.max_calls > 1 else ""
    return [
        f'free: TEXT | text_to_call "\\n" function "\\n" {literal(HERMES_CLOSE)}{more}',
        f"TEXT: /(?s:.+)/ & ~/(?s:.*){HERMES_OPEN}(?s:.*)/",
        f"text_to_call[suffix={opening}]: /(?s:.*)/",
    ]


def _embedded(constraint: Constraint) -> str:
    match constraint.kind:
        case ConstraintKind.JSON_OBJECT:
            return _json({})
        case ConstraintKind.JSON_SCHEMA:
            return _json(_parsed(constraint.source), any_type=True)
        case ConstraintKind.REGEX:
            return f"%lark {{\nstart: /{_slashed(constraint.source)}/\n}}"
        case ConstraintKind.LARK:
            return f"%lark {{\n{constraint.source}\n}}"


def _json(schema: Mapping[str, Any], *, any_type: bool = False) -> str:
    typed = dict(schema) if any_type else {"type": "object", **schema}
    return f"%json {json.dumps({**typed, 'x-guidance': _JSON_BLANKS})}"


def _parsed(source: str) -> dict[str, Any]:
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"constraint.json_schema is not JSON: {error}", field="constraint.json_schema"
        ) from error
    if not isinstance(schema, dict):
        raise InvalidRequestError(
            'constraint.json_schema is no JSON object: a schema looks like {"type": "object"}',
            field="constraint.json_schema",
        )
    return schema


def _slashed(pattern: str) -> str:
    """`pattern` as it may stand between slashes."""
    return re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", pattern, flags=re.DOTALL).replace("\n", r"\n")
