"""The served model: prompts to tokens, without a server."""

from __future__ import annotations

import dataclasses

import pytest

from quire.gateway.model import Conversation, ServedModel
from quire.gateway.tools.choice import ToolFormat
from quire.service.chat import Message
from quire.service.checkpoint import TextModel
from quire.service.errors import InvalidRequestError, ModelError

HI = (Message("user", "hi"),)


async def test_model_without_template(text_model: TextModel) -> None:
    """Without it a base model would be given some other model's chat format."""
    base = ServedModel(("base",), dataclasses.replace(text_model, chat_template=None))
    with pytest.raises(InvalidRequestError, match="/v1/completions"):
        await base.tokenize(Conversation(HI))
    assert (await base.tokenize("hi")).token_ids


async def test_first_token(text_model: TextModel) -> None:
    """Without it models that want a first token would miss it in completions, or have it twice in chats."""
    model = ServedModel(("m",), dataclasses.replace(text_model, add_bos=True))
    assert (await model.tokenize("hi")).token_ids[0] == 1
    assert (await model.tokenize(Conversation(HI))).token_ids[:2] != (1, 1)
    with pytest.raises(ModelError, match="first token"):
        ServedModel(("m",), dataclasses.replace(text_model, add_bos=True, bos_token=""))


async def test_long_text_is_the_same_beside_the_loop(text_model: TextModel) -> None:
    """Without it long prompts, which are tokenized in a thread, could differ from short ones."""
    model = ServedModel(("m",), text_model)
    text = "A sentence of some words. " * 1000
    assert list((await model.tokenize(text)).token_ids) == text_model.tokenizer.encode(text).ids


def test_max_model_len(text_model: TextModel) -> None:
    """Without it a gateway could promise more context than its engines hold, or than the model has."""
    assert ServedModel(("m",), text_model, max_model_len=100).max_model_len == 100
    assert ServedModel(("m",), text_model, max_model_len=10**6).max_model_len == text_model.max_model_len


def test_tool_call_format(text_model: TextModel) -> None:
    """Without it a model would be told of tools in one format and read in another."""

    def style(template: str | None, given: ToolFormat | None = None) -> ToolFormat:
        text = dataclasses.replace(text_model, chat_template=template)
        return ServedModel(("m",), text, tool_format=given).tool_format

    llama = '{{ tools }}{"name": function name, "parameters": dictionary}'
    hermes = "{{ tools }}<tool_call>{{ messages }}</tool_call>"
    assert (style(llama), style(hermes)) == (ToolFormat.LLAMA3_JSON, ToolFormat.HERMES)
    assert style("{{ tools }}", ToolFormat.LLAMA3_JSON) is ToolFormat.LLAMA3_JSON
    # What the gateway itself writes into the prompt is Hermes'.
    assert style(text_model.chat_template, ToolFormat.LLAMA3_JSON) is ToolFormat.HERMES
    assert style(None) is ToolFormat.HERMES
