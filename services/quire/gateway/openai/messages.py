"""A body's messages and tools to what chat templates and the core understand. `requests` calls it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from quire.gateway.openai import not_done
from quire.gateway.openai.types import (
    ChatMessage,
    ContentPart,
    MessageToolCall,
    ToolChoiceObject,
    ToolDefinition,
)
from quire.gateway.tools.choice import Tool, ToolChoice
from quire.service.chat import Message, ToolCall
from quire.service.errors import InvalidRequestError

MAX_TOOLS = 128

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_OTHER_PARTS = ("refusal", "image_url", "input_audio", "file")
# What no model here takes: not one of them passes, so there is no limit to set.
_NOT_TAKEN = {"image_url": "images", "input_audio": "audio", "file": "files"}


def read_messages(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """Raises InvalidRequestError that names the message's field."""
    return tuple(_message(f"messages[{index}]", message) for index, message in enumerate(messages))


def read_tools(
    tools: Sequence[ToolDefinition] | None, choice: str | ToolChoiceObject | None, parallel: bool | None
) -> ToolChoice:
    """`tools`, `tool_choice` and `parallel_tool_calls` together. Raises InvalidRequestError."""
    offered = _tools(tools or ())
    if not offered:
        if choice in (None, "none", "auto"):
            return ToolChoice()
        raise InvalidRequestError(
            "tool_choice is set and tools is not: give the tools to choose from", field="tool_choice"
        )
    if choice == "none":
        return ToolChoice()
    required, names = _chosen(choice, offered)
    allowed = tuple(tool for name, tool in offered.items() if names is None or name in names)
    single = isinstance(choice, ToolChoiceObject) and choice.type == "function"
    return ToolChoice(allowed, required, parallel=parallel is not False and not single)


def check_name(where: str, name: str) -> None:
    """Raises InvalidRequestError unless it is a name as OpenAI's API has them."""
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(f"{where} is {name[:80]!r}: use 1 to 64 letters, digits, '_' and '-'", field=where)


def _message(where: str, message: ChatMessage) -> Message:
    not_done.refuse(message, not_done.IN_MESSAGES, f"{where}.")
    role = message.role
    if role == "function":
        raise InvalidRequestError(
            f"{where}.role is 'function', which is not supported: use 'tool' and tool_call_id", field=f"{where}.role"
        )
    for name, owner in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", "tool")):
        if getattr(message, name) and role != owner:
            raise InvalidRequestError(
                f"{where}.{name} is set and {where}.role is {role!r}: it belongs to messages of role {owner!r}",
                field=f"{where}.{name}",
            )
    if role == "tool" and not message.tool_call_id:
        raise InvalidRequestError(
            f"{where}.tool_call_id is missing: set it to the id of the call that this answers",
            field=f"{where}.tool_call_id",
        )
    calls = tuple(
        _tool_call(f"{where}.tool_calls[{index}]", call) for index, call in enumerate(message.tool_calls or ())
    )
    return Message(
        role,
        _content(where, message, required=not calls),
        name=message.name or "",
        tool_calls=calls,
        tool_call_id=message.tool_call_id or "",
        reasoning_content=message.reasoning_content or "",
    )


def _content(where: str, message: ChatMessage, *, required: bool) -> str:
    content = message.content
    if content is None:
        if required:
            raise InvalidRequestError(f"{where}.content is missing: set it to a text", field=f"{where}.content")
        return ""
    if isinstance(content, str):
        return content
    return "\n".join(_part(f"{where}.content[{index}]", part) for index, part in enumerate(content))


def _part(where: str, part: ContentPart) -> str:
    if part.type != "text":
        what = _NOT_TAKEN.get(part.type, "such parts")
        raise InvalidRequestError(
            f"{where}.type is {part.type!r}, which is not supported: the models served here take no {what}, not even "
            "one; send parts of type 'text'",
            field=f"{where}.type",
        )
    for name in _OTHER_PARTS:
        if getattr(part, name) is not None:
            raise InvalidRequestError(
                f"{where}.{name} does not belong into a part of type 'text'", field=f"{where}.{name}"
            )
    not_done.refuse(part, not_done.IN_MESSAGES, f"{where}.")
    if part.text is msgspec.UNSET:
        raise InvalidRequestError(f"{where}.text is missing: set it", field=f"{where}.text")
    return part.text


def _tool_call(where: str, call: MessageToolCall) -> ToolCall:
    field = f"{where}.function.arguments"
    try:
        # A call without arguments comes back with none from some clients.
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"{field} is not the text of a JSON object: {error}", field=field) from error
    return ToolCall(call.id, call.function.name, arguments)


def _tools(definitions: Sequence[ToolDefinition]) -> Mapping[str, Tool]:
    if len(definitions) > MAX_TOOLS:
        raise InvalidRequestError(f"tools holds {len(definitions)}: give at most {MAX_TOOLS}", field="tools")
    tools: dict[str, Tool] = {}
    for index, definition in enumerate(definitions):
        where = f"tools[{index}]"
        _check_function(where, definition.type)
        not_done.refuse(definition, not_done.IN_TOOLS, f"{where}.")
        function = definition.function
        if function is None:
            raise InvalidRequestError(f"{where}.function is missing: set it", field=f"{where}.function")
        check_name(f"{where}.function.name", function.name)
        if function.name in tools:
            raise InvalidRequestError(
                f"{where}.function.name is {function.name!r}, as of another tool: give each a name of its own",
                field=f"{where}.function.name",
            )
        if function.parameters is not None and function.parameters.get("type", "object") != "object":
            raise InvalidRequestError(
                f"{where}.function.parameters.type is {not_done.shown(function.parameters['type'])}: arguments are an "
                "object",
                field=f"{where}.function.parameters.type",
            )
        tools[function.name] = Tool(
            function.name, function.description or "", function.parameters, strict=bool(function.strict)
        )
    return tools


def _chosen(choice: str | ToolChoiceObject | None, offered: Mapping[str, Tool]) -> tuple[bool, frozenset[str] | None]:
    """(whether one must be called, the names of those that may be; None is all)."""
    if not isinstance(choice, ToolChoiceObject):
        return choice == "required", None
    not_done.refuse(choice, not_done.IN_TOOLS, "tool_choice.")
    if choice.type == "allowed_tools":
        allowed = choice.allowed_tools
        if allowed is None or not allowed.tools:
            raise InvalidRequestError(
                "tool_choice.allowed_tools is missing or names no tool: set it", field="tool_choice.allowed_tools"
            )
        names = set()
        for index, tool in enumerate(allowed.tools):
            where = f"tool_choice.allowed_tools.tools[{index}]"
            _check_function(where, tool.type)
            names.add(_offered(where, tool.function.name if tool.function else None, offered))
        return allowed.mode == "required", frozenset(names)
    _check_function("tool_choice", choice.type)
    return True, frozenset({_offered("tool_choice", choice.function.name if choice.function else None, offered)})


def _check_function(where: str, kind: str) -> None:
    if kind != "function":
        raise InvalidRequestError(
            f"{where}.type is {kind!r}, which is not supported: it must be 'function'", field=f"{where}.type"
        )


def _offered(where: str, name: str | None, offered: Mapping[str, Tool]) -> str:
    if name is None or name not in offered:
        problem = "missing" if name is None else f"{name[:80]!r}, which is none of the tools"
        raise InvalidRequestError(
            f"{where}.function.name is {problem}: name one of {', '.join(offered)}", field=f"{where}.function.name"
        )
    return name
