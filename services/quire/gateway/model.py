"""The model that this gateway serves, as far as text goes: its names, prompts to tokens, tokens to text.

Loaded once at the start from the same checkpoint as the engines'; the core asks it for every request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quire.gateway.errors import ModelNotFoundError
from quire.service.chat import ChatTemplate, Message
from quire.service.checkpoint.text import TextModel
from quire.service.codec import PromptCodec
from quire.service.errors import InvalidRequestError
from quire.service.text import Pieces

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
        self._codec = PromptCodec(text)
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
                return await _beside_the_loop(size, lambda: self._codec.encode(self._rendered(messages)))
            case str():
                tokens = await _beside_the_loop(len(prompt), lambda: self._codec.encode_prompt(prompt))
            case _:
                self._codec.check_token_ids(prompt, "prompt")
                tokens = prompt
        if not tokens:
            raise InvalidRequestError("prompt is empty: send at least one token", field="prompt")
        return tokens

    def _rendered(self, messages: Sequence[Message]) -> str:
        if self._template is None:
            raise InvalidRequestError(
                f"model {self.name!r} has no chat template: send a prompt to /v1/completions", field="messages"
            )
        return self._template.render(messages)


async def _beside_the_loop(size: int, work: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    return work() if size <= _INLINE_CHARACTERS else await asyncio.to_thread(work)
