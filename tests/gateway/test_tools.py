"""Tools and thoughts, as the official client sees them: whole, streamed, forced and sent back."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fake_router import Answer, FakeRouter
from gateway_testing import MODEL
from pydantic import BaseModel

from quire.gateway.model import ServedModel
from quire.service.checkpoint import TextModel
from quire.service.request import Constraint, ConstraintKind, FinishReason, Request

QUESTION: Any = [{"role": "user", "content": "What is the weather in Lima?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
LIMA = '{"city": "Lima"}'
TWO_CALLS = (
    "Let me look.\n"
    f'<tool_call>\n{{"name": "get_weather", "arguments": {LIMA}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)

# In the manner of Qwen's: tools, thoughts, calls and results.
QWEN = """
{%- if tools %}{% for tool in tools %}[{{ tool | tojson }}]{% endfor %}{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls | default([]) %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
DEEPSEEK = "{{ messages[0].content }}{# </think> #}{% if add_generation_prompt %}<think>\n{% endif %}"
LLAMA = (
    '{% if tools %}{"name": function name, "parameters": dictionary}{{ tools | tojson }}{% endif %}'
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


@pytest.fixture
def answer() -> Answer | None:
    """Tests here answer by hand."""
    return None


@pytest.fixture
def template() -> str | None:
    """The model's chat template; None is the embedded model's, which knows no tools."""
    return QWEN


@pytest.fixture
def served_model(text_model: TextModel, template: str | None) -> ServedModel:
    changed = text_model if template is None else dataclasses.replace(text_model, chat_template=template)
    return ServedModel((MODEL,), changed)


@pytest.fixture
def say(router: FakeRouter, encode: Callable[[str], list[int]]) -> Callable[..., Any]:
    """Answers the next request with a text, token by token; returns the request."""

    async def say(text: str, finish: FinishReason = FinishReason.STOP) -> Request:
        submission = await router.next()
        for token in encode(text):
            submission.send([token])
        submission.send([], finish=finish)
        return submission.request

    return say


def prompt_of(request: Request, text_model: TextModel) -> str:
    return text_model.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)


async def test_calls(client: openai.AsyncOpenAI, say: Any, text_model: TextModel) -> None:
    """Without it an agent would see a call as text, or not see the tools in its prompt."""
    asking = asyncio.create_task(
        client.chat.completions.create(model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice="auto")
    )
    request = await say(TWO_CALLS)
    (choice,) = (await asking).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    assert choice.message.tool_calls is not None
    assert [(call.function.name, call.function.arguments) for call in choice.message.tool_calls] == [
        ("get_weather", LIMA),
        ("now", "{}"),
    ]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert request.constraint is None
    prompt = prompt_of(request, text_model)
    assert json.loads(prompt[1 : prompt.index("][")]) == TOOLS[0]


async def test_only_calls_have_no_content(client: openai.AsyncOpenAI, say: Any) -> None:
    """Without it clients that test for null would show an empty message."""
    asking = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=QUESTION, tools=TOOLS))
    await say('<tool_call>{"name": "now"}</tool_call>')
    assert (await asking).choices[0].message.content is None


async def test_streamed_calls(client: openai.AsyncOpenAI, say: Any) -> None:
    """Without it arguments would come in one piece at the end, calls without their index, or a tag as text."""
    asking = asyncio.create_task(
        client.chat.completions.create(model=MODEL, messages=QUESTION, tools=TOOLS, stream=True)
    )
    await say(TWO_CALLS)
    deltas, reasons = [], []
    async for chunk in await asking:
        deltas.append(chunk.choices[0].delta)
        reasons.append(chunk.choices[0].finish_reason)
    assert "".join(delta.content or "" for delta in deltas) == "Let me look."
    calls: dict[int, dict[str, str]] = {}
    for delta in deltas:
        for piece in delta.tool_calls or []:
            assert piece.function is not None
            if piece.index not in calls:
                assert (piece.type, piece.function.arguments) == ("function", "")
                calls[piece.index] = {"id": piece.id or "", "name": piece.function.name or "", "arguments": ""}
            else:
                assert (piece.id, piece.type, piece.function.name) == (None, None, None)
                calls[piece.index]["arguments"] += piece.function.arguments or ""
    assert [(call["name"], call["arguments"]) for call in calls.values()] == [("get_weather", LIMA), ("now", "{}")]
    assert all(call["id"] for call in calls.values())
    assert sum(len(delta.tool_calls or []) for delta in deltas) > 5
    assert [reason for reason in reasons if reason] == ["tool_calls"]


