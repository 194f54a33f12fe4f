"""The many ways in which a body may say what the output must match, to the one constraint. `requests` calls it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from quire.gateway.openai import not_done
from quire.gateway.openai.messages import check_name
from quire.gateway.openai.types import Body, ResponseFormat, StructuredOutputs
from quire.service.errors import InvalidRequestError
from quire.service.request import Constraint, ConstraintKind

_FORMATS = ("text", "json_object", "json_schema")


def read_constraint(body: Body) -> tuple[Constraint | None, str]:
    """The constraint, and the client's name of it. Raises InvalidRequestError, also if there are several."""
    given = list(_given(body))
    if not given:
        return None, ""
    if len(given) > 1:
        names = [name.partition(".")[0] for name, _ in given]
        raise InvalidRequestError(f"{' and '.join(names)} both constrain the output: give at most one", field=names[-1])
    (name, constraint) = given[0]
    return constraint, name


def _given(body: Body) -> Iterator[tuple[str, Constraint]]:
    if body.response_format is not None and (constraint := _format(body.response_format)) is not None:
        schema = constraint.kind is ConstraintKind.JSON_SCHEMA
        yield "response_format.json_schema.schema" if schema else "response_format", constraint
    if body.structured_outputs is not None:
        yield _structured(body.structured_outputs)
    for name, (kind, value) in {
        "guided_json": (ConstraintKind.JSON_SCHEMA, body.guided_json),
        "guided_regex": (ConstraintKind.REGEX, body.guided_regex),
        "guided_grammar": (ConstraintKind.LARK, body.guided_grammar),
        "regex": (ConstraintKind.REGEX, body.regex),
        "grammar": (ConstraintKind.LARK, body.grammar),
    }.items():
        if value is not None:
            yield name, _source(name, kind, value)
    if body.guided_choice is not None:
        yield "guided_choice", _choice("guided_choice", body.guided_choice)
    if body.guided_json_object:
        yield "guided_json_object", Constraint(ConstraintKind.JSON_OBJECT)


def _structured(wanted: StructuredOutputs) -> tuple[str, Constraint]:
    not_done.refuse(wanted, not_done.IN_STRUCTURED_OUTPUTS, "structured_outputs.")
    values: dict[str, Any] = {
        "json": wanted.json,
        "regex": wanted.regex,
        "choice": wanted.choice,
        "grammar": wanted.grammar,
        "json_object": wanted.json_object or None,
    }
    given = [name for name, value in values.items() if value is not None]
    if len(given) != 1:
        raise InvalidRequestError(
            f"structured_outputs has {' and '.join(given) or 'nothing'} set: give exactly one of {', '.join(values)}",
            field="structured_outputs",
        )
    name = f"structured_outputs.{given[0]}"
    match given[0]:
        case "choice":
            return name, _choice(name, values["choice"])
        case "json_object":
            return name, Constraint(ConstraintKind.JSON_OBJECT)
        case "json":
            return name, _source(name, ConstraintKind.JSON_SCHEMA, values["json"])
        case "regex":
            return name, _source(name, ConstraintKind.REGEX, values["regex"])
        case _:
            return name, _source(name, ConstraintKind.LARK, values["grammar"])


def _source(name: str, kind: ConstraintKind, value: dict[str, Any] | str) -> Constraint:
    if value == "":
        raise InvalidRequestError(f"{name} is empty: leave it out or give one", field=name)
    if isinstance(value, str) and kind is ConstraintKind.JSON_SCHEMA:
        try:
            value = msgspec.json.decode(value, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequestError(f"{name} is not the text of a JSON object: {error}", field=name) from error
    return Constraint(kind, value if isinstance(value, str) else msgspec.json.encode(value).decode())


def _choice(name: str, choices: Sequence[str]) -> Constraint:
    if not choices or not all(choices):
        problem = "holds an empty text: remove it" if choices else "is empty: give the texts to choose from"
        raise InvalidRequestError(f"{name} {problem}", field=name)
    # Lark's strings are JSON's.
    return Constraint(ConstraintKind.LARK, "start: " + " | ".join(map(json.dumps, choices)))


def _format(wanted: ResponseFormat) -> Constraint | None:
    if wanted.type not in _FORMATS:
        raise InvalidRequestError(
            f"response_format.type is {wanted.type!r}: it must be 'text', 'json_object' or 'json_schema'",
            field="response_format.type",
        )
    schema = wanted.json_schema
    if (schema is not None) != (wanted.type == "json_schema"):
        advice = "set it" if schema is None else "leave it out or set response_format.type to 'json_schema'"
        raise InvalidRequestError(
            f"response_format.json_schema is {'missing' if schema is None else 'set'} and response_format.type is "
            f"{wanted.type!r}: {advice}",
            field="response_format.json_schema",
        )
    if schema is None:
        return Constraint(ConstraintKind.JSON_OBJECT) if wanted.type == "json_object" else None
    check_name("response_format.json_schema.name", schema.name)
    return Constraint(ConstraintKind.JSON_SCHEMA, msgspec.json.encode(schema.schema).decode())
