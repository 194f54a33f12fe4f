"""The resource: its CRD is made of the types, stays small, and explains itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from quire.operator.crd import crd, render
from quire.operator.spec import parse
from quire.service.errors import ConfigError

ROOT = Path(__file__).parents[2]
FILE = ROOT / "manifests/crd/quire.dev_inferenceservices.yaml"


def test_the_file_is_what_the_types_say() -> None:
    """A field that the operator knows and the cluster doesn't would be dropped without a word."""
    assert FILE.read_text() == render(), f"run python -m quire.operator.crd > {FILE.relative_to(ROOT)}"


def test_it_stays_small() -> None:
    """kubectl apply keeps a copy in an annotation, whose limit is 256 KiB; a person reads it in one sitting."""
    assert FILE.stat().st_size < 60_000


def fields(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, each in schema.get("properties", {}).items():
        yield f"{path}.{name}", each
        yield from fields(each, f"{path}.{name}")
    if "items" in schema:
        yield from fields(schema["items"], f"{path}[]")


def test_every_field_has_a_description() -> None:
    """`kubectl explain` is the manual that people have at hand."""
    schema = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    found = dict(fields(schema))
    assert len(found) > 60
    assert [path for path, each in found.items() if path != ".metadata" and not each.get("description")] == []


def test_defaults_are_the_ones_that_the_operator_uses() -> None:
    """An empty spec must mean the same to the API server, which writes defaults in, and to `render`, which doesn't."""
    schema = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]

    def defaulted(schema: dict[str, Any], value: Any) -> Any:
        for name, each in schema.get("properties", {}).items():
            if "default" in each:
                value.setdefault(name, yaml.safe_load(yaml.safe_dump(each["default"])))
            if name in value:
                defaulted(each, value[name])
        return value

    metadata = {"name": "demo"}
    filled = defaulted(schema, {})
    assert filled["engine"]["replicas"] == 1
    assert parse({"metadata": metadata, "spec": filled}) == parse({"metadata": metadata})


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"engine": {"replicaz": 1}}, "spec.engine: Object contains unknown field `replicaz`"),
        ({"engine": {"replicas": "2"}}, "spec.engine.replicas: Expected `int`, got `str`"),
        ({"model": {"hub": {"name": "x"}}}, "spec.model.hub.name: Expected `str` of length >= 3"),
        ({"model": {"hub": {"name": "no owner"}}}, "spec.model.hub: name is not a hub name: write OWNER/NAME"),
    ],
)
def test_render_names_the_field(spec: dict[str, Any], said: str) -> None:
    """Without a cluster nobody else tells what is wrong."""
    with pytest.raises(ConfigError, match=said.replace("(", r"\(").replace("[", r"\[")):
        parse({"metadata": {"name": "demo"}, "spec": spec})
