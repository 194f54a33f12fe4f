"""Chat templates and the served model: prompts to tokens, without a server."""

from __future__ import annotations

import dataclasses

import pytest

from quire.gateway.chat import ChatTemplate, Message
from quire.gateway.model import Conversation, ServedModel
from quire.service.checkpoint import TextModel
from quire.service.errors import InternalError, InvalidRequestError, ModelError

HI = (Message("user", "hi"),)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>")


def test_template_sees_what_it_was_promised() -> None:
    """Without it published templates would fail on a name or setting that they take for granted."""
    source = (
        "{{ bos_token }}{% for m in messages %}\n"
        "    {%- if m.role == 'user' %}[{{ m.content | trim }}]{% else %}{% continue %}{% endif %}\n"
        "{%- endfor %}{{ eos_token }}{% if add_generation_prompt %}>{% endif %}"
        "{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y') | length }}"
    )
    assert template(source).render([Message("system", "x"), Message("user", " hi ")]) == '<s>[hi]</s>>{"a": "<é>"}4'


def test_template_may_refuse() -> None:
    """Without it a conversation that the model was not trained for would be our internal error."""
    refusing = template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequestError, match="roles must alternate") as caught:
        refusing.render(HI)
    assert caught.value.field == "messages"


def test_template_that_fails_is_not_the_clients_fault() -> None:
    """Without it a broken template would be blamed on the request, or escape the sandbox."""
    for source in ("{{ nothing.at.all }}", "{{ 1 + 'a' }}", "{{ messages.append(1) }}", "{{ ''.__class__.mro() }}"):
        with pytest.raises(InternalError, match="chat template"):
            template(source).render(HI)


def test_template_that_is_wrong_ends_the_start() -> None:
    """Without it a damaged template would show only when somebody chats."""
    with pytest.raises(ModelError, match="line 2"):
        template("\n{% if %}")


async def test_model_without_template(text_model: TextModel) -> None:
    """Without it a base model would be given some other model's chat format."""
    base = ServedModel(("base",), dataclasses.replace(text_model, chat_template=None))
    with pytest.raises(InvalidRequestError, match="/v1/completions"):
        await base.tokens_of(Conversation(HI))
    assert await base.tokens_of("hi")


async def test_first_token(text_model: TextModel) -> None:
    """Without it models that want a first token would miss it in completions, or have it twice in chats."""
    model = ServedModel(("m",), dataclasses.replace(text_model, add_bos=True))
    assert (await model.tokens_of("hi"))[0] == 1
    assert (await model.tokens_of(Conversation(HI)))[:2] != (1, 1)
    with pytest.raises(ModelError, match="first token"):
        ServedModel(("m",), dataclasses.replace(text_model, add_bos=True, bos_token=""))


async def test_long_text_is_the_same_beside_the_loop(text_model: TextModel) -> None:
    """Without it long prompts, which are tokenized in a thread, could differ from short ones."""
    model = ServedModel(("m",), text_model)
    text = "A sentence of some words. " * 1000
    assert list(await model.tokens_of(text)) == text_model.tokenizer.encode(text).ids


def test_max_model_len(text_model: TextModel) -> None:
    """Without it a gateway could promise more context than its engines hold, or than the model has."""
    assert ServedModel(("m",), text_model, max_model_len=100).max_model_len == 100
    assert ServedModel(("m",), text_model, max_model_len=10**6).max_model_len == text_model.max_model_len
