"""Tools, log-probabilities and choices through real processes: gateway, router, engine and sidecar."""

from __future__ import annotations

import json
import math

import openai
import pytest
from openai import OpenAI
from served import MODEL

pytestmark = pytest.mark.e2e

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]
WEATHER = [{"role": "user", "content": "What is the weather in Lima, in degrees Celsius?"}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_is_called(client: OpenAI, stream: bool) -> None:
    """A model far too small to know of tools calls the one that it must, with arguments that match."""
    asked = {
        "model": MODEL,
        "messages": WEATHER,
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "temperature": 0,
        "max_tokens": 60,
    }
    if stream:
        with client.chat.completions.stream(**asked) as events:
            choice = events.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit"} and arguments["unit"] in ("C", "F")


def test_some_tool_is_called(client: OpenAI) -> None:
    """`required` leaves the choice to the model."""
    completion = client.chat.completions.create(
        model=MODEL, messages=WEATHER, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=60
    )
    (call,) = completion.choices[0].message.tool_calls
    assert call.function.name in ("get_weather", "now")
    json.loads(call.function.arguments)


def test_schema_that_a_tool_can_not_have(client: OpenAI) -> None:
    """What only the sidecar finds is named as the client's field."""
    wrong = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "strin"}}}}}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=WEATHER, tools=wrong, tool_choice="required")
    assert caught.value.param == "tools"


def test_logprobs_and_choices(client: OpenAI) -> None:
    """Greedy tokens are the likeliest; several choices differ, and the same seed gives the same ones."""
    completion = client.chat.completions.create(
        model=MODEL, messages=WEATHER, temperature=0, logprobs=True, top_logprobs=3, max_tokens=8
    )
    content = completion.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == completion.choices[0].message.content
    for entry in content:
        assert entry.logprob <= 0 and entry.token == entry.top_logprobs[0].token
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.001

    def draw() -> list[str | None]:
        choices = client.chat.completions.create(
            model=MODEL, messages=WEATHER, n=3, seed=11, temperature=1.2, max_tokens=8
        ).choices
        return [choice.message.content for choice in choices]

    first = draw()
    assert len(set(first)) > 1
    assert draw() == first


def test_a_prompt_is_scored(client: OpenAI) -> None:
    """What evaluation harnesses do: a likely text scores better than an unlikely one."""

    def score(text: str) -> float:
        answer = client.completions.create(model=MODEL, prompt=text, echo=True, logprobs=0, max_tokens=0)
        logprobs = answer.choices[0].logprobs
        assert answer.choices[0].text == text and logprobs.token_logprobs[0] is None
        return sum(logprobs.token_logprobs[1:])

    assert score("The capital of France is Paris") > score("The capital of France is banana") + 2
