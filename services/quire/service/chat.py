"""A conversation to the text of a prompt, through the model's own chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire.service.errors import InternalError, InvalidRequestError, ModelError

# OpenAI renamed "system" to "developer" for its newer models; templates know the old name.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


class _TemplateRefusalError(Exception):
    """A template called raise_exception: it does not take this conversation."""


class ChatTemplate:
    """A Jinja template as Hugging Face's models carry it, run in a sandbox. Raises ModelError if it can't be parsed.

    Templates see `messages`, `bos_token`, `eos_token`, `add_generation_prompt`, and the functions and settings that
    https://huggingface.co/docs/transformers/chat_templating promises them.
    """

    def __init__(self, source: str, *, bos_token: str | None, eos_token: str | None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the model's chat template is wrong at line {error.lineno}: {error.message}") from error
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that asks the assistant for its next message.

        Raises InvalidRequestError that names `messages` or one of them, InternalError if the template itself fails.
        """
        turns = [
            {"role": _template_role(index, message), "content": message.content}
            for index, message in enumerate(messages)
        ]
        if not turns:
            raise InvalidRequestError("messages is empty: send at least one message", field="messages")
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self._tokens)
        except _TemplateRefusalError as error:
            raise InvalidRequestError(
                f"the model's chat template does not take these messages: {error}", field="messages"
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise InternalError(f"the model's chat template failed: {error}") from error


def _template_role(index: int, message: Message) -> str:
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidRequestError(
            f"messages[{index}].role is {message.role!r}: it must be one of {', '.join(_ROLES)}",
            field=f"messages[{index}].role",
        )
    return role


def _raise_exception(message: str) -> NoReturn:
    raise _TemplateRefusalError(message)


def _strftime_now(style: str) -> str:
    return datetime.now().strftime(style)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes for HTML; a prompt is not HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
