"""JSON Schema's keywords: those that outputs are held to, those that say nothing about them, and all others.

A keyword that is not known is refused, not ignored: it may be a constraint misspelt, or of another dialect. The trial
calls this before it compiles a schema, because llguidance names only some of what it leaves out, and not where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_ENFORCED = frozenset([
    "$ref", "additionalItems", "additionalProperties", "allOf", "anyOf", "const", "enum", "exclusiveMaximum",
    "exclusiveMinimum", "format", "items", "maxItems", "maxLength", "maxProperties", "maximum", "minItems",
    "minLength", "minProperties", "minimum", "multipleOf", "oneOf", "pattern", "patternProperties", "prefixItems",
    "properties", "required", "type"
])  # fmt: skip
# Those of tools that many schemas come from are among them: of OpenAPI, Pydantic, editors.
_ANNOTATIONS = frozenset([
    "$anchor", "$comment", "$defs", "$id", "$schema", "$vocabulary", "default", "definitions", "deprecated",
    "description", "discriminator", "enumDescriptions", "enumNames", "example", "examples", "externalDocs", "id",
    "markdownDescription", "readOnly", "title", "writeOnly", "xml"
])  # fmt: skip
_FORMATS = frozenset(["date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"])
_INSTEAD = {"nullable": 'write "type": [..., "null"]', "if": "use anyOf", "not": "use enum or anyOf"}
_ONE_SCHEMA = ("additionalItems", "additionalProperties", "items")
_LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_BY_NAME = ("patternProperties", "properties")
_DEFINITIONS = ("$defs", "definitions")
_MOST = 10

_Place = tuple[str, ...]


def unsupported(schema: dict[str, Any]) -> str:
    """What in `schema` can't be enforced, each with its place in the schema; empty if nothing."""
    found = []
    for place, part in _parts(schema):
        where = f" at {'.'.join(place)}" if place else ""
        for keyword in part:
            if keyword not in _ENFORCED and keyword not in _ANNOTATIONS and not keyword.startswith("x-"):
                instead = f" ({_INSTEAD[keyword]})" if keyword in _INSTEAD else ""
                found.append(f'"{keyword[:100]}"{where}{instead}')
        kind, form = part.get("type", "string"), part.get("format")
        if isinstance(form, str) and form not in _FORMATS and "string" in (kind if isinstance(kind, list) else [kind]):
            found.append(f'"format": "{form[:100]}"{where}')
    if not found:
        return ""
    more = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
    return f"these keywords are not supported: {', '.join(found[:_MOST])}{more}"


def _parts(schema: dict[str, Any]) -> Iterator[tuple[_Place, dict[str, Any]]]:
    """The schema and every schema in it that applies to outputs, with its place."""
    waiting: list[tuple[_Place, Any]] = [((), schema)]
    seen: set[int] = set()
    while waiting:
        place, part = waiting.pop()
        if not isinstance(part, dict) or id(part) in seen:
            continue
        seen.add(id(part))
        yield place, part
        waiting.extend(reversed(list(_children(schema, place, part))))


def _children(schema: dict[str, Any], place: _Place, part: dict[str, Any]) -> Iterator[tuple[_Place, Any]]:
    for keyword in part:
        value = part[keyword]
        if keyword in _ONE_SCHEMA and isinstance(value, dict):
            yield (*place, keyword), value
        elif keyword in _LISTS and isinstance(value, list):
            yield from (((*place, keyword, str(index)), item) for index, item in enumerate(value))
        elif keyword in _BY_NAME and isinstance(value, dict):
            yield from (((*place, keyword, name), item) for name, item in value.items())
        elif keyword == "$ref" and isinstance(value, str):
            yield from _target(schema, value)


def _target(schema: dict[str, Any], reference: str) -> Iterator[tuple[_Place, Any]]:
    """What a reference names. One that is no path in this schema may name any of its definitions."""
    if not reference.startswith("#/") and reference != "#":
        for keyword in _DEFINITIONS:
            if isinstance(definitions := schema.get(keyword), dict):
                yield from (((keyword, name), item) for name, item in definitions.items())
        return
    steps = [step.replace("~1", "/").replace("~0", "~") for step in reference.split("/")[1:]]
    value: Any = schema
    for step in steps:
        if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, dict) and step in value:
            value = value[step]
        else:
            return  # llguidance says that it does not exist
    yield tuple(steps), value
