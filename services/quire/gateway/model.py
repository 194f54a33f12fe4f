"""The model that this gateway serves, as far as text goes: its names, prompts to tokens, tokens to text.

Loaded once at the start from the same checkpoint as the engines'; the core asks it for every request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quire.gateway.chat import ChatTemplate, Message
from quire.gateway.errors import ModelNotFoundError
from quire.gateway.text import Pieces
from quire.service.checkpoint.text import TextModel
from quire.service.errors import InvalidRequestError, ModelError

# A prompt of up to this many characters takes under 5 ms to tokenize; longer ones go to a thread (the tokenizer works
# without the interpreter's lock), so that the streams in flight don't stutter.
_INLINE_CHARACTERS = 8192


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt that goes through the chat template."""

    messages: tuple[Message, ...]


# Text, token ids, or a conversation.
Prompt = str | tuple[int, ...] | Conversation


class ServedModel:
    """`names` are all names it answers to, the first its own and the one the routers know it by.

    `max_model_len` is for engines that hold less than the model's context. Raises ModelError.
    """

    def __init__(self, names: Sequence[str], text: TextModel, *, max_model_len: int | None = None) -> None:
        self.names = tuple(names)
        self.max_model_len = min(text.max_model_len, max_model_len or text.max_model_len)
        self.end_token_ids = text.eos_token_ids
        self.pieces = Pieces(text.tokenizer, text.eos_token_ids)
        self._tokenizer = text.tokenizer
        self._vocab_size = text.vocab_size
        self._prefix = (_bos_token_id(text),) if text.add_bos else ()
        self._template: ChatTemplate | None = None
        if text.chat_template is not None:
            self._template = ChatTemplate(text.chat_template, bos_token=text.bos_token, eos_token=text.eos_token)

    @property
    def name(self) -> str:
        """The name that the routers know it by."""
        return self.names[0]

    def check_name(self, name: str) -> None:
        """Raises ModelNotFoundError if `name` is none of the model's."""
        if name not in self.names:
            served = ", ".join(repr(known) for known in self.names)
            raise ModelNotFoundError(f"model {name!r} is not served here: ask for {served}", field="model")

    async def tokens_of(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's token ids; raises InvalidRequestError that names `messages` or `prompt`."""
        match prompt:
            case Conversation(messages):
                size = sum(len(message.content) for message in messages)
                return await _beside_the_loop(size, lambda: self._encode(self._rendered(messages)))
            case str():
                tokens = await _beside_the_loop(len(prompt), lambda: self._prefix + self._encode(prompt))
            case _:
                self._check_token_ids(prompt)
                tokens = prompt
        if not tokens:
            raise InvalidRequestError("prompt is empty: send at least one token", field="prompt")
        return tokens

    def _check_token_ids(self, token_ids: Sequence[int]) -> None:
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self._vocab_size):
            index = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < self._vocab_size)
            raise InvalidRequestError(
                f"prompt[{index}] is {token_ids[index]}: this model's token ids lie in [0, {self._vocab_size - 1}]",
                field=f"prompt[{index}]",
            )

    def _rendered(self, messages: Sequence[Message]) -> str:
        if self._template is None:
            raise InvalidRequestError(
                f"model {self.name!r} has no chat template: send a prompt to /v1/completions", field="messages"
            )
        return self._template.render(messages)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)


async def _beside_the_loop(size: int, work: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    return work() if size <= _INLINE_CHARACTERS else await asyncio.to_thread(work)


def _bos_token_id(text: TextModel) -> int:
    token_id = text.tokenizer.token_to_id(text.bos_token) if text.bos_token else None
    if token_id is None:
        raise ModelError(f"the tokenizer wants a first token, {text.bos_token!r}, but does not know it")
    return token_id
