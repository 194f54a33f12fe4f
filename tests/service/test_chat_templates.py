"""Chat templates: conversations to text, and whose fault it is when that fails."""

from __future__ import annotations

import pytest

from quire.service.chat import ChatTemplate, Message
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
