"""Whatever is drawn through the masks matches its constraint: random walks over random grammars."""

from __future__ import annotations

import ast
import itertools
import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sidecar_process import Row, StepClient, json_schema, lark, regex

from quire.service.checkpoint import TextModel
from quire.service.request import Constraint, ConstraintKind

MAX_TOKENS = 600
JSON_OBJECT = Constraint(ConstraintKind.JSON_OBJECT)
ARITHMETIC = r"""
start: sum
sum: product | sum ("+" | "-") product
product: atom | product ("*" | "/") atom
atom: NUMBER | "(" sum ")" | "-" atom
NUMBER: /[1-9][0-9]{0,3}/
"""

_sequences = itertools.count(1 << 32)
many = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def walk(client: StepClient, model: TextModel, constraint: Constraint, seed: int, free: int = 25) -> str:
    """Draws uniformly from each mask `free` times, then whatever ends soonest, until an end token is drawn."""
    rng = random.Random(seed)
    sequence, accepted, tokens = next(_sequences), [], []
    for count in range(MAX_TOKENS):
        first = constraint if not count else None
        assert not client.fill(Row(sequence, first, accepted))
        allowed = client.allowed()
        assert len(allowed), f"a mask allows nothing after {model.tokenizer.decode(tokens)!r}"
        ends = np.isin(model.eos_token_ids, allowed)
        if ends.any() and (count >= free or len(allowed) == 1 or rng.random() < 0.1):
            client.fill(released=[sequence])
            return model.tokenizer.decode(tokens, skip_special_tokens=False)
        choices = allowed[~np.isin(allowed, model.eos_token_ids)]
        accepted = [nearest_to_the_end(model, choices) if count >= free else int(rng.choice(choices))]
        tokens += accepted
    raise AssertionError(f"no end after {MAX_TOKENS} tokens: {model.tokenizer.decode(tokens)!r}")


def nearest_to_the_end(model: TextModel, choices: npt.NDArray[np.int64]) -> int:
    """The token that closes something; in text, where nearly all are allowed, that is the quote."""
    closing = ['"', "}", "]", ")"] if len(choices) > 1000 else ["}", "]", ")", '"', ",", "null", "0", "1", "a"]
    tokens = [model.tokenizer.token_to_id(token) for token in closing]
    return int(next((token for token in tokens if token in choices), choices[0]))


def objects(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    @st.composite
    def build(draw: st.DrawFn) -> dict[str, Any]:
        names = draw(st.lists(st.sampled_from(["name", "ä", "a b", "日本", 'q"q', "x"]), unique=True, max_size=4))
        return {
            "type": "object",
            "properties": {name: draw(children) for name in names},
            "required": [name for name in names if draw(st.booleans())],
            "additionalProperties": draw(st.sampled_from([False, {"type": "integer"}])),
        }

    return build()


@st.composite
def bounded(
    draw: st.DrawFn, base: dict[str, Any], low: str, high: str, values: st.SearchStrategy[int]
) -> dict[str, Any]:
    first, second = sorted([draw(values), draw(values)])
    limits = {low: first, high: second}
    return base | {name: limits[name] for name in limits if draw(st.booleans())}


leaves = st.one_of(
    bounded({"type": "string"}, "minLength", "maxLength", st.integers(0, 8)),
    bounded({"type": "integer"}, "minimum", "maximum", st.integers(-1000, 1000)),
    bounded({"type": "number"}, "minimum", "maximum", st.integers(-1000, 1000)),
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["rot", "grün", "青", "💙", 'a"b\\c', 1, 2.5, None]},
            {"const": {"k": ["v", 1]}},
            {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            {"type": "string", "format": "date"},
            {"type": ["string", "null"], "maxLength": 4},
        ]
    ),
)
schemas = st.recursive(
    leaves,
    lambda children: st.one_of(
        objects(children),
        st.builds(
            lambda items, limits: limits | {"items": items},
            children,
            bounded({"type": "array"}, "minItems", "maxItems", st.integers(0, 3)),
        ),
        st.builds(lambda first, second: {"anyOf": [first, second]}, children, children),
    ),
    max_leaves=6,
)


@many
@given(schema=schemas, seed=st.integers(0, 2**32))
def test_any_walk_validates_against_its_schema(
    shared_stream: StepClient, smollm: TextModel, schema: Any, seed: int
) -> None:
    """Structured output would not parse, or would parse and break its schema."""
    text = walk(shared_stream, smollm, json_schema(schema), seed)
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@many
@given(seed=st.integers(0, 2**32))
def test_any_walk_of_json_object_is_an_object(shared_stream: StepClient, smollm: TextModel, seed: int) -> None:
    """response_format json_object would return something that is no JSON object."""
    assert isinstance(json.loads(walk(shared_stream, smollm, JSON_OBJECT, seed)), dict)


@many
@given(seed=st.integers(0, 2**32))
def test_a_recursive_schema(shared_stream: StepClient, smollm: TextModel, seed: int) -> None:
    """References would be refused or, worse, not be enforced."""
    schema = {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "integer"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
    }
    text = walk(shared_stream, smollm, json_schema(schema), seed)
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


