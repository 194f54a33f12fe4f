"""A conversation to the text of a prompt, through the model's own chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire.service.errors import InvalidRequestError, ModelError

# OpenAI renamed "system" to "developer" for its newer models; templates know the old name.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}

# What a client may not set as a template's variable: it would take the place of what the gateway says.
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})

# Stands at the end of a message that is to be continued: where it comes out, the prompt ends.
_CUT = "\ufdd0quire-cut\ufdd0"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant's message made; templates want the arguments as an object."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `tool_call_id` is the call that a message of role "tool" answers."""

    role: str
    content: str
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    reasoning_content: str = ""


class _TemplateRefusalError(Exception):
    """A template called raise_exception: it does not take this conversation."""


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks, for training, what the assistant writes; here it does nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A Jinja template as Hugging Face's models carry it, run in a sandbox. Raises ModelError if it can't be parsed.

    Templates see `messages`, `tools`, `bos_token`, `eos_token`, `add_generation_prompt`, and the functions and settings
    that https://huggingface.co/docs/transformers/chat_templating promises them. `source` is the template's text and
    `variables` are all names that it looks up.
    """

    def __init__(self, source: str, *, bos_token: str | None, eos_token: str | None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the model's chat template is wrong at line {error.lineno}: {error.message}") from error
        self.source = source
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt that asks the assistant for its next message, or for the rest of the last one.

        `tools` are OpenAI's objects. `variables` are the template's own settings, such as `enable_thinking`. Raises
        InvalidRequestError that names `messages`, one of them, or the argument at fault.
        """
        if not messages:
            raise InvalidRequestError("messages is empty: send at least one message", field="messages")
        for name in variables or {}:
            if name in _RESERVED:
                raise InvalidRequestError(
                    f"chat_template_kwargs.{name} is not a setting: leave it out", field=f"chat_template_kwargs.{name}"
                )
        if continue_final_message:
            messages = [*messages[:-1], replace(messages[-1], content=messages[-1].content + _CUT)]
        text = self._render(
            {
                **self._tokens,
                **(variables or {}),
                "messages": [_turn(index, message) for index, message in enumerate(messages)],
                "tools": list(tools) or None,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        if not continue_final_message:
            return text
        before, cut, _ = text.rpartition(_CUT)
        if not cut:
            raise InvalidRequestError(
                "continue_final_message is set and the model's chat template does not show the last message: send it "
                "as the assistant's",
                field="continue_final_message",
            )
        return before

    def _render(self, context: Mapping[str, Any]) -> str:
        try:
            return self._template.render(context)
        except _TemplateRefusalError as error:
            reason = str(error)
        # What else a template can fail with depends on what it does with the messages: most expect some order of
        # roles or some field, and stumble where it is not there.
        except (
            *(jinja2.TemplateError, TypeError, ValueError, LookupError),
            *(ArithmeticError, AttributeError, RecursionError),
        ) as error:
            reason = f"it failed ({type(error).__name__}: {error})"
        raise InvalidRequestError(f"the model's chat template does not take these messages: {reason}", field="messages")


def _turn(index: int, message: Message) -> dict[str, Any]:
    """What templates see of a message; what it does not have is absent, as they test for it."""
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidRequestError(
            f"messages[{index}].role is {message.role!r}: it must be one of {', '.join(_ROLES)}",
            field=f"messages[{index}].role",
        )
    turn: dict[str, Any] = {"role": role, "content": message.content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if value := getattr(message, name):
            turn[name] = value
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.tool_calls
        ]
    return turn


def _raise_exception(message: str) -> NoReturn:
    raise _TemplateRefusalError(message)


def _strftime_now(style: str) -> str:
    return datetime.now().strftime(style)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes for HTML; a prompt is not HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
