"""Chat templates: conversations to text, and whose fault it is when that fails."""

from __future__ import annotations

import pytest

from quire.service.chat import ChatTemplate, Message, ToolCall
from quire.service.errors import InvalidRequestError, ModelError

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


@pytest.mark.parametrize(
    "source",
    [
        "{{ nothing.at.all }}",
        "{{ 1 + 'a' }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].role }}{{ messages[7].content.x }}",
        "{% macro again(n) %}{{ again(n) }}{% endmacro %}{{ again(1) }}",
    ],
)
def test_template_that_fails_names_the_messages(source: str) -> None:
    """Without it a template that stumbles over some order of messages would be our internal error."""
    with pytest.raises(InvalidRequestError, match="does not take these messages: it failed") as caught:
        template(source).render(HI)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ ''.__class__.mro() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ strftime_now.__code__.co_code }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_template_stays_in_its_sandbox(source: str) -> None:
    """Without it a model from the hub could run code here, change the request, or fill the memory."""
    with pytest.raises(InvalidRequestError, match="does not take these messages"):
        template(source).render(HI)


def test_tools_and_their_calls() -> None:
    """Without it templates would not see tools, calls or results in the form in which they look for them."""
    source = (
        "{{ tools | tojson }}{% for m in messages %}|{{ m.role }}:{{ m.content }}"
        "{% if m.name is defined %}:{{ m.name }}{% endif %}"
        "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}:{{ c.type }}:{{ c.id }}:{{ c.function.name }}:"
        "{{ c.function.arguments | tojson }}{% endfor %}{% endif %}"
        "{% if m.tool_call_id is defined %}:{{ m.tool_call_id }}{% endif %}{% endfor %}"
    )
    messages = (
        Message("user", "hi", name="Ann"),
        Message("assistant", "", tool_calls=(ToolCall("c1", "now", {"zone": "UTC"}),)),
        Message("tool", "12:00", tool_call_id="c1"),
    )
    assert template(source).render(messages, tools=[{"a": 1}]) == (
        '[{"a": 1}]|user:hi:Ann|assistant::function:c1:now:{"zone": "UTC"}|tool:12:00:c1'
    )
    assert template("{% if tools is none %}none{% endif %}").render(HI) == "none"


def test_settings_of_a_template() -> None:
    """Without it thinking could not be switched off, or a client could put words into the gateway's mouth."""
    source = "{% if enable_thinking is defined and not enable_thinking %}quiet{% endif %}{{ bos_token }}"
    assert template(source).variables >= {"enable_thinking", "bos_token"}
    assert template(source).render(HI, variables={"enable_thinking": False}) == "quiet<s>"
    with pytest.raises(InvalidRequestError) as caught:
        template(source).render(HI, variables={"bos_token": "x"})
    assert caught.value.field == "chat_template_kwargs.bos_token"


def test_last_message_is_continued() -> None:
    """Without it a prefilled answer would be closed, or lose its last blank."""
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    messages = (*HI, Message("assistant", "The answer is "))
    assert template(source).render(messages, continue_final_message=True) == "<user>hi</><assistant>The answer is "
    with pytest.raises(InvalidRequestError) as caught:
        template("{{ messages[0].content }}").render(messages, continue_final_message=True)
    assert caught.value.field == "continue_final_message"


def test_marks_for_training_do_nothing() -> None:
    """Without it models whose templates carry them could not be served."""
    assert template("a{% generation %}{{ messages[0].content }}{% endgeneration %}b").render(HI) == "ahib"


def test_template_that_is_wrong_ends_the_start() -> None:
    """Without it a damaged template would show only when somebody chats."""
    with pytest.raises(ModelError, match="line 2"):
        template("\n{% if %}")
