"""Which keywords of JSON Schema are refused, and what is said of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from quire.sidecar.grammar.keywords import unsupported


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"not": {}}, '"not" (use enum or anyOf)'),
        ({"properties": {"a": {"items": {"uniqueItems": True}}}}, '"uniqueItems" at properties.a.items'),
        ({"anyOf": [{}, {"if": {}, "then": {}}]}, '"if" at anyOf.1 (use anyOf), "then" at anyOf.1'),
        ({"properties": {"a": {"type": "string", "nullable": True}}}, '"nullable" at properties.a (write "type"'),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"contains": {}}}}, '"contains" at $defs.a/b'),
        ({"$ref": "other", "$defs": {"o": {"$id": "other", "propertyNames": {}}}}, '"propertyNames" at $defs.o'),
        ({"items": [{"minContains": 1}], "additionalItems": {"maxContains": 1}}, '"maxContains" at additionalItems'),
        ({"patternProperties": {"^a": {"dependentRequired": {}}}}, '"dependentRequired" at patternProperties.^a'),
        ({"allOf": [{"unevaluatedProperties": False}]}, '"unevaluatedProperties" at allOf.0'),
        ({"properties": {"mail": {"format": "idn-email"}}}, '"format": "idn-email" at properties.mail'),
        ({"type": "string", "contentEncoding": "base64"}, '"contentEncoding"'),
        # Misspelt, or another thing than a schema altogether: each would allow anything.
        ({"type": "object", "propertis": {"a": {}}}, '"propertis"'),
        ({"name": "person", "strict": True, "schema": {"type": "object"}}, '"name", "strict", "schema"'),
        ({f"k{count}": 0 for count in range(15)}, '"k9" and 5 more'),
    ],
)
def test_what_is_not_enforced_is_refused_by_name_and_place(schema: dict[str, Any], words: str) -> None:
    """Output would break a schema that was accepted."""
    message = unsupported(schema)
    assert message.startswith("these keywords are not supported: ")
    assert words in message


@pytest.mark.parametrize(
    "schema",
    [
        {"title": "T", "description": "d", "default": 1, "$schema": "x", "x-kubernetes-list-type": "set"},
        {"properties": {"not": {"type": "string"}, "if": {}}, "required": ["not"]},
        {"enum": [{"not": 1}], "const": {"contains": 2}, "default": {"uniqueItems": 1}},
        {"$defs": {"unused": {"not": {}}}},
        {"type": "integer", "format": "int64"},
        {"additionalProperties": False, "items": True, "anyOf": [True, False]},
        {"$ref": "#/$defs/missing/0"},
        {"$ref": "#"},
    ],
)
def test_what_says_nothing_about_outputs_passes(schema: dict[str, Any]) -> None:
    """Schemas as tools write them, or properties that are called like keywords, would be refused."""
    assert unsupported(schema) == ""


def test_a_schema_that_refers_to_itself_ends() -> None:
    """The check would go round for ever."""
    node = {"properties": {"next": {"$ref": "#/$defs/node"}, "uniqueItems": {"uniqueItems": True}}}
    message = unsupported({"$ref": "#/$defs/node", "$defs": {"node": node}})
    assert message.endswith(': "uniqueItems" at $defs.node.properties.uniqueItems')


def test_pydantics_schemas_pass() -> None:
    """The commonest source of schemas could not be used."""

    class Pet(BaseModel):
        kind: str = Field(pattern="^[a-z]+$", examples=["cat"], description="which")
        age: int = Field(ge=0, le=40)

    class Owner(BaseModel):
        pets: list[Pet] = Field(min_length=1)
        best: Pet | None = None

    assert unsupported(Owner.model_json_schema()) == ""


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["$ref", "items", "properties", "anyOf", "type", "format", "$defs", "a"]), inner, max_size=4
        ),
    ),
)


@given(st.dictionaries(st.sampled_from(["$ref", "items", "properties", "allOf", "$defs", "type"]), values))
def test_any_json_is_read(schema: dict[str, Any]) -> None:
    """A schema of the wrong shape would end in a traceback instead of the message that says what is wrong."""
    assert isinstance(unsupported(json.loads(json.dumps(schema))), str)