pieces = st.sampled_from(["a", "bc", "é", "日本", "💙", "[a-f]", "[^a-z]", "[0-9]", r"\.", "x?", "(?:ab|é)", "[äöü]"])
regexes = st.recursive(
    pieces,
    lambda children: st.one_of(
        st.builds(lambda left, right: left + right, children, children),
        st.builds(lambda left, right: f"(?:{left}|{right})", children, children),
        st.builds(
            lambda part, low, more: f"(?:{part}){{{low},{low + more}}}", children, st.integers(0, 2), st.integers(0, 3)
        ),
    ),
    max_leaves=5,
)


@many
@given(source=regexes, seed=st.integers(0, 2**32))
def test_any_walk_matches_its_regex(shared_stream: StepClient, smollm: TextModel, source: str, seed: int) -> None:
    """Output under a regex would not match it as a whole."""
    text = walk(shared_stream, smollm, regex(source), seed)
    assert re.fullmatch(source, text, re.DOTALL), (source, text)


@many
@given(seed=st.integers(0, 2**32))
def test_any_walk_parses_by_its_lark_grammar(shared_stream: StepClient, smollm: TextModel, seed: int) -> None:
    """Nested brackets, which no regex can count, would come out unbalanced."""
    text = walk(shared_stream, smollm, lark(ARITHMETIC), seed)
    assert re.fullmatch(r"[-+*/()0-9]+", text)
    ast.parse(text, mode="eval")


@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        (
            json_schema({"type": "object", "properties": {"name": {"type": "string"}}}),
            '{"name": "Zoë 東京 💙 \\n \\u0000"}',
        ),
        (json_schema({"enum": ["grün", "青い"]}), '"青い"'),
        (json_schema({"type": "object", "properties": {"größe": {"type": "number"}}}), '{"größe": -1.5e-3}'),
        (regex("[äöü日本]{3}💙"), "ü日ä💙"),
        (JSON_OBJECT, '{"a": {"b": [1, true, null, "é"]}, "c":[]}'),
        (JSON_OBJECT, "{}"),
        (lark(ARITHMETIC), "(1+22)*-3"),
    ],
)
def test_valid_outputs_are_allowed_token_by_token(
    stream: StepClient, smollm: TextModel, constraint: Constraint, text: str
) -> None:
    """The masks would forbid what the constraint allows: other alphabets, nesting, the model's own tokens."""
    ids = smollm.tokenizer.encode(text, add_special_tokens=False).ids
    assert not stream.fill(Row(1, constraint))
    for token in ids:
        assert token in stream.allowed(), smollm.tokenizer.decode([token])
        assert not stream.fill(Row(1, accepted=[token]))
    assert set(smollm.eos_token_ids) <= set(stream.allowed())


def test_a_complete_output_allows_exactly_the_end_tokens(stream: StepClient, smollm: TextModel) -> None:
    """The model would ramble on after the object's last brace."""
    ids = smollm.tokenizer.encode('{"ok": true}').ids
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    assert not stream.fill(Row(1, json_schema(schema), ids))
    assert list(stream.allowed()) == list(smollm.eos_token_ids)


def test_an_output_that_may_end_may_also_go_on(stream: StepClient, smollm: TextModel) -> None:
    """A number would stop after its first digit, or never."""
    assert not stream.fill(Row(1, regex("[0-9]+")))
    assert not set(smollm.eos_token_ids) & set(stream.allowed())
    assert not stream.fill(Row(1, accepted=smollm.tokenizer.encode("4").ids))
    allowed = set(stream.allowed())
    assert set(smollm.eos_token_ids) < allowed
    assert smollm.tokenizer.token_to_id("2") in allowed


def test_free_text_never_holds_control_tokens(stream: StepClient, smollm: TextModel) -> None:
    """A string could hold <|im_start|> and forge another turn."""
    assert not stream.fill(Row(1, regex("(?s:.*)")))
    special = {number for number, token in smollm.tokenizer.get_added_tokens_decoder().items() if token.special}
    assert special & set(stream.allowed()) == set(smollm.eos_token_ids)
    assert len(stream.allowed()) > 49_000


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ('{"a":1,"b":[1,2]}', True),
        ('{"a": 1, "b": [1, 2]}', True),
        ('{"a":  1}', False),
        ('{ "a": 1}', False),
        ('{\n"a": 1}', False),
        (' {"a": 1}', False),
        ('{"a": 1 ,"b": [1]}', False),
        ('{"a": 1, "b": [1,\t2]}', False),
    ],
)
@pytest.mark.parametrize("guidance", [{}, {"x-guidance": {"whitespace_flexible": True, "whitespace_pattern": "\\s*"}}])
def test_json_has_one_blank_at_most_and_only_after_separators(
    stream: StepClient, smollm: TextModel, text: str, allowed: bool, guidance: dict[str, Any]
) -> None:
    """A small model would fall into endless blanks, or be kept from the layout it writes by itself."""
    errors = stream.fill(Row(1, json_schema({"type": "object"} | guidance), smollm.tokenizer.encode(text).ids))
    assert (not errors) == allowed
