"""OpenAI's answers as structs: what is encoded, and what `/openapi.json` says of it.

Fields that are UNSET are left out, as OpenAI leaves them out; None is a null.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(Struct):
    """Of the prompt's tokens."""

    cached_tokens: int


class CompletionTokensDetails(Struct):
    """Of the tokens that the engine predicted: those that the completion holds, and those that it does not, which are
    not counted in completion_tokens."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageObject(Struct):
    """In tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(Struct):
    """One of the most likely tokens; `bytes` are its text in UTF-8, which may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """`logprobs` of a chat's choice."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(Struct):
    """`logprobs` of a completion's choice: a list of each, token by token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Struct):
    """A token at a place in the prompt, as vLLM shows it."""

    logprob: float
    rank: int | None
    decoded_token: str


# For each prompt token, by token id.
PromptLogprobs = list[dict[str, PromptLogprob] | None]


class FunctionObject(Struct):
    """What is called; `arguments` is JSON as the model wrote it."""

    name: str
    arguments: str


class ToolCallObject(Struct):
    """A call to a tool."""

    id: str
    function: FunctionObject
    type: Literal["function"] = "function"


class AnswerMessage(Struct):
    """The assistant's message."""

    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallObject] | UnsetType = UNSET
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(Struct):
    """One answer to a chat."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Struct):
    """The answer of POST /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageObject
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    object: Literal["chat.completion"] = "chat.completion"


class TextChoice(Struct):
    """One completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class TextCompletion(Struct):
    """The answer of POST /v1/completions."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageObject
    object: Literal["text_completion"] = "text_completion"


class FunctionDelta(Struct):
    """The name comes first and once, the arguments piece by piece."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(Struct):
    """`id` and `type` come first and once."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class MessageDelta(Struct):
    """What is new in the assistant's message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(Struct):
    """What is new in one answer to a chat."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(Struct):
    """An event of a streaming chat."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageObject | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class TextChunkChoice(Struct):
    """What is new in one completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None = None


class TextCompletionChunk(Struct):
    """An event of a streaming completion."""

    id: str
    created: int
    model: str
    choices: list[TextChunkChoice]
    usage: UsageObject | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"


class ErrorObject(Struct):
    """`param` is the request's field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct):
    """Every answer that is no success."""

    error: ErrorObject


class ModelObject(Struct):
    """A name that the served model answers to."""

    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: Literal["quire"] = "quire"


class ModelList(Struct):
    """The answer of GET /v1/models."""

    data: list[ModelObject]
    object: Literal["list"] = "list"


class TokenizeAnswer(Struct):
    """The answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(Struct):
    """The answer of POST /detokenize."""

    prompt: str


class Health(Struct):
    """The answer of GET /health."""

    status: Literal["ok"] = "ok"


class Readiness(Struct):
    """The answer of GET /ready: for each router's address "ready", or why it can't take a request now."""

    status: Literal["ready", "not ready"]
    routers: dict[str, str]
