"""OpenAI's and vLLM's request bodies as structs: msgspec decodes and validates them and refuses every field they lack.

Fields of those APIs that this version does not do are here too, typed Any: `not_done` refuses them by name, unless
they hold a value that means "off". Fields that OpenAI does not have are marked as extensions; they have vLLM's names.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of all: an unknown field is an error, not ignored."""


class ContentPart(Strict, kw_only=True):
    """A part of a message's content; only text is served."""

    type: str
    text: str | msgspec.UnsetType = msgspec.UNSET
    refusal: Any = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    prompt_cache_breakpoint: Any = None


class CalledFunction(Strict, kw_only=True):
    """`function` of a message's tool call; `arguments` is a JSON object as text."""

    name: str
    arguments: str


class MessageToolCall(Strict, kw_only=True):
    """A call that an assistant's message made. Streams' `index` may be left in it."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None


class ChatMessage(Strict, kw_only=True):
    """A message as clients write it, and as they send back the assistant's own."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    # Extension: an assistant's own thoughts, sent back.
    reasoning_content: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None


class FunctionDefinition(Strict, kw_only=True):
    """`function` of a tool; `parameters` is the JSON Schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(Strict, kw_only=True):
    """One of `tools`."""

    type: str
    function: FunctionDefinition | None = None
    custom: Any = None


class ChosenFunction(Strict, kw_only=True):
    """The name of a tool."""

    name: str


class ChosenTool(Strict, kw_only=True):
    """A tool by its name."""

    type: str
    function: ChosenFunction | None = None


class AllowedTools(Strict, kw_only=True):
    """`allowed_tools` of `tool_choice`."""

    mode: Literal["auto", "required"]
    tools: list[ChosenTool]


class ToolChoiceObject(Strict, kw_only=True):
    """`tool_choice` where it names tools."""

    type: str
    function: ChosenFunction | None = None
    allowed_tools: AllowedTools | None = None
    custom: Any = None


class JsonSchema(Strict, kw_only=True):
    """`response_format.json_schema`. The schema is enforced whether or not `strict` is set."""

    name: str
    schema: dict[str, Any]
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Strict, kw_only=True):
    """`response_format`."""

    type: str
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict, kw_only=True):
    """`structured_outputs`: exactly one of the first five. `json` is a JSON Schema, as an object or as text."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    whitespace_pattern: Any = None
    disable_fallback: Any = None
    disable_any_whitespace: Any = None
    disable_additional_properties: Any = None


class StreamOptions(Strict, kw_only=True):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: Any = None
    continuous_usage_stats: Any = None


class Body(Strict, kw_only=True):
    """What chat and completions have in common."""

    model: str
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # Extensions.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    # Labels for the sender's own books: they change nothing, as with OpenAI.
    user: str | None = None
    metadata: dict[str, str] | None = None
    # Off, or refused.
    add_special_tokens: Any = None
    allowed_token_ids: Any = None
    early_stopping: Any = None
    guided_decoding_backend: Any = None
    guided_whitespace_pattern: Any = None
    include_stop_str_in_output: Any = None
    kv_transfer_params: Any = None
    length_penalty: Any = None
    logits_processors: Any = None
    mm_processor_kwargs: Any = None
    request_id: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None
    skip_special_tokens: Any = None
    spaces_between_special_tokens: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None
    vllm_xargs: Any = None


class ChatBody(Body, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoiceObject | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    # Extensions.
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    # Hints and labels that change no answer.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Off, or refused.
    audio: Any = None
    chat_template: Any = None
    documents: Any = None
    echo: Any = None
    function_call: Any = None
    functions: Any = None
    include_reasoning: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    store: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionBody(Body, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    # Off, or refused.
    best_of: Any = None
    suffix: Any = None


class TokenizeBody(Strict, kw_only=True):
    """POST /tokenize, as vLLM has it: of `prompt`, or of `messages` through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: list[ToolDefinition] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Any = None
    mm_processor_kwargs: Any = None


class DetokenizeBody(Strict, kw_only=True):
    """POST /detokenize, as vLLM has it."""

    model: str | None = None
    tokens: list[int]
