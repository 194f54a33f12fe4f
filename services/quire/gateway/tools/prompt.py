"""A conversation with tools for a chat template that knows none: tools, calls and results as text, in Hermes' form.

Models whose templates know tools are told by them. For the others this says in the system message what Hermes' and
Qwen's templates say there (https://github.com/NousResearch/Hermes-Function-Calling).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from quire.gateway.tools.choice import Tool
from quire.gateway.tools.parser import HERMES_CLOSE, HERMES_OPEN
from quire.service.chat import Message

_INSTRUCTION = """You may call functions to answer. Their signatures, as JSON:
<tools>
{tools}
</tools>
For each call, write a JSON object with the function's name and its arguments between tags:
{open}
{{"name": <function name>, "arguments": <arguments object>}}
{close}"""


def with_tools_as_text(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """`messages` with nothing in them but text, and `tools` in the system message."""
    turns = [_turn(message) for message in messages]
    if not tools:
        return turns
    definitions = "\n".join(json.dumps(tool.definition, ensure_ascii=False) for tool in tools)
    instruction = _INSTRUCTION.format(tools=definitions, open=HERMES_OPEN, close=HERMES_CLOSE)
    if turns and turns[0].role in ("system", "developer"):
        return [replace(turns[0], content=f"{turns[0].content}\n\n{instruction}"), *turns[1:]]
    return [Message("system", instruction), *turns]


def _turn(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
    if not message.tool_calls:
        return message
    calls = []
    for call in message.tool_calls:
        body = json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
        calls.append(f"{HERMES_OPEN}\n{body}\n{HERMES_CLOSE}")
    return replace(message, content="\n".join([*filter(None, [message.content]), *calls]), tool_calls=())
