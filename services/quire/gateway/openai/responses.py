"""OpenAI's answers: whole ones, and server-sent events.

A stream sends an event per step, so all of an event but its text is encoded once, when the stream begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from msgspec import UNSET

from quire.gateway.answer import Answer
from quire.gateway.deltas import Part, Reasoning, Score, ToolCallArguments, ToolCallStart
from quire.gateway.model import ServedModel
from quire.gateway.openai import answers
from quire.gateway.openai.errors import error_body
from quire.gateway.openai.logprobs import chat_logprobs, prompt_logprobs, text_logprobs
from quire.gateway.output import Generation, Operation
from quire.gateway.stream import Result, Usage, total_usage
from quire.service.errors import QuireError
from quire.service.request import FinishReason
from quire.service.text import Pieces

DONE = b"data: [DONE]\n\n"

_ID_PREFIXES = {Operation.CHAT: "chatcmpl-", Operation.TEXT_COMPLETION: "cmpl-"}

# Not line breaks to server-sent events, but to many clients that read them line by line.
_LINE_BREAKS = [(character.encode(), b"\\u%04x" % ord(character)) for character in "\x85\u2028\u2029"]

_encode = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class Head:
    """What all parts of an answer have in common. `model` is what the client called it; `created` is Unix time."""

    operation: Operation
    id: str
    model: str
    created: int


def response_id(operation: Operation, unique: str) -> str:
    """An id as OpenAI's look."""
    return _ID_PREFIXES[operation] + unique


def finish_reason(result: Result) -> answers.FinishReason:
    """OpenAI's name of how an output ended."""
    if result.finish_reason is FinishReason.LENGTH:
        return "length"
    return "tool_calls" if result.calls else "stop"


class Events:
    """One answer as server-sent events. `index` numbers the choices; `scores` are the tokens that come with a part."""

    def __init__(self, head: Head, pieces: Pieces, *, choices: int, include_usage: bool) -> None:
        self._chat = head.operation is Operation.CHAT
        self._pieces = pieces
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        encoded = _encode({"id": head.id, "object": kind, "created": head.created, "model": head.model})
        self._head = b"data: " + encoded[:-1] + b',"choices":['
        # OpenAI puts a null usage into every event before the one that has it.
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        before = b'"delta":{"content":' if self._chat else b'"text":'
        after = b'},"logprobs":null,"finish_reason":null}' if self._chat else b',"logprobs":null,"finish_reason":null}'
        opening = [self._head + b'{"index":%d,' % index for index in range(choices)]
        self._before_text = [begin + before for begin in opening]
        self._before_reasoning = [begin + b'"delta":{"reasoning_content":' for begin in opening]
        self._after_text = after + self._tail

    def begin(self, index: int) -> bytes:
        """The event that opens a choice; completions have none."""
        if not self._chat:
            return b""
        return self._event(answers.ChatChunkChoice(index, answers.MessageDelta(role="assistant", content="")))

    def text(self, index: int, text: str) -> bytes:
        """The event that carries new text."""
        return self._before_text[index] + _line(_encode(text)) + self._after_text

    def part(self, index: int, part: Part, scores: Sequence[Score]) -> bytes:
        """The event that carries any part of an output."""
        if not scores:
            if isinstance(part, str):
                return self.text(index, part)
            if isinstance(part, Reasoning):
                return self._before_reasoning[index] + _line(_encode(part.text)) + self._after_text
        if not self._chat:
            logprobs = text_logprobs(scores, self._pieces)
            return self._event(answers.TextChunkChoice(index, part if isinstance(part, str) else "", logprobs))
        return self._event(answers.ChatChunkChoice(index, _message_delta(part), self._chat_logprobs(scores)))

    def end(self, index: int, result: Result, scores: Sequence[Score]) -> bytes:
        """The event that closes a choice."""
        reason = finish_reason(result)
        if self._chat:
            return self._event(
                answers.ChatChunkChoice(index, answers.MessageDelta(), self._chat_logprobs(scores), reason)
            )
        logprobs = text_logprobs(scores, self._pieces) if scores else None
        return self._event(answers.TextChunkChoice(index, "", logprobs, reason))

    def usage(self, usage: Usage) -> bytes:
        """The last event before DONE, for clients that asked for it."""
        return self._head + b'],"usage":' + _encode(_usage_object(usage)) + b"}\n\n"

    def _chat_logprobs(self, scores: Sequence[Score]) -> answers.ChatLogprobs | None:
        return chat_logprobs(scores, self._pieces) if scores else None

    def _event(self, choice: answers.ChatChunkChoice | answers.TextChunkChoice) -> bytes:
        return self._head + _line(_encode(choice)) + self._tail


