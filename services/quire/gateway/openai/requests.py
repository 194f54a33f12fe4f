"""OpenAI's bodies to what the core understands. Whatever is wrong becomes an InvalidRequestError that names the field.

`http` calls `parse_chat` and `parse_completion` with the raw body.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from quire.gateway.model import Conversation, Prompt
from quire.gateway.openai.types import Body, ChatBody, ChatMessage, CompletionBody, Part
from quire.gateway.options import Options
from quire.service.chat import Message
from quire.service.errors import InvalidRequestError, QuireError
from quire.service.request import Constraint, ConstraintKind

MAX_PROMPTS = 128

_SCHEMA_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_VALIDATION_ERROR = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?", re.DOTALL)
_NAMED_FIELD = re.compile(r"Object (?P<problem>contains unknown|missing required) field `(?P<name>.*)`", re.DOTALL)

# Fields that are known and not done: the values that mean "off", which pass, and what to do about all others.
_NOT_DONE: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "send the request several times"),
    "best_of": ((1,), "send the request several times and choose"),
    "logprobs": ((False,), "leave it out: log probabilities are not returned"),
    "top_logprobs": ((0,), "leave it out: log probabilities are not returned"),
    "logit_bias": (({},), "leave it out, or constrain the output with response_format, regex or grammar"),
    "presence_penalty": ((0, 0.0), "set it to 0"),
    "frequency_penalty": ((0, 0.0), "set it to 0"),
    "echo": ((False,), "put the prompt in front of the text yourself"),
    "suffix": (("",), "leave it out: text is generated only at the end"),
    "store": ((False,), "set it to false: nothing is stored"),
    "tools": (([],), "leave it out, or describe the answer you need in response_format"),
    "tool_choice": (("none", "auto"), "leave it out: tools are not supported"),
    "functions": (([],), "leave it out, or describe the answer you need in response_format"),
    "function_call": (("none", "auto"), "leave it out: functions are not supported"),
    "modalities": ((["text"],), 'set it to ["text"]'),
    "audio": ((), "leave it out: the answer is text"),
    "moderation": ((), "leave it out: nothing is moderated"),
    "prediction": ((), "leave it out"),
    "prompt_cache_options": ((), "leave it out: prompts are always cached; cache_salt keeps them apart"),
    "prompt_cache_retention": (("in_memory",), "leave it out: prompts are cached as long as there is room"),
    "reasoning_effort": (("none",), "leave it out: reasoning can't be controlled"),
    "verbosity": (("medium",), "leave it out, or ask for it in the prompt"),
    "web_search_options": ((), "leave it out: the model searches nothing"),
    "include_obfuscation": ((False,), "set it to false: nothing is added to the stream"),
}

# The same for the fields of a message and of its content's parts.
_NOT_DONE_IN_MESSAGES: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "name": ((), "put the name into content"),
    "refusal": ((), "put it into content"),
    "annotations": (([],), "leave it out"),
    "audio": ((), "leave it out: only text is supported"),
    "function_call": ((), "leave it out: functions are not supported"),
    "tool_calls": (([],), "leave it out: tools are not supported"),
    "tool_call_id": ((), "leave it out: tools are not supported"),
    "prompt_cache_breakpoint": ((), "leave it out: every page of a prompt is cached"),
}

# What the contracts between the services call a field, and what OpenAI's clients call it.
_PARAMS = {
    "constraint": "response_format",
    "constraint.json_schema": "response_format.json_schema.schema",
    "constraint.json_object": "response_format",
    "constraint.regex": "regex",
    "constraint.lark": "grammar",
    "cache_key.salt": "cache_salt",
    "sampling.temperature": "temperature",
    "sampling.top_p": "top_p",
    "sampling.top_k": "top_k",
    "sampling.seed": "seed",
    "stop.max_tokens": "max_tokens",
}

_chat_decoder = msgspec.json.Decoder(ChatBody)
_completion_decoder = msgspec.json.Decoder(CompletionBody)

B = TypeVar("B", bound=Body)


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """A parsed body. There is one choice per prompt; a chat has one."""

    model: str
    prompts: tuple[Prompt, ...]
    options: Options
    stream: bool
    include_usage: bool
    # The client's names of fields, where it had a choice.
    aliases: Mapping[str, str] = field(default_factory=dict)

    def in_its_terms(self, error: QuireError) -> QuireError:
        """`error` with the client's name of the field at fault."""
        name = _PARAMS.get(error.field, error.field)
        name = self.aliases.get(name, name)
        if name == error.field:
            return error
        return type(error)(re.sub(rf"\b{re.escape(error.field)}\b", name, error.message), field=name)


