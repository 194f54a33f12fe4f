"""What a status says of what there is; the same in pods' lives that a test's control plane has no kubelet for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from operator_strategies import document, services

from quire.operator.config import Images
from quire.operator.core import children
from quire.operator.events import events
from quire.operator.observed import Observed, Refusal
from quire.operator.spec import InferenceService, parse
from quire.operator.status import plain, status_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DEMO = parse(document({}))

Document = dict[str, Any]


def deployments(service: InferenceService, **status: int) -> tuple[Document, ...]:
    """The service's Deployments, each with `status` on top of a settled one."""
    found = []
    for child in children(service, Images()):
        if child["kind"] == "Deployment":
            wanted = child["spec"]["replicas"]
            settled = {"observedGeneration": 2, "replicas": wanted, "updatedReplicas": wanted}
            child["metadata"]["generation"] = 2
            child["status"] = {**settled, "availableReplicas": wanted, **status}
            found.append(child)
    return tuple(found)


def conditions(service: InferenceService, observed: Observed, previous: Document | None = None) -> Document:
    status = plain(status_of(service, observed, previous=previous or {}, now=NOW))
    return {each["type"]: each for each in status["conditions"]}


def pod(component: str, status: Document) -> Document:
    labels = {"quire.dev/service": "demo", "app.kubernetes.io/component": component}
    return {"kind": "Pod", "metadata": {"name": "p", "namespace": "models", "labels": labels}, "status": status}


@given(service=services, available=st.integers(0, 5), total=st.integers(0, 5))
def test_the_same_look_later_says_the_same(service: InferenceService, available: int, total: int) -> None:
    """A time that moves with the clock would be a write at every look."""
    observed = Observed(children=deployments(service, availableReplicas=available, replicas=total))
    first = plain(status_of(service, observed, previous={}, now=NOW))
    later = NOW + timedelta(hours=1)
    again = status_of(service, observed, previous=first, now=later)
    assert plain(again) == first
    assert events(service, first, again, later, "x") == []


def test_times_are_those_of_the_last_transition() -> None:
    """Alerts count from them."""
    first = plain(status_of(DEMO, Observed(), previous={}, now=NOW))
    later = NOW + timedelta(hours=1)
    second = plain(status_of(DEMO, Observed(children=deployments(DEMO)), previous=first, now=later))
    before, after = ({each["type"]: each for each in status["conditions"]} for status in (first, second))
    assert before["Ready"]["status"] == "False"
    assert after["Ready"]["lastTransitionTime"] == "2026-01-01T01:00:00Z"
    assert after["Degraded"]["lastTransitionTime"] == "2026-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("status", "is_settled"),
    [
        ({}, True),
        ({"observedGeneration": 1}, False),
        ({"updatedReplicas": 0}, False),
        ({"replicas": 2}, False),
        ({"availableReplicas": 0}, False),
    ],
)
def test_a_rollout_is_over_when_only_new_pods_are_there(status: Document, is_settled: bool) -> None:
    """`kubectl wait` on it must not come back while old pods serve."""
    said = conditions(DEMO, Observed(children=deployments(DEMO, **status)))
    assert (said["Progressing"]["status"] == "False") is is_settled


def test_a_service_that_scaled_to_zero_is_ready() -> None:
    """Whoever asks gets an answer, so `kubectl wait` must not hang; that one starts, or can't, is told, too."""
    asleep = parse(document({"engine": {"autoscaling": {"minReplicas": 0, "maxReplicas": 2}}}))
    none, one = asleep.scaled(0), asleep.scaled(1)
    settled = deployments(none)
    said = conditions(none, Observed(settled))
    assert (said["Ready"]["status"], said["Ready"]["reason"]) == ("True", "Idle")
    assert (said["EnginesReady"]["reason"], said["Progressing"]["status"]) == ("ScaledToZero", "False")
    said = conditions(one, Observed(settled))
    assert (said["Ready"]["status"], said["Ready"]["reason"]) == ("True", "Waking")
    full = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no nvidia.com/gpu"}
    said = conditions(one, Observed(settled, (pod("engine", {"conditions": [full]}),)))
    assert (said["Ready"]["status"], said["Ready"]["reason"]) == ("False", "InsufficientGPUs")
    unready = tuple(each for each in settled if not each["metadata"]["name"].endswith("-gateway"))
    assert conditions(none, Observed(unready))["Ready"]["status"] == "False"


