"""OpenAI's bodies to what the core understands. Whatever is wrong becomes an InvalidRequestError that names the field.

The HTTP routes call the `parse_…` functions with the raw body.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec

from quire.gateway.model import Conversation, Prompt
from quire.gateway.openai import not_done
from quire.gateway.openai.constraints import read_constraint
from quire.gateway.openai.messages import read_messages, read_tools
from quire.gateway.openai.types import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from quire.gateway.options import Options
from quire.service.errors import InvalidRequestError, QuireError

MAX_PROMPTS = 128

_VALIDATION_ERROR = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?", re.DOTALL)
_NAMED_FIELD = re.compile(r"Object (?P<problem>contains unknown|missing required) field `(?P<name>.*)`", re.DOTALL)

_chat_decoder = msgspec.json.Decoder(ChatBody)
_completion_decoder = msgspec.json.Decoder(CompletionBody)
_tokenize_decoder = msgspec.json.Decoder(TokenizeBody)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeBody)

B = TypeVar("B", ChatBody, CompletionBody, TokenizeBody, DetokenizeBody)


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """A parsed body. There are `options.n` choices per prompt; a chat has one prompt."""

    model: str
    prompts: tuple[Prompt, ...]
    options: Options
    stream: bool
    include_usage: bool
    # The client's names of fields, where it had a choice.
    aliases: Mapping[str, str] = field(default_factory=dict)

    def in_its_terms(self, error: QuireError) -> QuireError:
        """`error` with the client's name of the field at fault."""
        return _renamed(error, self.aliases)


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """A parsed body of /tokenize. `special_tokens` None: as for a generation."""

    model: str | None
    prompt: Prompt
    special_tokens: bool | None
    token_strings: bool


def parse_chat(raw: bytes) -> ApiRequest:
    """The body of POST /v1/chat/completions."""
    body = _decode(_chat_decoder, ChatBody, raw)
    not_done.refuse(body, not_done.IN_BODIES)
    not_done.refuse(body, not_done.IN_CHATS)
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
    if body.top_logprobs is not None:
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequestError(
                f"top_logprobs is {body.top_logprobs} and logprobs is not set: set logprobs to true",
                field="top_logprobs",
            )
        aliases["logprobs"] = "top_logprobs"
    tools = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    conversation = replace(_conversation(body), tools=tools, reasoning_effort=body.reasoning_effort)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _api_request(body, (conversation,), max_tokens, logprobs, aliases)


def parse_completion(raw: bytes) -> ApiRequest:
    """The body of POST /v1/completions."""
    body = _decode(_completion_decoder, CompletionBody, raw)
    not_done.refuse(body, not_done.IN_BODIES)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequestError(
            f"best_of is {not_done.shown(body.best_of)}, which is not supported: set n and choose yourself",
            field="best_of",
        )
    request = _api_request(body, _prompts(body.prompt), body.max_tokens, body.logprobs, {}, echo=bool(body.echo))
    choices = len(request.prompts) * request.options.n
    if choices > MAX_PROMPTS:
        raise InvalidRequestError(
            f"n is {request.options.n} and prompt holds {len(request.prompts)}, together {choices} choices: ask for at "
            f"most {MAX_PROMPTS}",
            field="n",
        )
    return request


def parse_tokenize(raw: bytes) -> TokenizeRequest:
    """The body of POST /tokenize."""
    body = _decode(_tokenize_decoder, TokenizeBody, raw)
    not_done.refuse(body, not_done.IN_TOKENIZE)
    if (body.prompt is None) == (body.messages is None):
        problem = "both set" if body.prompt is not None else "both missing"
        raise InvalidRequestError(f"prompt and messages are {problem}: give one of them", field="prompt")
    prompt: Prompt
    if body.prompt is not None:
        for name in ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"):
            if getattr(body, name) is not None:
                raise InvalidRequestError(f"{name} is set and messages is not: leave it out", field=name)
        prompt = body.prompt
    else:
        prompt = replace(_conversation(body), tools=read_tools(body.tools, None, None))
    return TokenizeRequest(body.model, prompt, body.add_special_tokens, bool(body.return_token_strs))


def parse_detokenize(raw: bytes) -> DetokenizeBody:
    """The body of POST /detokenize."""
    return _decode(_detokenize_decoder, DetokenizeBody, raw)


def _conversation(body: ChatBody | TokenizeBody) -> Conversation:
    add, go_on = body.add_generation_prompt, bool(body.continue_final_message)
    if go_on and add:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt are both set: they exclude each other",
            field="continue_final_message",
        )
    return Conversation(
        read_messages(body.messages or ()),
        variables=body.chat_template_kwargs or {},
        add_generation_prompt=not go_on if add is None else add,
        continue_final_message=go_on,
    )


def _api_request(
    body: Body,
    prompts: tuple[Prompt, ...],
    max_tokens: int | None,
    logprobs: int | None,
    aliases: Mapping[str, str],
    *,
    echo: bool = False,
) -> ApiRequest:
    stream = bool(body.stream)
    _check_stream_options(body)
    if body.prompt_logprobs is not None and stream:
        raise InvalidRequestError(
            "prompt_logprobs is set and so is stream: they come only with a whole answer", field="prompt_logprobs"
        )
    constraint, constraint_field = read_constraint(body)
    try:
        options = Options(
            n=1 if body.n is None else body.n,
            max_tokens=max_tokens,
            min_tokens=body.min_tokens or 0,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            min_p=body.min_p,
            seed=body.seed,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            logit_bias=_logit_bias(body.logit_bias or {}),
            bad_words=tuple(body.bad_words or ()),
            stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            constraint=constraint,
            constraint_field=constraint_field,
            logprobs=logprobs,
            prompt_logprobs=body.prompt_logprobs,
            echo=echo,
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
        )
    except InvalidRequestError as error:
        raise _renamed(error, aliases) from error
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return ApiRequest(body.model, prompts, options, stream, include_usage, aliases)


def _check_stream_options(body: Body) -> None:
    if body.stream_options is None:
        return
    if not body.stream:
        raise InvalidRequestError(
            "stream_options is set and stream is not: set stream to true or leave stream_options out",
            field="stream_options",
        )
    not_done.refuse(body.stream_options, not_done.IN_STREAM_OPTIONS, "stream_options.")


def _logit_bias(biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    for token_id in biases:
        if not token_id.isdecimal() or len(token_id) > 10:
            raise InvalidRequestError(
                f"logit_bias has the key {token_id[:40]!r}: keys are token ids", field="logit_bias"
            )
    return tuple((int(token_id), bias) for token_id, bias in biases.items())


def _renamed(error: QuireError, aliases: Mapping[str, str]) -> QuireError:
    # The contracts between the services nest what OpenAI's clients have side by side.
    name = re.sub(r"^(sampling|stop)\.", "", error.field).replace("cache_key.salt", "cache_salt")
    name = aliases.get(name, name)
    if name == error.field:
        return error
    return type(error)(re.sub(rf"\b{re.escape(error.field)}\b", name, error.message), field=name)


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


def _validation_error(text: str, body_type: type[msgspec.Struct]) -> InvalidRequestError:
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
