"""The resource's speculative decoding: whether engines draft what may follow, and with what."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from quire.operator.rules import Rule, Spec, matches
from quire.operator.spec_parts import RELATIVE_PATH


class SpeculationSpec(Spec, frozen=True):
    """The outputs are the same with drafts as without."""

    enabled: Annotated[
        bool,
        Meta(
            description="Engines on CPUs draft from what was said before; those on GPUs do with a head only. Each step "
            "verifies as many drafts as are expected to make it faster."
        ),
    ] = True
    tokens: Annotated[int, Meta(description="Drafts of a request that a step verifies at most.", ge=1, le=64)] = 8
    head: Annotated[
        Annotated[str, Meta(min_length=1, max_length=1024)] | None,
        Meta(
            description="Folder of an EAGLE head for the model, on the volume of spec.model.claim or in the image of "
            "spec.model.image."
        ),
    ] = None

    rules = (
        matches("head", RELATIVE_PATH, "head leaves the model's volume: write it relative and without '..'"),
        Rule(
            "!has(self.head) || !has(self.enabled) || self.enabled",
            "speculation has a head and is not enabled: leave the head out, or write enabled: true",
            lambda speculation: speculation.head is None or speculation.enabled,
        ),
    )
