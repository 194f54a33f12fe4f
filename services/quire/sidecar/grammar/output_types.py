"""Python's own ways to say what an output looks like, as constraints: what outlines puts in front of a grammar.

For callers in Python: the offline API, tests, programs that make requests. The sidecar's process itself never imports
this: outlines takes a second to import and brings transformers along.
"""

from __future__ import annotations

from typing import Any

from outlines.types.dsl import CFG, JsonSchema, Term, python_types_to_terms, to_regex

from quire.service.errors import InvalidRequestError
from quire.service.request import Constraint, ConstraintKind


def constraint_of(output_type: Any) -> Constraint:
    """The constraint that `output_type` stands for.

    It may be a Pydantic model, a dataclass, a TypedDict, a Literal, an Enum, a basic type such as `int`, or one of
    outlines' terms (`JsonSchema`, `Regex`, `CFG` and its regex language). Raises InvalidRequestError for anything else.
    """
    if isinstance(output_type, Constraint):
        return output_type
    try:
        term: Term = python_types_to_terms(output_type)
        if isinstance(term, JsonSchema):
            if term.whitespace_pattern is not None:
                raise ValueError("a whitespace_pattern is not supported: leave it out")
            return Constraint(ConstraintKind.JSON_SCHEMA, term.schema)
        if isinstance(term, CFG):
            return Constraint(ConstraintKind.LARK, term.definition)
        return Constraint(ConstraintKind.REGEX, to_regex(term))
    except (TypeError, ValueError, NotImplementedError, RecursionError) as error:
        raise InvalidRequestError(f"{output_type!r} is no output type: {error}", field="constraint") from error