async def test_stream_helper_understands(client: openai.AsyncOpenAI, say: Any) -> None:
    """Without it the client's own accumulator could choke on the deltas."""

    async def run() -> Any:
        async with client.chat.completions.stream(model=MODEL, messages=QUESTION, tools=TOOLS) as stream:
            return await stream.get_final_completion()

    asking = asyncio.create_task(run())
    await say(TWO_CALLS)
    message = (await asking).choices[0].message
    assert [call.function.arguments for call in message.tool_calls] == [LIMA, "{}"]


async def test_parse_helper(client: openai.AsyncOpenAI, say: Any) -> None:
    """Without it the client's typed tools, which are strict, would not be held to their schema or not be parsed."""

    class Weather(BaseModel):
        city: str

    asking = asyncio.create_task(
        client.chat.completions.parse(model=MODEL, messages=QUESTION, tools=[openai.pydantic_function_tool(Weather)])
    )
    request = await say(f'<tool_call>\n{{"name": "Weather", "arguments": {LIMA}}}\n</tool_call>')
    (call,) = (await asking).choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Weather(city="Lima")
    assert request.constraint is not None


@pytest.mark.parametrize(
    ("choice", "names", "calls"),
    [
        ("required", ("get_weather", "now"), 16),
        ({"type": "function", "function": {"name": "now"}}, ("now",), 1),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "get_weather"}}],
                },
            },
            ("get_weather",),
            16,
        ),
    ],
)
async def test_forced_calls_are_held_to_a_grammar(
    client: openai.AsyncOpenAI, say: Any, choice: Any, names: tuple[str, ...], calls: int
) -> None:
    """Without it a call that was asked for could fail to come, or another than that."""
    asking = asyncio.create_task(
        client.chat.completions.create(model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice=choice)
    )
    request = await say(f'<tool_call>\n{{"name": "{names[0]}", "arguments": {LIMA}}}\n</tool_call>')
    assert (await asking).choices[0].finish_reason == "tool_calls"
    assert request.constraint is not None
    source = request.constraint.source
    assert request.constraint.kind is ConstraintKind.LARK
    assert [name for name in ("get_weather", "now") if f'{{\\"name\\": \\"{name}\\"' in source] == list(names)
    assert ("{0,15}" in source) is (calls == 16)


async def test_no_calls(client: openai.AsyncOpenAI, say: Any, text_model: TextModel) -> None:
    """Without it `none` would leave the tools in the prompt, and the model call them."""
    asking = asyncio.create_task(
        client.chat.completions.create(model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice="none")
    )
    request = await say("<tool_call>x</tool_call>")
    assert (await asking).choices[0].message.content == "<tool_call>x</tool_call>"
    assert "get_weather" not in prompt_of(request, text_model)


async def test_one_call_at_most(client: openai.AsyncOpenAI, say: Any) -> None:
    """Without it `parallel_tool_calls: false` would be ignored."""
    asking = asyncio.create_task(
        client.chat.completions.create(model=MODEL, messages=QUESTION, tools=TOOLS, parallel_tool_calls=False)
    )
    request = await say("Hi")
    await asking
    assert "calls: call\n" in request.constraint.source


async def test_cut_off_call(client: openai.AsyncOpenAI, say: Any) -> None:
    """Without it half a call could look like a whole one."""
    asking = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=QUESTION, tools=TOOLS))
    await say('<tool_call>{"name": "now", "arguments": {"a', FinishReason.LENGTH)
    (choice,) = (await asking).choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].function.arguments == '{"a'