def error_event(error: QuireError) -> bytes:
    """The event that ends a stream which can't go on; no DONE follows."""
    return b"data: " + error_body(error) + b"\n\n"


def answer_body(
    head: Head,
    pieces: Pieces,
    generations: Sequence[Generation],
    outputs: Sequence[Answer],
    results: Sequence[Result],
    *,
    choices: int,
) -> bytes:
    """The whole answer as one object, with `choices` of each prompt."""
    usage = _usage_object(total_usage(results, choices))
    whole = list(zip(generations, outputs, results, strict=True))
    if head.operation is Operation.CHAT:
        prompt = _prompt_logprobs(generations[0], results[0], pieces)
        chats = [_chat_choice(index, *one, pieces) for index, one in enumerate(whole)]
        return _encode(answers.ChatCompletion(head.id, head.created, head.model, chats, usage, prompt))
    texts = [_text_choice(index, *one, pieces) for index, one in enumerate(whole)]
    return _encode(answers.TextCompletion(head.id, head.created, head.model, texts, usage))


def model_object(model: ServedModel, name: str, created: int) -> answers.ModelObject:
    """One of the names that `model` answers to."""
    return answers.ModelObject(name, created, model.max_model_len)


def _chat_choice(
    index: int, generation: Generation, output: Answer, result: Result, pieces: Pieces
) -> answers.ChatChoice:
    calls = [
        answers.ToolCallObject(call.id, answers.FunctionObject(call.name, call.arguments)) for call in output.calls
    ]
    message = answers.AnswerMessage(
        # OpenAI's null, where there is nothing but calls.
        output.text or (None if calls else ""),
        output.reasoning or UNSET,
        calls or UNSET,
    )
    scored = generation.request.logprobs is not None
    logprobs = chat_logprobs(output.scores, pieces) if scored else None
    return answers.ChatChoice(index, message, logprobs, finish_reason(result))


def _text_choice(
    index: int, generation: Generation, output: Answer, result: Result, pieces: Pieces
) -> answers.TextChoice:
    scored = generation.request.logprobs is not None
    logprobs = text_logprobs(output.scores, pieces) if scored else None
    prompt = _prompt_logprobs(generation, result, pieces)
    return answers.TextChoice(index, output.text, logprobs, finish_reason(result), prompt)


def _prompt_logprobs(
    generation: Generation, result: Result, pieces: Pieces
) -> answers.PromptLogprobs | msgspec.UnsetType:
    if result.prompt_logprobs is None:
        return UNSET
    return prompt_logprobs(generation.request.prompt_token_ids, result.prompt_logprobs, pieces)


def _message_delta(part: Part) -> answers.MessageDelta:
    match part:
        case str():
            return answers.MessageDelta(content=part)
        case Reasoning(text):
            return answers.MessageDelta(reasoning_content=text)
        case ToolCallStart(index, call_id, name):
            function = answers.FunctionDelta("", name)
            return answers.MessageDelta(tool_calls=[answers.ToolCallDelta(index, function, call_id, "function")])
        case ToolCallArguments(index, text):
            return answers.MessageDelta(tool_calls=[answers.ToolCallDelta(index, answers.FunctionDelta(text))])


def _line(encoded: bytes) -> bytes:
    """JSON that every client takes for one line."""
    if encoded.isascii():
        return encoded
    for raw, escaped in _LINE_BREAKS:
        encoded = encoded.replace(raw, escaped)
    return encoded


def _usage_object(usage: Usage) -> answers.UsageObject:
    return answers.UsageObject(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens + usage.completion_tokens,
        answers.PromptTokensDetails(usage.cached_tokens),
        answers.CompletionTokensDetails(usage.accepted_prediction_tokens, usage.rejected_prediction_tokens),
    )
