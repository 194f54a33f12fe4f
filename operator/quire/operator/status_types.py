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


class RolloutStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Where a change of the engines stands that is tried before all of them have it."""

    phase: Annotated[Literal["Canary", "RolledBack"], Meta(description="What is being done with it.")]
    revision: Annotated[str, Meta(description="Of the new engines; their pods have it as a label.")]
    step: Annotated[int, Meta(description="Which of the weights it has got to, from 0.")] = 0
    weight: Annotated[int, Meta(description="Percent of the requests that the new engines get.")] = 0
    began: Annotated[str, Meta(description="When the engines of the step were asked for.")] = ""
    since: Annotated[str, Meta(description="When the step began; empty while its engines start.")] = ""
    message: Annotated[str, Meta(description="Why it was rolled back.")] = ""


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
    rollout: (
        Annotated[RolloutStatus, Meta(description="Of a change that is being tried, or was rolled back.")] | None
    ) = None
    selector: Annotated[str, Meta(description="The engines' pods; for the scale subresource.")] = ""
    conditions: Annotated[tuple[Condition, ...], Meta(description="What is so, by type.")] = field(default=())
