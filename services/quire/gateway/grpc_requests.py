"""The public contract's requests to what the core understands, and errors back into its names of fields.

What a chat may hold is checked by the same code as OpenAI's bodies.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from google.protobuf.message import Message

from quire.gateway.model import Conversation, Prompt
from quire.gateway.openai import types
from quire.gateway.openai.messages import read_messages, read_tools
from quire.gateway.options import Options
from quire.gateway.tools.choice import ToolChoice
from quire.service.errors import InvalidRequestError, QuireError
from quire.service.wire import constraint_from_proto
from quire.v1 import inference_pb2

_OPTIONS = inference_pb2.GenerationOptions.DESCRIPTOR.fields_by_name

# OpenAI's names of fields to this contract's, which has fewer levels.
_NAMES = (
    (re.compile(r"^(sampling|stop)\.(?=\w)"), ""),
    (re.compile(r"^(messages|tools|tool_choice|continue_final_message)\b"), r"prompt.chat.\1"),
    (re.compile(r"^chat_template_kwargs\b.*"), "prompt.chat.template_settings"),
    (re.compile(r"^prompt\["), "prompt.token_ids.token_ids["),
    (re.compile(r"^tokens\["), "token_ids["),
    (re.compile(r"^(prompt\.chat\..*)\.function\b"), r"\1"),
    (re.compile(r"^(prompt\.chat\.messages\[\d+\]\.reasoning)_content$"), r"\1"),
    (re.compile(r"^(prompt\.chat\.tool_choice)\.(allowed_tools.*|name)$"), r"\1.names"),
    (re.compile(r"^cache_key\.salt$"), "cache_salt"),
)


def read_prompt(prompt: inference_pb2.Prompt) -> Prompt:
    """Raises InvalidRequestError, whose field has OpenAI's name."""
    match prompt.WhichOneof("kind"):
        case "text":
            return prompt.text
        case "token_ids":
            return tuple(prompt.token_ids.token_ids)
        case "chat":
            return _conversation(prompt.chat)
        case _:
            raise InvalidRequestError("prompt is missing: set one of text, token_ids, chat", field="prompt")


def read_options(options: inference_pb2.GenerationOptions, *, stream: bool) -> Options:
    """Raises InvalidRequestError, whose field has its bare name."""
    constraint = constraint_from_proto(options.constraint) if options.HasField("constraint") else None
    if stream and options.HasField("prompt_logprobs"):
        raise InvalidRequestError(
            "prompt_logprobs come only with a whole answer: use Generate", field="prompt_logprobs"
        )
    return Options(
        n=options.n if options.HasField("n") else 1,
        max_tokens=_set(options, "max_tokens"),
        min_tokens=options.min_tokens,
        temperature=_set(options, "temperature"),
        top_p=_set(options, "top_p"),
        top_k=_set(options, "top_k"),
        min_p=_set(options, "min_p"),
        seed=_set(options, "seed"),
        presence_penalty=_set(options, "presence_penalty"),
        frequency_penalty=_set(options, "frequency_penalty"),
        repetition_penalty=_set(options, "repetition_penalty"),
        logit_bias=tuple((entry.token_id, entry.bias) for entry in options.logit_bias),
        bad_words=tuple(options.bad_words),
        stop=tuple(options.stop),
        stop_token_ids=tuple(options.stop_token_ids),
        ignore_eos=options.ignore_eos,
        constraint=constraint,
        constraint_field=f"constraint.{constraint.kind.value}" if constraint else "",
        logprobs=_set(options, "logprobs"),
        prompt_logprobs=_set(options, "prompt_logprobs"),
        priority=options.priority,
        cache_salt=options.cache_salt,
    )


def in_contract_terms(error: QuireError) -> QuireError:
    """`error`, whose field has OpenAI's name or the one between the services, with this contract's."""
    field = error.field
    for pattern, replacement in _NAMES:
        field = pattern.sub(replacement, field)
    if field.partition(".")[0] in _OPTIONS:
        field = f"options.{field}"
    if field == error.field:
        return error
    message = error.message.replace(error.field, field, 1)
    return type(error)(message, field=field, retry_after=error.retry_after)


def _set(options: Message, name: str) -> Any:
    return getattr(options, name) if options.HasField(name) else None


def _conversation(chat: inference_pb2.Chat) -> Conversation:
    return Conversation(
        read_messages([_message(message) for message in chat.messages]),
        _tools(chat),
        _object("chat_template_kwargs", chat.template_settings) if chat.template_settings else {},
        add_generation_prompt=not chat.continue_final_message,
        continue_final_message=chat.continue_final_message,
    )


def _message(message: inference_pb2.ChatMessage) -> types.ChatMessage:
    calls = [
        types.MessageToolCall(id=call.id, function=types.CalledFunction(name=call.name, arguments=call.arguments))
        for call in message.tool_calls
    ]
    return types.ChatMessage(
        role=message.role,
        content=message.content,
        name=message.name or None,
        tool_calls=calls or None,
        tool_call_id=message.tool_call_id or None,
        reasoning_content=message.reasoning or None,
    )


def _tools(chat: inference_pb2.Chat) -> ToolChoice:
    definitions = [
        types.ToolDefinition(
            type="function",
            function=types.FunctionDefinition(
                name=tool.name,
                description=tool.description or None,
                parameters=_object(f"tools[{index}].parameters", tool.parameters) if tool.parameters else None,
                strict=tool.strict,
            ),
        )
        for index, tool in enumerate(chat.tools)
    ]
    if not chat.HasField("tool_choice"):
        return read_tools(definitions, None, None)
    choice = chat.tool_choice
    return read_tools(definitions, _choice(choice.mode, choice.names), not choice.single)


def _choice(mode: inference_pb2.ToolChoiceMode.ValueType, names: Sequence[str]) -> str | types.ToolChoiceObject:
    match mode:
        case inference_pb2.TOOL_CHOICE_MODE_NONE:
            return "none"
        case inference_pb2.TOOL_CHOICE_MODE_AUTO | inference_pb2.TOOL_CHOICE_MODE_REQUIRED:
            word: Literal["auto", "required"] = "auto"
            if mode == inference_pb2.TOOL_CHOICE_MODE_REQUIRED:
                word = "required"
        case _:
            raise InvalidRequestError(
                f"tool_choice.mode is {mode}: it must be NONE, AUTO or REQUIRED", field="tool_choice.mode"
            )
    if not names:
        return word
    tools = [types.ChosenTool(type="function", function=types.ChosenFunction(name=name)) for name in names]
    return types.ToolChoiceObject(type="allowed_tools", allowed_tools=types.AllowedTools(mode=word, tools=tools))


def _object(field: str, text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequestError(f"{field} is not the text of a JSON object: {error}", field=field) from error