async def test_the_whole_round(client: openai.AsyncOpenAI, say: Any, text_model: TextModel) -> None:
    """Without it an assistant's calls, sent back as they came, or their results could be refused or lost."""
    asking = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=QUESTION, tools=TOOLS))
    await say(TWO_CALLS)
    message = (await asking).choices[0].message
    assert message.tool_calls is not None
    results = [{"role": "tool", "tool_call_id": call.id, "content": "18 °C"} for call in message.tool_calls]
    again = asyncio.create_task(
        client.chat.completions.create(
            model=MODEL, messages=[*QUESTION, message.model_dump(exclude_none=True), *results], tools=TOOLS
        )
    )
    request = await say("It is 18 °C.")
    assert (await again).choices[0].message.content == "It is 18 °C."
    prompt = prompt_of(request, text_model)
    assert f'<tool_call>\n{{"name": "get_weather", "arguments": {LIMA}}}\n</tool_call>' in prompt
    assert prompt.count("<|im_start|>tool\n18 °C<|im_end|>") == 2


class TestTemplateWithoutTools:
    """The embedded model: the gateway tells of the tools."""

    @pytest.fixture
    def template(self) -> None:
        return None

    async def test_tools_in_the_system_message(
        self, client: openai.AsyncOpenAI, say: Any, text_model: TextModel
    ) -> None:
        """Without it tools would be accepted and the model never hear of them."""
        messages: Any = [
            {"role": "system", "content": "Be brief."},
            *QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "18 °C"},
        ]
        asking = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS))
        request = await say(TWO_CALLS)
        assert (await asking).choices[0].finish_reason == "tool_calls"
        prompt = prompt_of(request, text_model)
        assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou may call functions")
        assert '"name": "get_weather"' in prompt
        assert f'<tool_call>\n{{"name": "get_weather", "arguments": {LIMA}}}\n</tool_call><|im_end|>' in prompt
        assert "<|im_start|>user\n<tool_response>\n18 °C\n</tool_response><|im_end|>" in prompt


CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": LIMA}}


class TestLlama:
    """A model that writes bare JSON."""

    @pytest.fixture
    def template(self) -> str:
        return LLAMA

    async def test_calls(self, client: openai.AsyncOpenAI, say: Any) -> None:
        """Without it Llama's calls would be text, or JSON answers be calls."""
        asking = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=QUESTION, tools=TOOLS))
        await say(f'{{"name": "get_weather", "parameters": {LIMA}}}')
        (choice,) = (await asking).choices
        assert choice.message.tool_calls is not None
        assert choice.message.tool_calls[0].function.arguments == LIMA
        asking = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=QUESTION, tools=TOOLS))
        await say(LIMA)
        (choice,) = (await asking).choices
        assert (choice.message.content, choice.finish_reason) == (LIMA, "stop")

    async def test_forced(self, client: openai.AsyncOpenAI, say: Any) -> None:
        """Without it a forced call would be held to another model's format."""
        asking = asyncio.create_task(
            client.chat.completions.create(model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice="required")
        )
        request = await say(f'{{"name": "get_weather", "parameters": {LIMA}}}')
        assert (await asking).choices[0].finish_reason == "tool_calls"
        assert '\\"parameters\\": ' in request.constraint.source
        assert "<tool_call>" not in request.constraint.source


