"""The CustomResourceDefinition, made of the types in `spec` and `status_types`.

`python -m quire.operator.crd` prints it; manifests/crd holds the output, and a test keeps the two equal.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from quire.operator import names
from quire.operator.plain_yaml import dump
from quire.operator.rules import Rule, Spec
from quire.operator.spec import InferenceService, InferenceServiceSpec
from quire.operator.status_types import Status

Schema = dict[str, Any]

_COLUMNS = (
    ("Ready", "string", '.status.conditions[?(@.type=="Ready")].status', 0),
    ("Reason", "string", '.status.conditions[?(@.type=="Ready")].reason', 0),
    ("Engines", "string", ".status.engines", 0),
    ("Load", "string", ".status.load", 0),
    ("Model", "string", ".status.model", 0),
    ("URL", "string", ".status.url", 0),
    ("Message", "string", '.status.conditions[?(@.type=="Ready")].message', 1),
    ("Age", "date", ".metadata.creationTimestamp", 0),
)


def crd() -> Schema:
    """The CRD as the API's JSON has it."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": names.PLURAL,
                "singular": names.KIND.lower(),
                "shortNames": ["qis"],
                "categories": ["quire"],
            },
            "versions": [
                {
                    "name": names.VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": _root()},
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.engine.replicas",
                            "statusReplicasPath": ".status.replicas",
                            "labelSelectorPath": ".status.selector",
                        },
                    },
                    "additionalPrinterColumns": [
                        {"name": name, "type": kind, "jsonPath": path, "priority": priority}
                        for name, kind, path, priority in _COLUMNS
                    ],
                }
            ],
        },
    }


def _root() -> Schema:
    rule = InferenceService.name_rule
    name_rule = {"rule": rule.cel.replace("self.", "self.metadata.name."), "message": rule.message}
    group = InferenceService.group_name_rule
    return {
        "description": "A model served to many users by Quire: gateways, routers and engines that the operator keeps.",
        "type": "object",
        "properties": {
            "apiVersion": {"description": f"{names.GROUP} and a version.", "type": "string"},
            "kind": {"description": names.KIND, "type": "string"},
            "metadata": {"type": "object"},
            "spec": {**_structural(InferenceServiceSpec), "default": {}},
            "status": _structural(Status),
        },
        "x-kubernetes-validations": [name_rule, {"rule": group.cel, "message": group.message}],
    }


def _structural(root: type[msgspec.Struct]) -> Schema:
    """`root` as Kubernetes wants schemas: without references, unions with null and closed objects."""
    _, components = msgspec.json.schema_components([root])
    rules = {each.__name__: each.rules for each in Spec.__subclasses__()}

    def inline(node: Mapping[str, Any]) -> Schema:
        own_rules: tuple[Rule, ...] = ()
        node = dict(node)
        if node.get("anyOf") and {"type": "null"} in node["anyOf"]:
            (only,) = [each for each in node.pop("anyOf") if each != {"type": "null"}]
            node = {**only, **node}
        if reference := node.pop("$ref", ""):
            name = reference.rpartition("/")[2]
            is_optional = "default" in node
            node = {**components[name], **node}
            if not is_optional and not node.get("required"):
                # A part that is always there: the defaults inside it apply also where nobody wrote it.
                node["default"] = {}
            own_rules = rules.get(name, ())
        if node.get("anyOf"):
            # A quantity may be written as a number.
            longest = max(each.get("maxLength", 0) for each in node["anyOf"])
            node = {
                "x-kubernetes-int-or-string": True,
                "anyOf": [{"type": "integer"}, {"type": "string"}],
                "maxLength": longest,
            }
        for unwanted in ("title", *(["required"] if not node.get("required") else [])):
            node.pop(unwanted, None)
        if node.get("additionalProperties") is False:
            del node["additionalProperties"]
        elif "additionalProperties" in node:
            node["additionalProperties"] = inline(node["additionalProperties"])
        if "enum" in node:
            node["type"] = "string"
        if node.get("default", 0) in (None, [], (), ""):
            del node["default"]
        if "properties" in node:
            node["properties"] = {name: inline(each) for name, each in node["properties"].items()}
        if "items" in node:
            node["items"] = inline(node["items"])
            node["items"].pop("default", None)
        _add_rules(node, own_rules)
        return node

    whole = inline({"$ref": f"#/$defs/{root.__name__}"})
    whole.pop("default", None)
    if root is Status:
        whole["properties"]["conditions"] |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    return whole


def _add_rules(node: Schema, rules: tuple[Rule, ...]) -> None:
    for rule in rules:
        where = node["properties"][_camel(rule.on)] if rule.on else node
        where.setdefault("x-kubernetes-validations", []).append({"rule": rule.cel, "message": rule.message})


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(each.title() for each in rest)


def render() -> str:
    """The CRD as the file in manifests/crd has it."""
    note = "# Made by `python -m quire.operator.crd`: change operator/quire/operator/spec.py instead.\n"
    return note + dump(crd())


if __name__ == "__main__":
    sys.stdout.write(render())
