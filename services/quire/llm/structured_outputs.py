"""What an output must look like: vLLM's StructuredOutputsParams or a Python type, as the contract's constraint.

Nothing here needs the grammar packages until a constraint is asked for.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from quire.llm.arguments import ArgumentError, Unsupported, named_arguments
from quire.service.errors import ConfigError, InvalidRequestError
from quire.service.request import Constraint, ConstraintKind

_PACKAGES = ("llguidance", "outlines", "jsonschema")
_INSTALL = "pip install 'quire[llm,grammar]'"

_UNSUPPORTED: Unsupported = {
    "disable_any_whitespace": ((True, False), "leave it out: JSON has at most one blank after a comma or a colon"),
    "disable_fallback": ((True, False), "leave it out: there is one backend"),
    "disable_additional_properties": ((False,), "put additionalProperties into the schema"),
    "structural_tag": ((None,), "use grammar"),
    "whitespace_pattern": ((None,), "leave it out: JSON has at most one blank after a comma or a colon"),
}


@named_arguments(_UNSUPPORTED)
@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one of these; the whole output matches it. Raises InvalidRequestError.

    json: a JSON schema as a dict or a string, or a Pydantic model. regex: a regular expression. choice: the texts to
    choose from. grammar: a context-free grammar in Lark's notation. json_object: any JSON object.
    """

    json: Any = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(field.name for field in fields(self))
            raise InvalidRequestError(
                f"StructuredOutputsParams has {' and '.join(given) or 'nothing'} set: give exactly one of {names}",
                field="structured_outputs",
            )
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise ArgumentError(f"{name} is {getattr(self, name)!r}: give a string", field=name)
        choice = self.choice
        if choice is not None and (isinstance(choice, str) or not all(isinstance(c, str) and c for c in choice)):
            raise ArgumentError(f"choice is {choice!r}: give a list of texts that are not empty", field="choice")

    @property
    def constraint(self) -> Constraint:
        """The contract's form."""
        if self.json is not None:
            return Constraint(ConstraintKind.JSON_SCHEMA, _schema(self.json))
        if self.regex is not None:
            return Constraint(ConstraintKind.REGEX, self.regex)
        if self.choice is not None:
            # Lark's strings are JSON's.
            return Constraint(ConstraintKind.LARK, "start: " + " | ".join(map(json_module.dumps, self.choice)))
        if self.grammar is not None:
            return Constraint(ConstraintKind.LARK, self.grammar)
        return Constraint(ConstraintKind.JSON_OBJECT)


def constraint_of(structured_outputs: Any) -> Constraint | None:
    """The constraint that SamplingParams.structured_outputs stands for.

    Raises InvalidRequestError if it stands for none, ConfigError if that takes a package that is not installed.
    """
    if structured_outputs is None:
        return None
    if isinstance(structured_outputs, StructuredOutputsParams):
        return structured_outputs.constraint
    if isinstance(structured_outputs, Mapping):
        raise ArgumentError(
            "structured_outputs is a dict: give StructuredOutputsParams(json=…) for a schema",
            field="structured_outputs",
        )
    try:
        from quire.sidecar.grammar.output_types import constraint_of as constraint_of_type
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    return constraint_of_type(structured_outputs)


def missing_package(error: ModuleNotFoundError) -> Exception:
    """What to raise for a grammar package that is not installed; the error itself if it is about something else."""
    package = (error.name or "").partition(".")[0]
    if package not in _PACKAGES:
        return error
    return ConfigError(
        f"structured_outputs needs {package}, which is not installed: run {_INSTALL}", field="structured_outputs"
    )


def _schema(schema: Any) -> str:
    if isinstance(schema, str):
        return schema
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    try:
        return json_module.dumps(schema)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"json is {schema!r}, no JSON schema ({error}): give a dict, a string or a Pydantic model", field="json"
        ) from error
