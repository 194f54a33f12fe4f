"""What a service's status says, from what there is. Pure: the time is given.

Conditions: ModelReady, EnginesReady, RouterReady and GatewayReady are the parts; Ready says whether requests are
answered, Progressing whether something is on its way, Degraded whether something needs a person.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import msgspec

from quire.operator.diagnosis import Problem, problems
from quire.operator.engine_pods import engine_counts
from quire.operator.observed import Observed, Refusal
from quire.operator.pod_counts import PodCounts
from quire.operator.resources import model
from quire.operator.resources.metadata import LASTING, Component, selector
from quire.operator.resources.services import url
from quire.operator.spec import InferenceService
from quire.operator.status_types import Condition, ConditionStatus, RolloutStatus, Status

_CONDITION_OF = {
    Component.ENGINE: "EnginesReady",
    Component.ROUTER: "RouterReady",
    Component.GATEWAY: "GatewayReady",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A condition before it has a time."""

    type: str
    is_true: bool
    reason: str
    message: str = ""


def status_of(
    service: InferenceService,
    observed: Observed,
    *,
    refusals: Sequence[Refusal] = (),
    load: int | None = None,
    rollout: RolloutStatus | None = None,
    previous: Mapping[str, Any],
    now: datetime,
) -> Status:
    """The status to write. `previous` is the one that is there, whose times stay where nothing changed.

    `service` is scaled to the engines that there should be now; `load` is in percent of their targets. `rollout` is of
    a change that is being tried, or was rolled back.
    """
    found = _troubles(problems(service, observed, refusals), rollout)
    pods = {component: _pods(service, observed, component) for component in LASTING}
    parts = [_part(service, component, pods[component], found) for component in LASTING]
    verdicts = [
        _ready(service, pods, found),
        _model(service, pods[Component.ENGINE], found),
        *sorted(parts, key=lambda verdict: verdict.type),
        _progressing(pods, found, rollout),
        _degraded(found),
    ]
    engines = pods[Component.ENGINE]
    return Status(
        observed_generation=service.generation,
        url=url(service) if verdicts[0].is_true else "",
        model=model.title(service),
        replicas=engines.total,
        desired_replicas=engines.wanted if service.spec.engine.autoscaling else None,
        ready_replicas=engines.available,
        engines=f"{engines.available}/{engines.wanted}",
        load="" if load is None else f"{load}%",
        rollout=rollout,
        selector=",".join(f"{name}={value}" for name, value in selector(service, Component.ENGINE).items()),
        conditions=_dated(verdicts, service.generation, previous, now),
    )


def invalid_status(message: str, generation: int, previous: Mapping[str, Any], now: datetime) -> Status:
    """Of an object that an older CRD let in and whose spec this operator can't read; its children stay as they are."""
    verdicts = [Verdict("Ready", False, "InvalidSpec", message), Verdict("Degraded", True, "InvalidSpec", message)]
    return Status(observed_generation=generation, conditions=_dated(verdicts, generation, previous, now))


def plain(status: Status) -> dict[str, Any]:
    """`status` as the API's JSON has it."""
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(status))
    return found


def _pods(service: InferenceService, observed: Observed, component: Component) -> PodCounts:
    if component is Component.ENGINE:
        return engine_counts(service, observed)
    spec = service.spec.router if component is Component.ROUTER else service.spec.gateway
    return PodCounts.of(observed.deployment(service, component), spec.replicas)


def _part(service: InferenceService, component: Component, pods: PodCounts, found: Sequence[Problem]) -> Verdict:
    kind, name = _CONDITION_OF[component], component.value
    if pods.wanted == 0:
        if service.spec.engine.autoscaling:
            return Verdict(kind, False, "ScaledToZero", "nobody asks; the next request starts an engine")
        return Verdict(kind, False, "ScaledToZero", f"set spec.{name}.replicas to 1 or more to serve")
    if pods.available >= pods.wanted:
        return Verdict(kind, True, "Available")
    problem = next((each for each in found if each.component is component), None)
    if problem:
        return Verdict(kind, False, problem.reason, problem.message)
    return Verdict(kind, False, "Starting", f"{pods.available} of {pods.wanted} pods of the {name} are ready")


