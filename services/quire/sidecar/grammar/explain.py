"""Where in a refused JSON Schema the mistake is: llguidance says what is wrong but not where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jsonschema  # type: ignore[import-untyped]

from quire.service.errors import InvalidRequestError
from quire.service.request import Constraint, ConstraintKind
from quire.sidecar.grammar.compile import refusal
from quire.sidecar.grammar.keywords import unsupported


@contextmanager
def explained(constraint: Constraint) -> Iterator[None]:
    """What compiles `constraint` in here has its error say where the mistake is, if that can be told.

    Raises InvalidRequestError before, if a schema holds a keyword that would not be enforced. This may be slow and
    recurse deeply: do it where the compiler is tried.
    """
    if reason := _ignored_keywords(constraint):
        raise refusal(constraint.kind, reason)
    try:
        yield
    except InvalidRequestError as error:
        place = _explain(constraint)
        if not place:
            raise
        raise refusal(constraint.kind, place) from error


def _ignored_keywords(constraint: Constraint) -> str:
    try:
        schema = _schema(constraint)
    except (json.JSONDecodeError, RecursionError):
        return ""
    return unsupported(schema) if isinstance(schema, dict) else ""


def _explain(constraint: Constraint) -> str:
    """The place and kind of the mistake, as in `properties.age.type: 'int' is not …`; empty if this can't tell.

    Checks the schema against JSON Schema's own schema.
    """
    if constraint.kind is not ConstraintKind.JSON_SCHEMA or not constraint.source:
        return ""
    try:
        schema = _schema(constraint)
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


def _schema(constraint: Constraint) -> Any:
    is_schema = constraint.kind is ConstraintKind.JSON_SCHEMA and constraint.source
    return json.loads(constraint.source) if is_schema else None