class TestReasoning:
    """Models whose templates mark thoughts."""

    async def test_thoughts_are_apart(self, client: openai.AsyncOpenAI, say: Any) -> None:
        """Without it an answer would begin with its thoughts."""
        asking = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=QUESTION))
        await say("<think>\nHm. 2 < 3\n</think>\n\nSunny.")
        message: Any = (await asking).choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm. 2 < 3", "Sunny.")
        asking = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=QUESTION))
        await say("Sunny.")
        message = (await asking).choices[0].message
        assert (hasattr(message, "reasoning_content"), message.content) == (False, "Sunny.")

    async def test_streamed(self, client: openai.AsyncOpenAI, say: Any) -> None:
        """Without it a stream would be silent while the model thinks."""
        asking = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True))
        await say("<think>\nHm. Well.\n</think>\n\nSunny.")
        deltas: list[Any] = [chunk.choices[0].delta async for chunk in await asking]
        thoughts = [getattr(delta, "reasoning_content", None) for delta in deltas]
        assert "".join(filter(None, thoughts)) == "Hm. Well."
        assert len(list(filter(None, thoughts))) > 1
        assert "".join(delta.content or "" for delta in deltas) == "Sunny."

    @pytest.mark.parametrize(
        "fields", [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}]
    )
    async def test_switched_off(
        self, http: httpx.AsyncClient, say: Any, text_model: TextModel, fields: dict[str, Any]
    ) -> None:
        """Without it a client could not have an answer at once."""
        body = {"model": MODEL, "messages": QUESTION, **fields}
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=body))
        request = await say("<think> is a tag.")
        assert (await asking).json()["choices"][0]["message"]["content"] == "<think> is a tag."
        assert prompt_of(request, text_model).endswith("<think>\n\n</think>\n\n")

    async def test_a_constraint_leaves_room_for_thoughts(self, client: openai.AsyncOpenAI, say: Any) -> None:
        """Without it a model that thinks would be forced to answer without."""
        asking = asyncio.create_task(
            client.chat.completions.create(model=MODEL, messages=QUESTION, response_format={"type": "json_object"})
        )
        request = await say('<think>Hm.</think>{"a": 1}')
        assert (await asking).choices[0].message.content == '{"a": 1}'
        assert request.constraint.kind is ConstraintKind.LARK
        assert "(think BLANKS?)? body" in request.constraint.source


class TestThoughtsOpenedInThePrompt:
    """DeepSeek's way."""

    @pytest.fixture
    def template(self) -> str:
        return DEEPSEEK

    async def test_thoughts_are_apart(self, client: openai.AsyncOpenAI, say: Any) -> None:
        """Without it such a model's thoughts would be its answer: no tag opens them."""
        asking = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=QUESTION))
        await say("Hm.\n</think>\n\nSunny.")
        message: Any = (await asking).choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm.", "Sunny.")
        asking = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=QUESTION))
        await say("Hm. And so", FinishReason.LENGTH)
        message = (await asking).choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm. And so", "")

    async def test_continued_answers_do_not_think(self, http: httpx.AsyncClient, say: Any) -> None:
        """Without it the rest of an answer would be taken for thoughts."""
        messages = [{"role": "assistant", "content": "It is"}]
        body = {"model": MODEL, "messages": messages, "continue_final_message": True}
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=body))
        await say(" sunny.")
        assert (await asking).json()["choices"][0]["message"] == {
            "content": " sunny.",
            "role": "assistant",
            "refusal": None,
        }


@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        ({"structured_outputs": {"json": PARAMETERS}}, ConstraintKind.JSON_SCHEMA, PARAMETERS),
        ({"structured_outputs": {"json": json.dumps(PARAMETERS)}}, ConstraintKind.JSON_SCHEMA, PARAMETERS),
        ({"structured_outputs": {"regex": "a+"}}, ConstraintKind.REGEX, "a+"),
        ({"structured_outputs": {"choice": ["yes", 'n"o']}}, ConstraintKind.LARK, 'start: "yes" | "n\\"o"'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, ConstraintKind.LARK, 'start: "a"'),
        ({"structured_outputs": {"json_object": True}}, ConstraintKind.JSON_OBJECT, ""),
        ({"guided_json": PARAMETERS}, ConstraintKind.JSON_SCHEMA, PARAMETERS),
        ({"guided_regex": "a+"}, ConstraintKind.REGEX, "a+"),
        ({"guided_choice": ["yes"]}, ConstraintKind.LARK, 'start: "yes"'),
        ({"guided_grammar": 'start: "a"'}, ConstraintKind.LARK, 'start: "a"'),
    ],
)
async def test_structured_outputs(
    http: httpx.AsyncClient, say: Any, fields: dict[str, Any], kind: ConstraintKind, source: Any
) -> None:
    """Without it constraints as vLLM's users write them would be refused, or held to something else."""
    asking = asyncio.create_task(http.post("/v1/completions", json={"model": MODEL, "prompt": "x", **fields}))
    request = await say("ok")
    assert (await asking).status_code == 200
    assert isinstance(request.constraint, Constraint)
    assert request.constraint.kind is kind
    sent = request.constraint.source
    assert (json.loads(sent) if kind is ConstraintKind.JSON_SCHEMA else sent) == source