def parse_chat(raw: bytes) -> ApiRequest:
    """The body of POST /v1/chat/completions."""
    body = _decode(_chat_decoder, ChatBody, raw)
    _refuse_what_is_not_done(body, _NOT_DONE)
    aliases = {}
    max_tokens = body.max_tokens
    if body.max_completion_tokens is not None:
        if max_tokens not in (None, body.max_completion_tokens):
            raise InvalidRequestError(
                f"max_tokens is {max_tokens} and max_completion_tokens {body.max_completion_tokens}: they mean the "
                "same, give one",
                field="max_tokens",
            )
        max_tokens = body.max_completion_tokens
        aliases["max_tokens"] = "max_completion_tokens"
    messages = tuple(_message(f"messages[{index}]", message) for index, message in enumerate(body.messages))
    return _api_request(body, (Conversation(messages),), max_tokens, aliases)


def parse_completion(raw: bytes) -> ApiRequest:
    """The body of POST /v1/completions."""
    body = _decode(_completion_decoder, CompletionBody, raw)
    _refuse_what_is_not_done(body, _NOT_DONE)
    return _api_request(body, _prompts(body.prompt), body.max_tokens, {})


def _api_request(
    body: Body, prompts: tuple[Prompt, ...], max_tokens: int | None, aliases: Mapping[str, str]
) -> ApiRequest:
    stream = bool(body.stream)
    if body.stream_options is not None:
        if not stream:
            raise InvalidRequestError(
                "stream_options is set and stream is not: set stream to true or leave stream_options out",
                field="stream_options",
            )
        _refuse_what_is_not_done(body.stream_options, _NOT_DONE, "stream_options.")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    try:
        options = Options(
            max_tokens=max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            seed=body.seed,
            stop=stop,
            constraint=_constraint(body),
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
        )
    except InvalidRequestError as error:
        name = aliases.get(error.field, error.field)
        raise InvalidRequestError(error.message.replace(error.field, name, 1), field=name) from error
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return ApiRequest(body.model, prompts, options, stream, include_usage, aliases)


def _decode(decoder: msgspec.json.Decoder[B], body_type: type[B], raw: bytes) -> B:
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise _validation_error(str(error), body_type) from error
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the body is not valid UTF-8: {error}") from error
    except RecursionError as error:
        raise InvalidRequestError("the body is nested too deeply: flatten it") from error


def _validation_error(text: str, body_type: type[Body]) -> InvalidRequestError:
    """msgspec writes "Expected `int`, got `str` - at `$.max_tokens`"."""
    match = _VALIDATION_ERROR.fullmatch(text)
    what, path = (match["what"], match["path"] or "") if match else (text, "")
    named = _NAMED_FIELD.fullmatch(what)
    if named is None:
        where = path or "the body"
        return InvalidRequestError(f"{where}: {what[:1].lower()}{what[1:]}", field=path)
    name = f"{path}.{named['name']}" if path else named["name"]
    if named["problem"] == "missing required":
        return InvalidRequestError(f"{name} is missing: set it", field=name)
    known = () if path else body_type.__struct_fields__
    close = difflib.get_close_matches(named["name"], known, n=1)
    advice = f"did you mean {close[0]}?" if close else "leave it out"
    return InvalidRequestError(f"{name} is not a field that this server knows: {advice}", field=name)


def _refuse_what_is_not_done(
    struct: msgspec.Struct, not_done: Mapping[str, tuple[tuple[Any, ...], str]], inside: str = ""
) -> None:
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if value is None or name not in not_done:
            continue
        off, advice = not_done[name]
        # True is not 1 here.
        if not any(type(value) is type(passing) and value == passing for passing in off):
            shown = msgspec.json.encode(value).decode()
            shown = shown if len(shown) <= 40 else f"{shown[:40]}…"
            raise InvalidRequestError(
                f"{inside}{name} is {shown}, which is not supported: {advice}", field=inside + name
            )


