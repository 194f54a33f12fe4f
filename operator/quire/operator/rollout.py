"""How a change of the engines goes on: at once, or tried by a canary first. Pure: the time is given.

What engines were made of stands on what makes their pods (see `revision`). While a change is tried, everything is as
if the service still asked for that, and the new engines run beside it; a change that was rolled back stays so until
the service asks for another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import msgspec

from quire.operator import names
from quire.operator.canary import Judgement, Trial, judge
from quire.operator.config import Images
from quire.operator.diagnosis import problems
from quire.operator.observed import Observed
from quire.operator.pod_counts import PodCounts
from quire.operator.resources.engine import CanaryEngines, engine
from quire.operator.resources.group import templates
from quire.operator.resources.metadata import Component, Manifest, digest
from quire.operator.revision import Revision
from quire.operator.rollout_spec import Canary
from quire.operator.spec import InferenceService
from quire.operator.status_types import RolloutStatus

# Troubles of a pod that no patience helps with.
_HOPELESS = frozenset({"ModelLoadFailed", "OutOfMemory", "Crashing"})

_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True)
class Rollout:
    """`service` is what everything is made of, but for the engines of `canary`. `state` is for the status.

    `look_again` is in how many seconds something may be due that nobody tells of.
    """

    service: InferenceService
    canary: CanaryEngines | None = None
    state: RolloutStatus | None = None
    look_again: float | None = None


def rollout_of(
    service: InferenceService,
    observed: Observed,
    images: Images,
    *,
    previous: Mapping[str, Any],
    trial: Trial,
    now: datetime,
) -> Rollout:
    """What to make, and what to tell of it. `previous` is the status that is there, `trial` what its step has shown."""
    policy = service.spec.rollout.canary
    old = _as_it_was(service, observed)
    if policy is None or old is None or not _is_tried(service, old, images):
        return Rollout(service)
    revision = digest(Revision.of(service).text)
    state = _state(previous, revision)
    if state is None:
        state = RolloutStatus(phase="Canary", revision=revision)
    if state.phase == "RolledBack":
        return Rollout(old, state=state)
    if failure := _failure(service, observed, state, now):
        return Rollout(old, state=_rolled_back(state, failure))
    seconds = _seconds(state.since, now)
    judgement = judge(policy, trial, seconds) if state.since else Judgement.WAIT
    if judgement is Judgement.ROLL_BACK:
        return Rollout(old, state=_rolled_back(state, _too_many(policy, trial)))
    if judgement is Judgement.ADVANCE:
        if state.step >= len(policy.weights) - 1:
            return Rollout(service)
        state = msgspec.structs.replace(state, step=state.step + 1, since="", began="")
    percent = policy.weights[min(state.step, len(policy.weights) - 1)]
    engines = CanaryEngines(service, revision, _share(service.spec.engine.replicas, percent), state.weight)
    if not state.since:
        if not _is_ready(service, observed, engines):
            return _starting(old, engines, state, now)
        state = msgspec.structs.replace(state, weight=percent, since=now.strftime(_TIME))
        engines, seconds = replace(engines, percent=percent), 0.0
    left = policy.interval_seconds - seconds
    return Rollout(old, engines, state, left if left > 0 else None)


def _starting(old: InferenceService, engines: CanaryEngines, state: RolloutStatus, now: datetime) -> Rollout:
    """While the engines of a step are not all ready."""
    # Where nobody asks, no engine is started, and none is late.
    began = (state.began or now.strftime(_TIME)) if engines.replicas else ""
    left = _patience(engines.service) - _seconds(began, now) if began else None
    return Rollout(old, engines, msgspec.structs.replace(state, began=began), left)


def _seconds(begin: str, now: datetime) -> float:
    """Since `begin`, as a status has it; 0 if it is empty."""
    return (now - datetime.strptime(begin, _TIME).replace(tzinfo=UTC)).total_seconds() if begin else 0.0


def _patience(service: InferenceService) -> float:
    """How many seconds new engines may take until they are ready."""
    return service.spec.engine.load_seconds + 60.0


def _as_it_was(service: InferenceService, observed: Observed) -> InferenceService | None:
    """The service as its engines were made of; None if there are none."""
    there = observed.engines(service)
    if not there:
        return None
    revision = Revision.read(there[0]["metadata"].get("annotations", {}).get(names.MADE_OF, ""))
    return revision and revision.within(service)


def _is_tried(service: InferenceService, old: InferenceService, images: Images) -> bool:
    """Whether the change makes other pods, for the gateways that there are."""
    wanted, there = (templates(engine(each, images)) for each in (service, old))
    return service.spec.model == old.spec.model and wanted != there


def _state(previous: Mapping[str, Any], revision: str) -> RolloutStatus | None:
    found = previous.get("rollout")
    state = msgspec.convert(found, RolloutStatus) if found else None
    return state if state and state.revision == revision else None


def _share(replicas: int, percent: int) -> int:
    """New engines for `percent` of the requests: one at least, but none where there are no others."""
    return -(-replicas * percent // 100)


def _is_ready(service: InferenceService, observed: Observed, engines: CanaryEngines) -> bool:
    workload = _workload(service, observed, engines.revision)
    counts = PodCounts.of(workload, engines.replicas, observed.pods_of(Component.CANARY))
    return engines.replicas > 0 and counts.is_settled


def _workload(service: InferenceService, observed: Observed, revision: str) -> Manifest | None:
    found = observed.engines(service, Component.CANARY)
    return next((each for each in found if each["metadata"]["labels"].get(names.REVISION) == revision), None)


def _failure(service: InferenceService, observed: Observed, state: RolloutStatus, now: datetime) -> str:
    """Why engines of the revision will never serve, empty if they may."""
    revision = state.revision
    own = [each for each in observed.pods if each["metadata"].get("labels", {}).get(names.REVISION) == revision]
    for problem in problems(service, replace(observed, pods=tuple(own))):
        if problem.component is Component.CANARY and problem.reason in _HOPELESS:
            return problem.message
    if state.began and not state.since and _seconds(state.began, now) >= _patience(service):
        return f"they were not ready within spec.engine.loadSeconds ({service.spec.engine.load_seconds})"
    return ""


def _too_many(policy: Canary, trial: Trial) -> str:
    return (
        f"{trial.new.failed:.0f} of {trial.new.requests:.0f} requests failed on them, more than "
        f"spec.rollout.canary.maxErrorPercent ({policy.max_error_percent}) allows"
    )


def _rolled_back(state: RolloutStatus, why: str) -> RolloutStatus:
    message = (
        f"the new engines were rolled back and those from before serve every request: {why}; correct spec.engine or "
        "spec.sidecar, or put it back as it was. To have the change all the same, leave spec.rollout.canary out"
    )
    return RolloutStatus(phase="RolledBack", revision=state.revision, step=state.step, message=message)
