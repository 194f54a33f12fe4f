"""LLM.chat and structured output, on the embedded model."""

from __future__ import annotations

import json
import re
from enum import Enum
from pathlib import Path
from typing import Literal

import jsonschema
import pytest
from pydantic import BaseModel
from served import MODEL

from quire.llm import LLM, SamplingParams, StructuredOutputsParams
from quire.service.checkpoint.locate import EMBEDDED_MODEL
from quire.service.errors import InvalidRequestError

README = Path(__file__).parents[2] / "README.md"

ASK = [{"role": "user", "content": "Give the name and age of Maria Lopez, who is 34 years old, as JSON."}]
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "age"],
    "properties": {"name": {"type": "string", "maxLength": 30}, "age": {"type": "integer", "minimum": 1}},
}


class Person(BaseModel):
    name: str
    age: int


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


def answer(llm: LLM, structured_outputs: object, max_tokens: int = 80, **params: float) -> str:
    asked = SamplingParams(temperature=0, max_tokens=max_tokens, structured_outputs=structured_outputs, **params)  # type: ignore[arg-type]
    completion = llm.chat(ASK, asked, use_tqdm=False)[0].outputs[0]
    assert completion.error is None
    return completion.text


def test_it_answers(smollm: LLM) -> None:
    """Without it the chat template, the tokenizer or the end of a turn could be wrong."""
    assert MODEL == EMBEDDED_MODEL
    france = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    parts = [{"role": "user", "content": [{"type": "text", "text": france[0]["content"]}]}]
    params = SamplingParams(temperature=0, max_tokens=40)
    outputs = smollm.chat([france, [{"role": "user", "content": "Say hello."}], parts], params, use_tqdm=False)
    first = outputs[0].outputs[0]
    assert "Paris" in first.text and "<|im_end|>" not in first.text and first.finish_reason == "stop"
    assert outputs[0].prompt is not None and outputs[0].prompt.endswith("<|im_start|>assistant\n")
    assert outputs[2].outputs[0].text == first.text != outputs[1].outputs[0].text
    bare = smollm.chat(france, params, chat_template="{{ messages[0].content }}", use_tqdm=False)
    assert bare[0].prompt == france[0]["content"]


def test_every_kind_of_structure(smollm: LLM) -> None:
    """Without it an output could break the rule that it was to keep."""
    jsonschema.validate(json.loads(answer(smollm, StructuredOutputsParams(json=SCHEMA))), SCHEMA)
    assert answer(smollm, StructuredOutputsParams(json=json.dumps(SCHEMA))).startswith('{"name"')
    assert Person.model_validate_json(answer(smollm, StructuredOutputsParams(json=Person))).age
    assert re.fullmatch(r"\d{3}-\d{4}", answer(smollm, StructuredOutputsParams(regex=r"\d{3}-\d{4}")))
    odd = ['yes, "really"', "no\\way\n", "é | ü"]
    assert answer(smollm, StructuredOutputsParams(choice=odd)) in odd
    assert set(answer(smollm, StructuredOutputsParams(grammar='start: "ab"+ "c"'), 9)) <= set("abc")
    assert isinstance(json.loads(answer(smollm, StructuredOutputsParams(json_object=True), 200)), dict)


def test_python_types(smollm: LLM) -> None:
    """Without it whoever has a type would have to write its schema."""
    assert Person.model_validate_json(answer(smollm, Person)).name
    assert answer(smollm, Literal["north", "south"]) in ("north", "south")
    assert answer(smollm, Colour) in ("red", "blue")
    with pytest.raises(InvalidRequestError, match="no output type"):
        answer(smollm, object())
    with pytest.raises(InvalidRequestError, match="StructuredOutputsParams\\(json="):
        answer(smollm, SCHEMA)


def test_constraints_do_not_touch_one_another(smollm: LLM) -> None:
    """Without it a mask could land on another sequence of the batch, or outlive its own."""
    digits, letters = StructuredOutputsParams(regex="[0-9]{1,40}"), StructuredOutputsParams(regex="[a-z]{1,40}")
    params = [
        SamplingParams(temperature=1, max_tokens=16, seed=seed, structured_outputs=structure, n=2)
        for seed, structure in enumerate([digits, letters, None] * 3)
    ]
    outputs = smollm.generate(["Write: "] * 9, params, use_tqdm=False)
    for index, output in enumerate(outputs):
        for completion in output.outputs:
            expected = ("[0-9]+", "[a-z]+", "(?s:.)*")[index % 3]
            assert re.fullmatch(expected, completion.text), completion.text


@pytest.mark.parametrize(
    ("structure", "words"),
    [
        (StructuredOutputsParams(json={"type": "int"}), r"constraint.json_schema can't be compiled: at type: 'int'"),
        (StructuredOutputsParams(json="{"), "it is not JSON"),
        (StructuredOutputsParams(regex="(a"), "constraint.regex can't be compiled"),
        (StructuredOutputsParams(grammar="start: missing"), "constraint.lark can't be compiled"),
    ],
)
def test_a_wrong_constraint_is_refused_before_anything_starts(
    smollm: LLM, structure: StructuredOutputsParams, words: str
) -> None:
    """Without it a mistake in a schema would show in the middle of a job, or as a free output."""
    steps = smollm.metrics().steps
    params = [SamplingParams(max_tokens=4), SamplingParams(structured_outputs=structure)]
    with pytest.raises(InvalidRequestError, match=rf"prompts\[1\]: .*{words}"):
        smollm.generate(["a", "b"], params, use_tqdm=False)
    assert smollm.metrics().steps == steps
    assert answer(smollm, StructuredOutputsParams(regex="ok")) == "ok"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages is empty"),
        ([[]], "messages is empty"),
        ("hi", "give a list of messages"),
        ([{"content": "hi"}], r"messages\[0\] is .*: give a dict with role and content"),
        ([[{"role": "user", "content": "a"}], [{"role": "user", "content": 5}]], r"messages\[1\]\[0\].content is 5"),
        ([{"role": "robot", "content": "hi"}], r"messages\[0\].role is 'robot'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content is .*: give a text"),
        ([{"role": "user", "content": "word " * 2000}], "the model's context 1024"),
    ],
)
def test_wrong_messages(smollm: LLM, messages: object, words: str) -> None:
    """Without it a conversation of a wrong shape would fail somewhere inside."""
    with pytest.raises(InvalidRequestError, match=words):
        smollm.chat(messages, use_tqdm=False)  # type: ignore[arg-type]


def test_a_model_without_a_template_says_so(smollm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a base model would be given some other model's format."""
    text = smollm._text
    monkeypatch.setattr(smollm, "_text", type("Text", (), {"chat_template": None, "bos_token": "", "eos_token": ""}))
    with pytest.raises(InvalidRequestError, match="no chat template: give chat_template"):
        smollm.chat(ASK, use_tqdm=False)
    monkeypatch.undo()
    assert smollm._text is text


@pytest.mark.slow
def test_the_readmes_example(capsys: pytest.CaptureFixture[str]) -> None:
    """Without it what a newcomer copies could fail."""
    section = README.read_text().split("## As a library")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    exec(compile(code, str(README), "exec"), {})
    shown = capsys.readouterr().out
    assert "Paris" in shown and "Person(name='Maria Lopez', age=34)" in shown