def _ready(service: InferenceService, pods: Mapping[Component, PodCounts], found: Sequence[Problem]) -> Verdict:
    if asleep := _asleep(service, pods, found):
        return asleep
    # Routers are ready only with an engine, and gateways only with a router: the first of them is the cause.
    for component in (Component.ENGINE, Component.ROUTER, Component.GATEWAY):
        if pods[component].available == 0:
            return replace(_part(service, component, pods[component], found), type="Ready")
    return Verdict("Ready", True, "Serving")


def _asleep(service: InferenceService, pods: Mapping[Component, PodCounts], found: Sequence[Problem]) -> Verdict | None:
    """Of a service without engines whose requests are answered all the same, once one has started."""
    engines = pods[Component.ENGINE]
    holds = pods[Component.ROUTER].available and pods[Component.GATEWAY].available
    if not service.scales_to_zero or engines.available or not holds:
        return None
    if engines.wanted == 0:
        return Verdict("Ready", True, "Idle", "nobody asks; the next request starts an engine, and waits for it")
    if any(problem.component is Component.ENGINE for problem in found):
        return None
    return Verdict("Ready", True, "Waking", "an engine starts; requests wait for it")


def _model(service: InferenceService, engines: PodCounts, found: Sequence[Problem]) -> Verdict:
    if engines.available:
        return Verdict("ModelReady", True, "Loaded")
    problem = next((each for each in found if each.is_about_model), None)
    if problem:
        return Verdict("ModelReady", False, problem.reason, problem.message)
    if engines.wanted == 0:
        return Verdict("ModelReady", False, "ScaledToZero", "no engine is wanted, so none has loaded it")
    return Verdict("ModelReady", False, "Loading", f"no engine has loaded {model.title(service)} yet")


def _troubles(found: Sequence[Problem], rollout: RolloutStatus | None) -> list[Problem]:
    if rollout is None or rollout.phase != "RolledBack":
        return list(found)
    # Of a canary that is over only that matters; its pods may still be there.
    rest = (problem for problem in found if problem.component is not Component.CANARY)
    return [Problem(Component.CANARY, "CanaryRolledBack", rollout.message), *rest]


def _progressing(
    pods: Mapping[Component, PodCounts], found: Sequence[Problem], rollout: RolloutStatus | None
) -> Verdict:
    if rollout is not None and rollout.phase == "Canary":
        share = f"get {rollout.weight}% of the requests" if rollout.weight else "start beside the others"
        return Verdict("Progressing", True, "Canary", f"new engines (revision {rollout.revision}) {share}")
    moving = [component.value for component, each in pods.items() if not each.is_settled]
    if not moving:
        return Verdict("Progressing", False, "Settled")
    stuck = {problem.component.value for problem in found}
    if Component.ENGINE.value in stuck and pods[Component.ENGINE].available == 0:
        # The others wait for it.
        stuck |= {component.value for component in LASTING}
    if stuck.issuperset(moving):
        return Verdict("Progressing", False, "Stuck", "see Degraded: nothing goes on until that is put right")
    return Verdict("Progressing", True, "RollingOut", f"pods of {', '.join(moving)} are on their way")


def _degraded(found: Sequence[Problem]) -> Verdict:
    if not found:
        return Verdict("Degraded", False, "AsWanted")
    return Verdict("Degraded", True, found[0].reason, "; ".join(problem.message for problem in found))


def _dated(
    verdicts: Sequence[Verdict], generation: int, previous: Mapping[str, Any], now: datetime
) -> tuple[Condition, ...]:
    before = {each["type"]: each for each in previous.get("conditions", ())}
    stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    found = []
    for verdict in verdicts:
        value: ConditionStatus = "True" if verdict.is_true else "False"
        old = before.get(verdict.type, {})
        found.append(
            Condition(
                type=verdict.type,
                status=value,
                reason=verdict.reason,
                message=verdict.message,
                observed_generation=generation,
                last_transition_time=old["lastTransitionTime"] if old.get("status") == value else stamp,
            )
        )
    return tuple(found)
