"""The model that this gateway serves, as far as text goes: its names, prompts to tokens, tokens to text.

Loaded once at the start from the same checkpoint as the engines'; the core asks it for every request.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from quire.gateway import reasoning
from quire.gateway.errors import ModelNotFoundError
from quire.gateway.reasoning import Thinking, thinking_after
from quire.gateway.tools import parser as tool_parser
from quire.gateway.tools.choice import ToolChoice, ToolFormat
from quire.gateway.tools.prompt import with_tools_as_text
from quire.service.chat import ChatTemplate, Message
from quire.service.checkpoint.text import TextModel
from quire.service.codec import PromptCodec
from quire.service.errors import InvalidRequestError
from quire.service.text import Detokenizer, Pieces

# A prompt of up to this many characters takes under 5 ms to tokenize; longer ones go to a thread (the tokenizer works
# without the interpreter's lock), so that the streams in flight don't stutter.
_INLINE_CHARACTERS = 8192

_TAGS = (
    *(reasoning.OPEN, reasoning.CLOSE),
    *(tool_parser.HERMES_OPEN, tool_parser.HERMES_CLOSE, tool_parser.LLAMA_TAG),
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt that goes through the chat template; `variables` are the template's own settings.

    The answer's beginning may be there: then the last message is the assistant's and `continue_final_message` is set.
    """

    messages: tuple[Message, ...]
    tools: ToolChoice = field(default_factory=ToolChoice)
    variables: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


# Text, token ids, or a conversation.
Prompt = str | tuple[int, ...] | Conversation


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A prompt's tokens, and what the output after them begins with."""

    token_ids: tuple[int, ...]
    thinking: Thinking = Thinking.NEVER


class ServedModel:
    """`names` are all names it answers to, the first its own and the one the routers know it by.

    `max_model_len` is for engines that hold less than the model's context. `tool_format` is how the model
    writes calls, where its chat template tells of tools but not of that. Raises ModelError.
    """

    def __init__(
        self,
        names: Sequence[str],
        text: TextModel,
        *,
        max_model_len: int | None = None,
        tool_format: ToolFormat | None = None,
    ) -> None:
        self.names = tuple(names)
        self.max_model_len = min(text.max_model_len, max_model_len or text.max_model_len)
        self.end_token_ids = text.eos_token_ids
        self.pieces = Pieces(text.tokenizer, text.eos_token_ids, visible=_TAGS)
        self.codec = PromptCodec(text)
        self.tool_format = ToolFormat.HERMES
        self._tokenizer = text.tokenizer
        self._template: ChatTemplate | None = None
        self._special_ids = {
            token.content: token_id
            for token_id, token in text.tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        if text.chat_template is not None:
            template = ChatTemplate(text.chat_template, bos_token=text.bos_token, eos_token=text.eos_token)
            self._template = template
            # A template that knows no tools has them told in Hermes' form.
            if "tools" in template.variables:
                self.tool_format = tool_format or ToolFormat.of(template)

    @property
    def name(self) -> str:
        """The name that the routers know it by."""
        return self.names[0]

    def check_name(self, name: str) -> None:
        """Raises ModelNotFoundError if `name` is none of the model's."""
        if name not in self.names:
            served = ", ".join(repr(known) for known in self.names)
            raise ModelNotFoundError(f"model {name!r} is not served here: ask for {served}", field="model")

    async def tokenize(self, prompt: Prompt, *, special_tokens: bool | None = None) -> Tokenized:
        """The prompt's token ids; raises InvalidRequestError that names `messages`, `prompt` or a setting.

        `special_tokens`: whether the first token that the model wants is put in front; by default it is in front of a
        bare text, and a template writes its own.
        """
        encode = self.codec.encode_prompt if special_tokens else self.codec.encode
        match prompt:
            case Conversation():
                size = sum(len(message.content) for message in prompt.messages)
                tokenized = await beside_the_loop(size, lambda: self._tokenize_chat(prompt, encode))
            case str():
                if special_tokens is None:
                    encode = self.codec.encode_prompt
                tokenized = Tokenized(await beside_the_loop(len(prompt), lambda: encode(prompt)))
            case _:
                self.codec.check_token_ids(prompt, "prompt")
                tokenized = Tokenized(prompt)
        return tokenized

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, special tokens included."""
        return await beside_the_loop(
            len(token_ids), lambda: str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))
        )

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary has it; empty for one that has no text."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    def detokenizer(self, *, strip_leading: bool = False) -> Detokenizer:
        """One for one output."""
        return Detokenizer(self.pieces, strip_leading=strip_leading)

    def lark_literal(self, tag: str) -> str:
        """`tag` in a grammar: a special token's id, or a string."""
        token_id = self._special_ids.get(tag)
        return json.dumps(tag) if token_id is None else f"<[{token_id}]>"

    def _tokenize_chat(self, conversation: Conversation, encode: Callable[[str], tuple[int, ...]]) -> Tokenized:
        template = self._template
        if template is None:
            raise InvalidRequestError(
                f"model {self.name!r} has no chat template: send a prompt to /v1/completions", field="messages"
            )
        try:
            text = self._render(template, conversation)
        except RecursionError as error:
            raise InvalidRequestError("tools are nested too deeply: flatten their parameters", field="tools") from error
        thinks = reasoning.CLOSE in template.source and conversation.add_generation_prompt
        return Tokenized(encode(text), thinking_after(text) if thinks else Thinking.NEVER)

    def _render(self, template: ChatTemplate, conversation: Conversation) -> str:
        messages: Sequence[Message] = conversation.messages
        tools = conversation.tools.tools
        if "tools" not in template.variables:
            messages, tools = with_tools_as_text(messages, tools), ()
        return template.render(
            messages,
            tools=[tool.definition for tool in tools],
            variables={**_effort(template, conversation.reasoning_effort), **conversation.variables},
            add_generation_prompt=conversation.add_generation_prompt,
            continue_final_message=conversation.continue_final_message,
        )


def _effort(template: ChatTemplate, effort: str | None) -> dict[str, Any]:
    """The template's setting for OpenAI's `reasoning_effort`; raises InvalidRequestError if it has none."""
    if effort is None:
        return {}
    if "reasoning_effort" in template.variables:
        return {"reasoning_effort": effort}
    if "enable_thinking" in template.variables:
        return {"enable_thinking": effort != "none"}
    if effort == "none" and reasoning.CLOSE not in template.source:
        return {}
    raise InvalidRequestError(
        f"reasoning_effort is {effort!r}, which this model's chat template has no setting for: leave it out",
        field="reasoning_effort",
    )


async def beside_the_loop(size: int, work: Callable[[], T]) -> T:
    """`work`, in a thread if `size` characters or tokens would hold up the event loop."""
    return work() if size <= _INLINE_CHARACTERS else await asyncio.to_thread(work)
