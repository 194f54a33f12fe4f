"""OpenAI's request bodies as structs: msgspec decodes and validates them and refuses every field they don't have.

Fields of the OpenAI API that this version does not do are here too, typed Any: `requests` refuses them by name, unless
they hold a value that means "off". Fields that OpenAI does not have are marked as extensions.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class _Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class Part(_Strict):
    """A part of a message's content; only text is served."""

    type: str
    text: str | msgspec.UnsetType = msgspec.UNSET
    refusal: Any = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    prompt_cache_breakpoint: Any = None


class ChatMessage(_Strict):
    """A message as clients write it, and as they send back the assistant's own."""

    role: str
    content: str | list[Part] | None = None
    name: Any = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None


class JsonSchema(_Strict):
    """`response_format.json_schema`. The schema is enforced whether or not `strict` is set."""

    name: str
    schema: dict[str, Any]
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(_Strict):
    """`response_format`."""

    type: str
    json_schema: JsonSchema | None = None


class StreamOptions(_Strict):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: Any = None


class Body(_Strict):
    """What chat and completions have in common."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # Extensions.
    top_k: int | None = None
    regex: str | None = None
    grammar: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    # Labels for the sender's own books: they change nothing, as with OpenAI.
    user: str | None = None
    metadata: dict[str, str] | None = None
    # Off, or refused.
    n: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None


class ChatBody(Body, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    service_tier: Literal["auto", "default"] | None = None
    # Hints and labels that change no answer.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    # Off, or refused.
    store: Any = None
    top_logprobs: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionBody(Body, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    # Off, or refused.
    best_of: Any = None
    echo: Any = None
    suffix: Any = None
