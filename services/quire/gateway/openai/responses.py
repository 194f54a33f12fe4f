"""OpenAI's answers: objects and server-sent events.

A stream sends an event per step, so all of an event but its text is encoded once, when the stream begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from quire.gateway.core import Operation
from quire.gateway.model import ServedModel
from quire.gateway.openai.errors import error_body
from quire.gateway.stream import Result, Usage, total_usage
from quire.service.errors import QuireError
from quire.service.request import FinishReason

DONE = b"data: [DONE]\n\n"

_FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
_ID_PREFIXES = {Operation.CHAT: "chatcmpl-", Operation.TEXT_COMPLETION: "cmpl-"}

# Not line breaks to server-sent events, but to many clients that read them line by line.
_LINE_BREAKS = [(character.encode(), b"\\u%04x" % ord(character)) for character in "\x85\u2028\u2029"]

_encode = msgspec.json.encode


def response_id(operation: Operation, unique: str) -> str:
    """An id as OpenAI's look."""
    return _ID_PREFIXES[operation] + unique


def finish_reason(result: Result) -> str:
    """OpenAI's name of how an output ended."""
    return _FINISH_REASONS[result.finish_reason]


class Events:
    """One answer as server-sent events. `created` is in Unix seconds; `index` numbers the choices."""

    def __init__(
        self, operation: Operation, *, answer_id: str, model: str, created: int, choices: int, include_usage: bool
    ) -> None:
        self._chat = operation is Operation.CHAT
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        head = _encode({"id": answer_id, "object": kind, "created": created, "model": model})
        self._head = b"data: " + head[:-1] + b',"choices":['
        # OpenAI puts a null usage into every event before the one that has it.
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        before = b'"delta":{"content":' if self._chat else b'"text":'
        after = b'},"logprobs":null,"finish_reason":null}' if self._chat else b',"logprobs":null,"finish_reason":null}'
        self._before_text = [self._head + b'{"index":%d,' % index + before for index in range(choices)]
        self._after_text = after + self._tail

    def begin(self, index: int) -> bytes:
        """The event that opens a choice; completions have none."""
        if not self._chat:
            return b""
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return self._event(choice)

    def text(self, index: int, text: str) -> bytes:
        """The event that carries new text."""
        encoded = _encode(text)
        if not encoded.isascii():
            for raw, escaped in _LINE_BREAKS:
                encoded = encoded.replace(raw, escaped)
        return self._before_text[index] + encoded + self._after_text

    def end(self, index: int, result: Result) -> bytes:
        """The event that closes a choice."""
        content: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        return self._event({"index": index, **content, "logprobs": None, "finish_reason": finish_reason(result)})

    def usage(self, usage: Usage) -> bytes:
        """The last event before DONE, for clients that asked for it."""
        return self._head + b'],"usage":' + _encode(_usage_object(usage)) + b"}\n\n"

    def _event(self, choice: dict[str, Any]) -> bytes:
        return self._head + _encode(choice) + self._tail


def error_event(error: QuireError) -> bytes:
    """The event that ends a stream which can't go on; no DONE follows."""
    return b"data: " + error_body(error) + b"\n\n"


def answer_body(
    operation: Operation,
    *,
    answer_id: str,
    model: str,
    created: int,
    texts: Sequence[str],
    results: Sequence[Result],
) -> bytes:
    """The whole answer as one object."""
    chat = operation is Operation.CHAT
    choices = []
    for index, (text, result) in enumerate(zip(texts, results, strict=True)):
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
        choices.append({"index": index, **content, "logprobs": None, "finish_reason": finish_reason(result)})
    return _encode(
        {
            "id": answer_id,
            "object": "chat.completion" if chat else "text_completion",
            "created": created,
            "model": model,
            "choices": choices,
            "usage": _usage_object(total_usage(results)),
        }
    )


def model_object(model: ServedModel, name: str, created: int) -> dict[str, Any]:
    """One of the names that `model` answers to."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "quire",
        "max_model_len": model.max_model_len,
    }


def _usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
