"""The resource's autoscaling: between which numbers of engines, and by what."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field

from quire.operator.rules import Rule, Spec


class ScalingTargets(Spec, frozen=True):
    """How much load an engine should have: more than one of them says adds engines."""

    queued_prefill_tokens: Annotated[
        int, Meta(description="Prompt tokens that wait to be computed, for each engine.", ge=1, le=1 << 30)
    ] = 8192
    page_use_percent: Annotated[
        int, Meta(description="Pages of keys and values in use, of those that an engine has.", ge=1, le=95)
    ] = 80
    first_token_milliseconds: Annotated[
        Annotated[int, Meta(ge=1, le=3_600_000)] | None,
        Meta(description="Time to first token of nine requests in ten; left out, it does not count."),
    ] = None


class Autoscaling(Spec, frozen=True):
    """The operator sets the number of engines by their own load. spec.engine.replicas is where it begins."""

    max_replicas: Annotated[int, Meta(description="Engines at most.", ge=1, le=1000)]
    min_replicas: Annotated[
        int,
        Meta(
            description="Engines at least; with 0 none runs while nobody asks, and routers hold requests until the "
            "first has loaded the model (loadSeconds at most).",
            ge=0,
            le=1000,
        ),
    ] = 1
    targets: Annotated[ScalingTargets, Meta(description="How much load an engine should have.")] = field(
        default_factory=ScalingTargets
    )
    scale_out_seconds: Annotated[
        int, Meta(description="How long there must be too much load before engines are added.", ge=0, le=3600)
    ] = 0
    scale_in_seconds: Annotated[
        int,
        Meta(
            description="How long fewer engines must have been enough before some go; doubled each time that it "
            "turned out wrong.",
            ge=0,
            le=3600,
        ),
    ] = 300
    idle_seconds: Annotated[
        int,
        Meta(description="With minReplicas 0 the last engine goes after so long without a request.", ge=1, le=86400),
    ] = 600

    rules = (
        Rule(
            "self.minReplicas <= self.maxReplicas",
            "minReplicas is more than maxReplicas: lower it, or raise maxReplicas",
            lambda autoscaling: autoscaling.min_replicas <= autoscaling.max_replicas,
        ),
    )
