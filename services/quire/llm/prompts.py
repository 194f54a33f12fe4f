"""Prompts in all the forms that `generate` and `chat` take, as token ids."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias, TypedDict

from quire.llm.arguments import ArgumentError, check_arguments
from quire.service.codec import PromptCodec
from quire.service.errors import InvalidRequestError

if TYPE_CHECKING:
    from quire.service.chat import Message


class PromptDict(TypedDict, total=False):
    """A prompt as text or as token ids. Only prompts of the same `cache_salt` share pages."""

    prompt: str
    prompt_token_ids: Sequence[int]
    cache_salt: str


Prompt: TypeAlias = str | Sequence[int] | PromptDict
Conversation: TypeAlias = Sequence[Mapping[str, Any]]

_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """`text` is None if the prompt came as token ids."""

    text: str | None
    token_ids: tuple[int, ...]
    cache_salt: str = ""


def encode_prompts(prompts: Prompt | Sequence[Prompt], codec: PromptCodec) -> list[EncodedPrompt]:
    """The prompts in their order; a bare one is a list of one. Raises InvalidRequestError that names the place."""
    if isinstance(prompts, str | Mapping):
        return [_encode(prompts, "prompts", codec)]
    if not isinstance(prompts, Iterable):
        raise ArgumentError(f"prompts is {prompts!r}: give a text, token ids, or a list of them", field="prompts")
    items: list[Any] = list(prompts)
    if items and all(isinstance(item, SupportsIndex) for item in items):
        return [_encode(items, "prompts", codec)]
    return [_encode(item, f"prompts[{index}]", codec) for index, item in enumerate(items)]


def conversations_of(messages: Conversation | Sequence[Conversation]) -> list[list[Message]]:
    """One list of messages for each conversation; a bare one is a list of one. Raises InvalidRequestError."""
    if isinstance(messages, Mapping | str) or not isinstance(messages, Iterable):
        raise ArgumentError(f"messages is {messages!r}: give a list of messages", field="messages")
    items: list[Any] = list(messages)
    if not items or isinstance(items[0], Mapping):
        return [_messages(items, "messages")]
    return [_messages(item, f"messages[{index}]") for index, item in enumerate(items)]


def _encode(prompt: Any, where: str, codec: PromptCodec) -> EncodedPrompt:
    salt = ""
    if isinstance(prompt, Mapping):
        check_arguments(where, prompt, _KEYS, {})
        given = [name for name in _KEYS[:2] if name in prompt]
        if len(given) != 1:
            raise ArgumentError(f"{where} has {given or 'neither'}: give prompt or prompt_token_ids", field=where)
        salt = str(prompt.get("cache_salt") or "")
        where, prompt = f"{where}[{given[0]!r}]", prompt[given[0]]
    if isinstance(prompt, str):
        encoded = EncodedPrompt(prompt, codec.encode_prompt(prompt), salt)
    else:
        encoded = EncodedPrompt(None, _token_ids(prompt, where), salt)
        codec.check_token_ids(encoded.token_ids, where)
    if not encoded.token_ids:
        raise InvalidRequestError(f"{where} is empty: give at least one token", field=where)
    return encoded


def _token_ids(prompt: Any, where: str) -> tuple[int, ...]:
    try:
        return tuple(operator.index(token_id) for token_id in prompt)
    except TypeError as error:
        raise ArgumentError(f"{where} is {prompt!r}: give a text or a list of token ids", field=where) from error


def _messages(items: Any, where: str) -> list[Message]:
    # What templates run in is loaded when somebody chats.
    from quire.service.chat import Message

    if isinstance(items, str) or not isinstance(items, Iterable):
        raise ArgumentError(f"{where} is {items!r}: give a list of messages", field=where)
    found = []
    for index, item in enumerate(items):
        place = f"{where}[{index}]"
        if not isinstance(item, Mapping) or not isinstance(item.get("role"), str):
            raise ArgumentError(f"{place} is {item!r}: give a dict with role and content", field=place)
        found.append(Message(item["role"], _content(item.get("content"), f"{place}.content")))
    return found


def _content(content: Any, where: str) -> str:
    """A text, or OpenAI's list of parts of type text."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) and "text" in part for part in content):
        return "\n".join(str(part["text"]) for part in content)
    raise ArgumentError(f"{where} is {content!r}: give a text", field=where)
