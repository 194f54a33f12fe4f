"""The resource's rollout: how a change of the engines is tried before all of them have it."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from quire.operator.rules import Rule, Spec


class Canary(Spec, frozen=True):
    """Engines of the new kind run beside the others first, with a share of the requests.

    A changed spec.model goes without, since a gateway has the tokenizer of one model.
    """

    weights: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=99)], ...],
        Meta(
            description="Percent of the requests that go to the new engines, step by step.", min_length=1, max_length=8
        ),
    ] = (10,)
    interval_seconds: Annotated[int, Meta(description="How long a step lasts at least.", ge=1, le=86400)] = 300
    min_requests: Annotated[
        int,
        Meta(
            description="How many requests new engines must have had in a step; until then it goes on.",
            ge=0,
            le=1_000_000,
        ),
    ] = 20
    max_error_percent: Annotated[
        int,
        Meta(
            description="New engines that fail a larger share of a step's requests, and a larger one than the others "
            "do, are taken away again.",
            ge=0,
            le=100,
        ),
    ] = 5

    rules = (
        Rule(
            "self.isSorted()",
            "weights fall from one step to the next: write them in rising order, such as [5, 25, 50]",
            lambda weights: list(weights) == sorted(weights),
            "weights",
        ),
    )


class RolloutSpec(Spec, frozen=True):
    """How a change of spec.engine and spec.sidecar reaches the engines."""

    canary: Annotated[Canary | None, Meta(description="Left out, all engines are replaced one after another.")] = None
