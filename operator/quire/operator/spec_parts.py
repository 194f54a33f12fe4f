"""What parts of the resource have in common: how names, quantities and images are written; resources and Secrets."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field

from quire.operator.rules import Rule, Spec, matches

NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
QUANTITY = r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?"
# From a mebibyte on: no engine starts with less.
MEMORY = r"[1-9][0-9]*(\.[0-9]+)?(G|T|Mi|Gi|Ti)"
RELATIVE_PATH = r"([^/.][^/]*|\.[^/.][^/]*)(/([^/.][^/]*|\.[^/.][^/]*))*/?"
# A registry host, a path, and a tag or a digest.
IMAGE = r"[a-zA-Z0-9][-a-zA-Z0-9.:]*(/[a-z0-9][-._a-z0-9]*)*(:[\w][-.\w]*)?(@sha256:[0-9a-f]{64})?"

NAME_ADVICE = "lower-case letters, digits, '-' and '.', such as my-name"
IMAGE_ADVICE = "write an image as REGISTRY/PATH:TAG or REGISTRY/PATH@sha256:DIGEST"

Resources = Annotated[
    dict[str, int | Annotated[str, Meta(max_length=32)]],
    Meta(description="Quantities by resource name, such as cpu: 4 and memory: 16Gi.", max_length=8),
]


def _quantities(on: str) -> Rule:
    pattern = QUANTITY.replace("\\", "\\\\")
    compiled = matches("", QUANTITY, "").holds
    return Rule(
        f"self.all(name, type(self[name]) == int ? self[name] >= 0 : string(self[name]).matches('^{pattern}$'))",
        f"{on} needs quantities: write a number with an optional unit, such as 2, 500m, 16Gi",
        lambda values: all(value >= 0 if isinstance(value, int) else compiled(value) for value in values.values()),
        on,
    )


class ResourceSpec(Spec, frozen=True):
    """What a container asks for and may take."""

    requests: Resources = field(default_factory=dict)
    limits: Resources = field(default_factory=dict)

    rules = (_quantities("requests"), _quantities("limits"))


class SecretKey(Spec, frozen=True):
    """One entry of a Secret in the service's namespace."""

    name: Annotated[str, Meta(description="The Secret.", min_length=1, max_length=253)]
    key: Annotated[str, Meta(description="The entry in it.", min_length=1, max_length=253)] = "token"

    rules = (
        matches("name", NAME, f"name is not a Secret's name: use {NAME_ADVICE}"),
        matches("key", r"[-._a-zA-Z0-9]+", "key is not an entry's name: use letters, digits, '-', '_' and '.'"),
    )
