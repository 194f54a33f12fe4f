"""The official OpenAI client against real processes."""

from __future__ import annotations

import json
import re

import jsonschema
import openai
import pytest
from openai import OpenAI
from served import MODEL

pytestmark = pytest.mark.e2e

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
EXTRACT = [{"role": "user", "content": "Extract name and age as JSON: Maria Lopez is 34 years old and lives in Lima."}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_chat(client: OpenAI) -> None:
    """The first thing that anyone tries."""
    answer = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=30)
    choice = answer.choices[0]
    assert "Paris" in (choice.message.content or "")
    assert choice.finish_reason == "stop" and choice.message.role == "assistant"
    assert answer.usage is not None and answer.usage.completion_tokens > 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streaming_chat_says_the_same(client: OpenAI) -> None:
    """A stream is the same answer in pieces, with its usage at the end when asked for."""
    whole = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=30)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=FRANCE, temperature=0, max_tokens=30, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content and sum(bool(piece) for piece in pieces) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_completions_and_stop_strings(client: OpenAI) -> None:
    """A plain prompt goes on as text; a stop string never shows."""
    answer = client.completions.create(
        model=MODEL, prompt="1, 2, 3, 4, 5, 6,", temperature=0, max_tokens=20, stop=["9"]
    )
    assert answer.choices[0].text.startswith(" 7, 8") and "9" not in answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"


def test_json_schema(client: OpenAI) -> None:
    """A free answer to this prompt ends in chatter; a constrained one is the object and nothing else."""
    answer = client.chat.completions.create(
        model=MODEL, messages=EXTRACT, temperature=0, max_tokens=80,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}},
    )  # fmt: skip
    person = json.loads(answer.choices[0].message.content or "")
    jsonschema.validate(person, PERSON)
    assert person["age"] == 34 and "Maria" in person["name"]
    assert answer.choices[0].finish_reason == "stop"


def test_json_object_regex_and_grammar(client: OpenAI) -> None:
    """Every kind of constraint goes all the way to the masks."""
    loose = client.chat.completions.create(
        model=MODEL, messages=EXTRACT, temperature=0, max_tokens=120, response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(loose.choices[0].message.content or ""), dict)
    ask = [{"role": "user", "content": "When was the French Revolution? Answer with a year."}]
    year = client.chat.completions.create(
        model=MODEL, messages=ask, temperature=0.8, seed=3, max_tokens=20, extra_body={"regex": r"1[0-9]{3}"}
    )
    assert re.fullmatch(r"1[0-9]{3}", year.choices[0].message.content or "")
    sums = client.chat.completions.create(
        model=MODEL, messages=ask, temperature=0.8, seed=3, max_tokens=40,
        extra_body={"grammar": 'start: NUMBER "+" NUMBER\nNUMBER: /[0-9]{1,3}/'},
    )  # fmt: skip
    assert re.fullmatch(r"[0-9]{1,3}\+[0-9]{1,3}", sums.choices[0].message.content or "")


def test_the_same_seed_gives_the_same_answer(client: OpenAI) -> None:
    """Reproducibility is what seed is for."""

    def ask(seed: int) -> str | None:
        story = [{"role": "user", "content": "Tell me a story."}]
        answer = client.chat.completions.create(model=MODEL, messages=story, temperature=1, seed=seed, max_tokens=24)
        return answer.choices[0].message.content

    assert ask(7) == ask(7)
    assert len({ask(seed) for seed in (1, 2, 3)}) > 1


def test_models(client: OpenAI) -> None:
    """Clients list the models before they use one."""
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_bad_requests_name_the_field(client: OpenAI) -> None:
    """Wherever a request is refused, gateway, engine or sidecar, the client is told which field was wrong."""
    with pytest.raises(openai.BadRequestError) as temperature:
        client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=-1)
    assert temperature.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=FRANCE)
    with pytest.raises(openai.BadRequestError) as schema:
        client.chat.completions.create(
            model=MODEL, messages=FRANCE, max_tokens=5,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
        )  # fmt: skip
    assert schema.value.param is not None and schema.value.param.startswith("response_format")
    with pytest.raises(openai.BadRequestError) as regex:
        client.chat.completions.create(model=MODEL, messages=FRANCE, max_tokens=5, extra_body={"regex": "("})
    assert regex.value.param == "regex"
