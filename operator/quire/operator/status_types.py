"""The status of the resource: what `core` writes and the CRD describes."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, field

ConditionStatus = Literal["True", "False", "Unknown"]


class Condition(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One thing that is so or not, why, and what to do about it."""

    type: Annotated[str, Meta(description="What is said, such as EnginesReady.")]
    status: Annotated[ConditionStatus, Meta(description="Whether it is so.")]
    reason: Annotated[str, Meta(description="Why, in one word for programs.")]
    message: Annotated[str, Meta(description="Why, and what to do, for people.", max_length=32768)] = ""
    observed_generation: Annotated[int, Meta(description="The generation of the spec that it is about.")] = 0
    last_transition_time: Annotated[
        str, Meta(description="When status last changed.", extra_json_schema={"format": "date-time"})
    ]


class Status(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """How the service is."""

    observed_generation: Annotated[int, Meta(description="The generation of the spec that this is about.")] = 0
    url: Annotated[str, Meta(description="The OpenAI API inside the cluster, once it answers.")] = ""
    model: Annotated[str, Meta(description="What is served.")] = ""
    replicas: Annotated[int, Meta(description="Engines that there are; for the scale subresource.")] | None = None
    desired_replicas: (
        Annotated[int, Meta(description="Engines that there should be, if the operator decides that.")] | None
    ) = None
    ready_replicas: Annotated[int, Meta(description="Engines that take requests.")] | None = None
    engines: Annotated[str, Meta(description="Engines that take requests, of those wanted.")] = ""
    load: Annotated[str, Meta(description="How near engines are to the nearest of their targets.")] = ""
    selector: Annotated[str, Meta(description="The engines' pods; for the scale subresource.")] = ""
    conditions: Annotated[tuple[Condition, ...], Meta(description="What is so, by type.")] = field(default=())
