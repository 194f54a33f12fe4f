"""Where in a refused JSON Schema the mistake is: llguidance says what is wrong but not where."""

from __future__ import annotations

import json

import jsonschema  # type: ignore[import-untyped]
from llguidance import LLMatcher, LLTokenizer

from quire.service.errors import InvalidRequestError
from quire.service.request import Constraint, ConstraintKind
from quire.sidecar.grammar.compile import compile_constraint, refusal


def compile_explained(tokenizer: LLTokenizer, constraint: Constraint) -> LLMatcher:
    """`compile_constraint`, whose error says where the mistake is if that can be told."""
    try:
        return compile_constraint(tokenizer, constraint)
    except InvalidRequestError as error:
        place = explain(constraint)
        if not place:
            raise
        raise refusal(constraint.kind, place) from error


def explain(constraint: Constraint) -> str:
    """The place and kind of the mistake, as in `properties.age.type: 'int' is not …`; empty if this can't tell.

    Checks the schema against JSON Schema's own schema. It may be slow and recurse deeply: run it where the compiler
    is tried.
    """
    if constraint.kind is not ConstraintKind.JSON_SCHEMA or not constraint.source:
        return ""
    try:
        schema = json.loads(constraint.source)
        if not isinstance(schema, dict):
            return 'a schema is a JSON object, such as {"type": "object"}'
        validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        mistake = jsonschema.exceptions.best_match(validator(validator.META_SCHEMA).iter_errors(schema))
    except json.JSONDecodeError as error:
        return f"it is not JSON: {error}"
    except RecursionError:
        return "it is nested too deeply"
    if mistake is None:
        return ""
    place = ".".join(str(step) for step in mistake.absolute_path)
    return f"at {place}: {mistake.message}" if place else mistake.message