def test_the_load_is_shown() -> None:
    """It answers "how busy" in `kubectl get`."""
    status = plain(status_of(DEMO, Observed(children=deployments(DEMO)), load=40, previous={}, now=NOW))
    assert (status["load"], status.get("desiredReplicas")) == ("40%", None)
    scaled = parse(document({"engine": {"autoscaling": {"maxReplicas": 5}}})).scaled(3)
    assert plain(status_of(scaled, Observed(), previous={}, now=NOW))["desiredReplicas"] == 3


def test_one_engine_of_three_serves() -> None:
    """Ready says whether there are answers; EnginesReady that not all of them are there."""
    service = parse(document({"engine": {"replicas": 3}}))
    status = {"availableReplicas": 1}
    said = conditions(service, Observed(children=deployments(service, **status)))
    assert (said["Ready"]["status"], said["EnginesReady"]["status"]) == ("True", "False")
    assert said["EnginesReady"]["message"] == "1 of 3 pods of the engine are ready"


def test_what_waits_for_an_engine_is_not_the_cause() -> None:
    """Routers and gateways are not ready without one; a person must be led to the engine."""
    full = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no nvidia.com/gpu"}
    waiting = deployments(DEMO, availableReplicas=0)
    said = conditions(DEMO, Observed(waiting, (pod("engine", {"conditions": [full]}),)))
    assert (said["Ready"]["reason"], said["GatewayReady"]["reason"]) == ("InsufficientGPUs", "Starting")
    assert said["Progressing"]["reason"] == "Stuck"


def test_the_sidecars_trouble_is_the_sidecars() -> None:
    """It is an init container in the pod's status, and has fields and a log of its own."""
    ended = {"name": "sidecar", "ready": False, "state": {"terminated": {"exitCode": 2, "message": "bad flag"}}}
    observed = Observed(deployments(DEMO, availableReplicas=0), (pod("engine", {"initContainerStatuses": [ended]}),))
    said = conditions(DEMO, observed)["EnginesReady"]
    assert said["reason"] == "Crashing"
    assert said["message"] == (
        "the sidecar ended with status 2: bad flag; see kubectl logs -n models p -c sidecar --previous"
    )


def test_pods_that_go_are_no_trouble() -> None:
    """A rollout's old pods end with all kinds of statuses."""
    ended = {"name": "engine", "ready": False, "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
    going = pod("engine", {"containerStatuses": [ended]})
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert conditions(DEMO, Observed(deployments(DEMO), (going,)))["Degraded"]["status"] == "False"


def test_every_trouble_is_told_and_the_first_is_the_reason() -> None:
    """Who puts one right should not have to wait to learn of the next."""
    service = parse(
        document({"gateway": {"apiKeys": {"name": "keys"}, "tlsSecret": "cert"}, "tls": {"secret": "peers"}})
    )
    refusal = Refusal("Service", "demo-router", "spec.ports is wrong")
    secrets = {"cert": frozenset({"tls.crt"}), "peers": frozenset({"tls.crt", "tls.key"})}
    status = plain(status_of(service, Observed(secrets=secrets), refusals=[refusal], previous={}, now=NOW))
    degraded = next(each for each in status["conditions"] if each["type"] == "Degraded")
    assert degraded["reason"] == "SecretMissing"
    for part in (
        "spec.gateway.apiKeys names the Secret keys",
        "spec.gateway.tlsSecret wants the entry tls.key of the Secret cert, which holds tls.crt: add the entry",
        "Service demo-router was refused: spec.ports is wrong",
        "spec.tls.secret wants the entry ca.crt of the Secret peers, which holds tls.crt, tls.key: add the entry;",
    ):
        assert part in degraded["message"]