def _message(where: str, message: ChatMessage) -> Message:
    _refuse_what_is_not_done(message, _NOT_DONE_IN_MESSAGES, f"{where}.")
    if message.role in ("tool", "function"):
        raise InvalidRequestError(
            f"{where}.role is {message.role!r}, which is not supported: put the result into a user message",
            field=f"{where}.role",
        )
    if message.content is None:
        raise InvalidRequestError(f"{where}.content is missing: set it to a text", field=f"{where}.content")
    if isinstance(message.content, str):
        return Message(message.role, message.content)
    parts = [_part(f"{where}.content[{index}]", part) for index, part in enumerate(message.content)]
    return Message(message.role, "\n".join(parts))


def _part(where: str, part: Part) -> str:
    if part.type != "text":
        raise InvalidRequestError(
            f"{where}.type is {part.type!r}, which is not supported: this model takes parts of type 'text'",
            field=f"{where}.type",
        )
    for name in ("refusal", "image_url", "input_audio", "file"):
        if getattr(part, name) is not None:
            raise InvalidRequestError(
                f"{where}.{name} does not belong into a part of type 'text'", field=f"{where}.{name}"
            )
    _refuse_what_is_not_done(part, _NOT_DONE_IN_MESSAGES, f"{where}.")
    if part.text is msgspec.UNSET:
        raise InvalidRequestError(f"{where}.text is missing: set it", field=f"{where}.text")
    return part.text


def _prompts(prompt: str | list[str | int | list[int]]) -> tuple[Prompt, ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        raise InvalidRequestError("prompt is an empty list: give a text or token ids", field="prompt")
    if all(isinstance(item, int) for item in prompt):
        return (tuple(item for item in prompt if isinstance(item, int)),)
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequestError(
            f"prompt holds {len(prompt)} prompts: send at most {MAX_PROMPTS} at once", field="prompt"
        )
    texts = [item for item in prompt if isinstance(item, str)]
    if len(texts) == len(prompt):
        return tuple(texts)
    token_lists = [tuple(item) for item in prompt if isinstance(item, list)]
    if len(token_lists) == len(prompt):
        return tuple(token_lists)
    raise InvalidRequestError(
        "prompt mixes texts, token ids and lists: give a text, a list of texts, a list of token ids, or a list of such "
        "lists",
        field="prompt",
    )


def _constraint(body: Body) -> Constraint | None:
    wanted = {
        "response_format": _format_constraint(body),
        "regex": _source_constraint("regex", ConstraintKind.REGEX, body.regex),
        "grammar": _source_constraint("grammar", ConstraintKind.LARK, body.grammar),
    }
    given = [name for name, constraint in wanted.items() if constraint is not None]
    if len(given) > 1:
        raise InvalidRequestError(f"{' and '.join(given)} both constrain the output: give at most one", field=given[-1])
    return wanted[given[0]] if given else None


def _source_constraint(name: str, kind: ConstraintKind, source: str | None) -> Constraint | None:
    if source == "":
        raise InvalidRequestError(f"{name} is empty: leave it out or give one", field=name)
    return None if source is None else Constraint(kind, source)


def _format_constraint(body: Body) -> Constraint | None:
    wanted = body.response_format
    if wanted is None:
        return None
    if wanted.type not in ("text", "json_object", "json_schema"):
        raise InvalidRequestError(
            f"response_format.type is {wanted.type!r}: it must be 'text', 'json_object' or 'json_schema'",
            field="response_format.type",
        )
    schema = wanted.json_schema
    if (schema is not None) != (wanted.type == "json_schema"):
        advice = "set it" if schema is None else "leave it out or set response_format.type to 'json_schema'"
        raise InvalidRequestError(
            f"response_format.json_schema is {'missing' if schema is None else 'set'} and response_format.type is "
            f"{wanted.type!r}: {advice}",
            field="response_format.json_schema",
        )
    if schema is None:
        return Constraint(ConstraintKind.JSON_OBJECT) if wanted.type == "json_object" else None
    if not _SCHEMA_NAME.fullmatch(schema.name):
        raise InvalidRequestError(
            f"response_format.json_schema.name is {schema.name[:80]!r}: use 1 to 64 letters, digits, '_' and '-'",
            field="response_format.json_schema.name",
        )
    return Constraint(ConstraintKind.JSON_SCHEMA, msgspec.json.encode(schema.schema).decode())
