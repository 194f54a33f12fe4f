"""The operator as a process against a real control plane: `kubectl apply` of a service, and it stays true."""

from __future__ import annotations

from typing import Any

import pytest
from control_plane import ControlPlane, until
from leader_worker_sets import SET as LEADER_WORKER_SET
from leader_worker_sets import is_served
from operator_process import USER, OperatorProcess, Services

from quire.operator.kinds import BUILT_IN, CHILD_OF, OPTIONAL, POD, Kind

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("operator")]

Document = dict[str, Any]


def children_of(services: Services, name: str) -> list[Document]:
    return [
        {"kind": kind.name, **each}
        for kind in BUILT_IN
        for each in services.api.items(kind.path(services.namespace), f"quire.dev/service={name}")
    ]


def deployment(services: Services, name: str) -> str:
    return CHILD_OF["Deployment"].path(services.namespace, name)


def requests_about(plane: ControlPlane, services: Services) -> list[str]:
    """What the operator has asked of the API server about this namespace, reads included."""
    return [
        f"{each['verb']} {each['objectRef']['resource']}/{each['objectRef'].get('name', '')}"
        for each in plane.requests(USER)
        if each.get("objectRef", {}).get("namespace") == services.namespace
    ]


def test_a_service_becomes_true_and_then_nothing_is_written(plane: ControlPlane, services: Services) -> None:
    """The whole way: children of its own, pods that the restricted profile takes, a status, and then quiet."""
    services.apply("demo", {"engine": {"replicas": 2}, "gateway": {"replicas": 2}})
    services.until("demo", "Ready", "True", "Serving")
    services.until("demo", "Progressing", "False", "Settled")
    found = children_of(services, "demo")
    uid = (services.get("demo") or {})["metadata"]["uid"]
    assert len(found) == 18
    assert all([owner["uid"] for owner in each["metadata"]["ownerReferences"]] == [uid] for each in found)
    assert len(services.api.items(POD.path(services.namespace), "quire.dev/service=demo")) == 5

    status = (services.get("demo") or {})["status"]
    said = {each["type"]: (each["status"], each["reason"]) for each in status["conditions"]}
    assert said == {
        "Ready": ("True", "Serving"),
        "ModelReady": ("True", "Loaded"),
        "EnginesReady": ("True", "Available"),
        "RouterReady": ("True", "Available"),
        "GatewayReady": ("True", "Available"),
        "Progressing": ("False", "Settled"),
        "Degraded": ("False", "AsWanted"),
    }
    assert status["url"] == f"http://demo-gateway.{services.namespace}.svc:8000/v1"
    assert (status["engines"], status["replicas"]) == ("2/2", 2)
    shown = plane.kubectl("get", "qis", "-n", services.namespace).stdout.splitlines()
    assert shown[0].split() == ["NAME", "READY", "REASON", "ENGINES", "LOAD", "MODEL", "URL", "AGE"]
    assert shown[1].split()[:5] == ["demo", "True", "Serving", "2/2", "SmolLM2-135M-Instruct"]

    def poke() -> None:
        """A look shows from outside only where something has to be put right."""
        path = CHILD_OF["ConfigMap"].path(services.namespace, "demo-environment")
        services.api.patch(path, {"data": {"HOME": "/by-hand"}})
        until("it is put right", lambda: (services.api.get(path) or {})["data"]["HOME"] == "/tmp")

    asked = requests_about(plane, services)
    writes = [each for each in asked if not each.startswith(("get", "list"))]
    # What was made is the children and the events.
    made = len(found) + sum(each.startswith("create events") for each in writes)
    assert len(writes) <= 1.2 * made, writes
    poke()
    poke()
    assert requests_about(plane, services) == [*asked, *["patch configmaps/demo-environment"] * 2]


def test_many_services_cost_little(plane: ControlPlane, operator: OperatorProcess, services: Services) -> None:
    """A fifth of a write more than there are objects to make, then none, whatever comes in between.

    tests/benchmarks/operator_scale.py measures more of them.
    """
    names = [f"demo-{index}" for index in range(20)]
    for name in names:
        services.apply(name, {})
    for name in names:
        services.until(name, "Ready", "True", "Serving")
        services.until(name, "Progressing", "False", "Settled")
    writes = [each for each in requests_about(plane, services) if not each.startswith(("get", "list"))]
    made = sum(not each.startswith("patch inferenceservices") for each in writes)
    assert made >= 18 * len(names)
    assert len(writes) <= 1.2 * made
    # Nothing is left to write: the next is what somebody's edit asks for.
    path = CHILD_OF["ConfigMap"].path(services.namespace, "demo-7-environment")
    services.api.patch(path, {"data": {"HOME": "/by-hand"}})
    until("it is put right", lambda: (services.api.get(path) or {})["data"]["HOME"] == "/tmp")
    asked = [each for each in requests_about(plane, services) if not each.startswith(("get", "list"))]
    assert asked == [*writes, "patch configmaps/demo-7-environment"]
    assert operator.memory_mb < 200
    for name in names:
        services.delete(name)


def test_edits_by_hand_are_put_right(services: Services) -> None:
    """Whatever somebody changes, takes out or deletes."""
    services.apply("demo", {})
    services.until("demo", "Ready", "True")
    engine, service = deployment(services, "demo-engine"), CHILD_OF["Service"].path(services.namespace, "demo-router")
    role = CHILD_OF["Role"].path(services.namespace, "demo-router")
    policy = CHILD_OF["NetworkPolicy"].path(services.namespace, "demo-engine")
    uid = (services.api.get(service) or {})["metadata"]["uid"]
    services.api.patch(engine, {"spec": {"replicas": 3}})
    services.api.patch(role, {"rules": []})
    services.api.patch(policy, {"metadata": {"labels": {"quire.dev/service": None}}})
    services.api.request("DELETE", service)

    def replicas() -> int:
        return int((services.api.get(engine) or {})["spec"]["replicas"])

    until("the engine's replicas", lambda: replicas() == 1)
    until("the role's rules", lambda: (services.api.get(role) or {})["rules"] != [])
    until("the label", lambda: "quire.dev/service" in (services.api.get(policy) or {})["metadata"]["labels"])
    until("the Service", lambda: (services.api.get(service) or {}).get("metadata", {}).get("uid") not in (uid, None))


def test_a_changed_spec_rolls_out_with_new_pods_first(services: Services) -> None:
    """A flag that is taken out again must also go from the pods."""
    services.apply("demo", {"engine": {"extraArgs": ["--max-waiting=7"]}})
    services.until("demo", "Ready", "True")

    def arguments() -> list[str]:
        template = (services.api.get(deployment(services, "demo-engine")) or {})["spec"]["template"]
        return list(template["spec"]["containers"][0]["args"])

    assert "--max-waiting=7" in arguments()
    services.apply("demo", {})
    until("the flag is gone", lambda: "--max-waiting=7" not in arguments())
    services.until("demo", "Progressing", "False", "Settled")
    assert services.condition("demo", "Ready")["status"] == "True"
    generation = (services.get("demo") or {})["metadata"]["generation"]
    assert (services.get("demo") or {})["status"]["observedGeneration"] == generation == 2


def test_a_canary_is_rolled_back_or_promoted(services: Services) -> None:
    """Routers learn of it from labels that only the real controller copies; a kubelet's word ends the bad one."""
    canary = {"intervalSeconds": 1, "minRequests": 0}

    def apply(flag: str, **changed: int) -> None:
        services.apply("demo", {"engine": {"extraArgs": [flag]}, "rollout": {"canary": {**canary, **changed}}})

    def arguments() -> list[str]:
        template = (services.api.get(deployment(services, "demo-engine")) or {})["spec"]["template"]
        return list(template["spec"]["containers"][0]["args"])

    apply("--max-waiting=7", intervalSeconds=3600)
    services.until("demo", "Progressing", "False", "Settled")
    apply("--max-waiting=8", intervalSeconds=3600)
    slices = f"/apis/discovery.k8s.io/v1/namespaces/{services.namespace}/endpointslices"

    def told() -> list[tuple[str, str, bool]]:
        labels = {"quire.dev/revision": "", "quire.dev/canary-percent": ""}
        found = services.api.items(slices, "kubernetes.io/service-name=demo-canary")
        return [(*((labels | each["metadata"]["labels"])[name] for name in labels), bool(each["endpoints"]))
                for each in found]  # fmt: skip

    def revision() -> str:
        return str((services.get("demo") or {})["status"].get("rollout", {}).get("revision"))

    until("what routers are told", lambda: told() == [(revision(), "10", True)])
    assert services.condition("demo", "Ready")["status"] == "True"
    fail(services, "canary", {"name": "engine", "state": {"terminated": {"exitCode": 1, "message": "boom"}}})
    said = services.until("demo", "Degraded", "True", "CanaryRolledBack")
    assert "the engine ended with status 1: boom" in said["message"]
    until("the new engine is gone", lambda: not services.api.get(deployment(services, "demo-canary")))
    assert "--max-waiting=7" in arguments()

    apply("--max-waiting=9")
    until("all have it", lambda: "--max-waiting=9" in arguments())
    services.until("demo", "Progressing", "False", "Settled")
    assert services.condition("demo", "Degraded")["reason"] == "AsWanted"
    until("routers are told no more", lambda: told() == [])


def test_scale_subresource(plane: ControlPlane, services: Services) -> None:
    """kubectl scale and a HorizontalPodAutoscaler know nothing else; 0 is told as such."""
    services.apply("demo", {})
    services.until("demo", "Ready", "True")
    assert plane.kubectl("scale", "qis/demo", "--replicas=3", "-n", services.namespace).returncode == 0
    until("three engines", lambda: (services.get("demo") or {})["status"]["engines"] == "3/3")
    scale = services.api.get(f"/apis/quire.dev/v1alpha1/namespaces/{services.namespace}/inferenceservices/demo/scale")
    assert (scale or {})["status"] == {
        "replicas": 3, "selector": "quire.dev/service=demo,app.kubernetes.io/component=engine",
    }  # fmt: skip
    services.apply("demo", {"engine": {"replicas": 0}})
    said = services.until("demo", "Ready", "False", "ScaledToZero")
    assert "set spec.engine.replicas" in said["message"]


def test_a_gpu_that_no_node_has(services: Services) -> None:
    """The commonest trouble of all; the scheduler's own condition says it."""
    services.apply("demo", {"engine": {"gpus": 1}})
    said = services.until("demo", "EnginesReady", "False", "InsufficientGPUs")
    assert "spec.engine.gpus" in said["message"]
    assert services.condition("demo", "Ready")["reason"] == "InsufficientGPUs"
    assert services.condition("demo", "Degraded")["status"] == "True"
    services.until("demo", "Progressing", "False", "Stuck")


def test_resources_that_no_node_has(services: Services) -> None:
    """Memory is not a GPU: another field to change."""
    services.apply("demo", {"router": {"resources": {"requests": {"memory": "900Gi"}}}})
    said = services.until("demo", "RouterReady", "False", "Unschedulable")
    assert "spec.router.resources" in said["message"]


def test_a_missing_secret_and_a_missing_entry(services: Services) -> None:
    """A pod only waits for its volume and says nothing; the operator names the field, and sees when it is put right."""
    services.apply("demo", {"gateway": {"apiKeys": {"name": "keys", "key": "keys.jsonl"}}})
    said = services.until("demo", "Degraded", "True", "SecretMissing")
    assert "spec.gateway.apiKeys names the Secret keys" in said["message"]
    path = f"/api/v1/namespaces/{services.namespace}/secrets"
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}, "data": {"other": ""}}
    services.api.request("POST", path, secret)
    said = services.until("demo", "Degraded", "True", "SecretKeyMissing")
    assert "wants the entry keys.jsonl of the Secret keys, which holds other" in said["message"]
    services.api.patch(f"{path}/keys", {"data": {"keys.jsonl": ""}})
    services.until("demo", "Degraded", "False", "AsWanted")


def test_a_missing_claim(services: Services) -> None:
    """The model's own volume."""
    services.apply("demo", {"model": {"claim": {"name": "weights"}}})
    said = services.until("demo", "ModelReady", "False", "ClaimMissing")
    assert "spec.model.claim names the PersistentVolumeClaim weights" in said["message"]


def fail(services: Services, component: str, container: Document) -> None:
    """Plays the kubelet: a pod's container is in trouble."""
    selector = f"quire.dev/service=demo,app.kubernetes.io/component={component}"
    pod = until("a pod that runs", lambda: next(iter(services.api.items(POD.path(services.namespace), selector)), None))
    path = POD.path(services.namespace, pod["metadata"]["name"]) + "/status"
    until("kwok has spoken", lambda: (services.api.get(path) or {}).get("status", {}).get("podIP"))
    conditions = [{"type": "Ready", "status": "False"}, {"type": "PodScheduled", "status": "True"}]
    statuses = [{"image": "x:1", "imageID": "", "ready": False, "restartCount": 1, **container}]
    services.api.patch(path, {"status": {"conditions": conditions, "containerStatuses": statuses}})


@pytest.mark.parametrize(
    ("component", "state", "condition", "reason", "advice"),
    [
        (
            "engine",
            {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}},
            "EnginesReady",
            "ImagePullFailed",
            "the image x:1 can't be pulled (ImagePullBackOff: no such image): check spec.engine.image",
        ),
        (
            "engine",
            {
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {"terminated": {"exitCode": 2, "message": "no model at /model/x: name a folder"}},
            },
            "ModelReady",
            "ModelLoadFailed",
            "the engine can't run the model: no model at /model/x: name a folder",
        ),
        (
            "engine",
            {"state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}},
            "ModelReady",
            "OutOfMemory",
            "raise spec.engine.resources.limits.memory",
        ),
        (
            "gateway",
            {"state": {"terminated": {"exitCode": 1, "message": "Traceback"}}},
            "GatewayReady",
            "Crashing",
            "the gateway ended with status 1: Traceback; see kubectl logs -n",
        ),
        (
            "router",
            {"state": {"waiting": {"reason": "CreateContainerConfigError", "message": 'configmap "x" not found'}}},
            "RouterReady",
            "ContainerNotCreated",
            'configmap "x" not found',
        ),
    ],
    ids=["image", "model", "memory", "crash", "config"],
)
def test_a_container_in_trouble(
    services: Services, component: str, state: Document, condition: str, reason: str, advice: str
) -> None:
    """What the kubelet leaves in a pod's status comes out as a reason and an advice, with the pod's own words."""
    services.apply("demo", {})
    services.until("demo", "Ready", "True")
    fail(services, component, {"name": component, **state})
    said = services.until("demo", condition, "False", reason)
    assert advice in said["message"]
    assert services.condition("demo", "Degraded")["reason"] == reason


def install_kind(services: Services, group: str, kind: Kind) -> str:
    """A CRD that takes anything; returns where it is."""
    name = f"{kind.plural}.{group}"
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    crd: Document = {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": name, "annotations": {"api-approved.kubernetes.io": "unapproved, for a test"}},
        "spec": {
            "group": group, "scope": "Namespaced", "versions": [version],
            "names": {"kind": kind.name, "plural": kind.plural, "singular": kind.name.lower()},
        },
    }  # fmt: skip
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    services.api.request("POST", path, crd)
    until(f"{name} is served", lambda: is_served(services.api, kind))
    return f"{path}/{name}"


def test_kinds_that_a_cluster_need_not_have(operator: OperatorProcess, services: Services) -> None:
    """Without Gateway API or Prometheus operator the service serves, and says what lacks; with them it is made so."""
    route = {"gateways": [{"name": "public"}], "hostnames": ["llm.example"]}
    spec: Document = {"gateway": {"httpRoute": route}, "observability": {"podMonitor": {}}}
    services.apply("demo", spec)
    said = services.until("demo", "Degraded", "True", "KindNotInstalled")
    assert "the cluster knows no HTTPRoute, which spec.gateway.httpRoute asks for: install the Gateway API" in str(said)
    services.until("demo", "Ready", "True", "Serving")

    kinds = [kind for kind in OPTIONAL if kind != LEADER_WORKER_SET]
    crds = [install_kind(services, kind.group, kind) for kind in kinds]
    (route_path, monitor_path) = (
        kind.path(services.namespace, name) for kind, name in zip(kinds, ("demo-gateway", "demo"), strict=True)
    )
    # It looks again by itself, too, but not as soon.
    services.apply("demo", {**spec, "router": {"holdSeconds": 6}})
    services.until("demo", "Degraded", "False", "AsWanted")
    made = services.api.get(route_path) or {}
    assert made["spec"]["parentRefs"] == [{"name": "public"}]
    assert made["spec"]["rules"][0]["backendRefs"] == [{"name": "demo-gateway", "port": 8000}]
    assert (services.api.get(monitor_path) or {})["spec"]["selector"]["matchLabels"]["quire.dev/service"] == "demo"

    # What somebody does to them is seen in the next list.
    operator.stop()
    operator.start()
    services.api.patch(route_path, {"spec": {"hostnames": ["theirs"]}})
    until("it is put right", lambda: (services.api.get(route_path) or {})["spec"]["hostnames"] == ["llm.example"])
    services.apply("demo", {})
    for path in (route_path, monitor_path):
        until("it is gone", lambda path=path: services.api.get(path) is None)
    for crd in crds:
        services.api.request("DELETE", crd)
    services.apply("demo", {"engine": {"replicas": 2}})
    until("it goes on", lambda: (services.get("demo") or {})["status"]["engines"] == "2/2")


def test_pods_that_the_cluster_refuses(services: Services) -> None:
    """A quota leaves no pod behind whose status could be read."""
    quota = {
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}},
    }  # fmt: skip
    path = f"/api/v1/namespaces/{services.namespace}/resourcequotas"
    services.api.request("POST", path, quota)
    until("the quota is known", lambda: (services.api.get(f"{path}/none") or {}).get("status", {}).get("hard"))
    services.apply("demo", {})
    said = services.until("demo", "Ready", "False", "PodsRefused")
    assert "exceeded quota: none" in said["message"]


def test_what_is_somebody_elses_stays_so(services: Services) -> None:
    """Apply takes over whatever has the name; a Service of another team must not become a router."""
    theirs = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "demo-environment"}, "data": {"whose": "theirs"},
    }  # fmt: skip
    services.api.request("POST", f"/api/v1/namespaces/{services.namespace}/configmaps", theirs)
    services.apply("demo", {})
    said = services.until("demo", "Degraded", "True", "ChildRefused")
    assert "ConfigMap demo-environment was refused: one of this name is there already" in said["message"]
    there = services.api.get(f"/api/v1/namespaces/{services.namespace}/configmaps/demo-environment")
    assert (there or {})["data"] == {"whose": "theirs"}


def test_deletion_leaves_nothing(services: Services) -> None:
    """No finalizer, so it goes also while no operator runs; no child, so nothing costs anything afterwards."""
    services.apply("demo", {"model": {"hub": {"name": "a/b"}, "cache": {"size": "1Gi"}}})
    said = services.until("demo", "ModelReady", "False", "ClaimUnbound")
    assert "the claim demo-model-cache has no volume yet" in said["message"]
    assert "finalizers" not in (services.get("demo") or {})["metadata"]
    services.delete("demo")
    until("children are gone", lambda: not children_of(services, "demo"))
    until("pods are gone", lambda: not services.api.items(POD.path(services.namespace)))
    until("EndpointSlices are gone", lambda: not services.api.items(
        f"/apis/discovery.k8s.io/v1/namespaces/{services.namespace}/endpointslices"
    ))  # fmt: skip
    assert services.get("demo") is None


def test_transitions_are_events(services: Services) -> None:
    """`kubectl describe` is where people look first."""
    services.apply("demo", {"engine": {"gpus": 1}})
    services.until("demo", "Degraded", "True")

    def reasons() -> set[tuple[str, str]]:
        found = services.api.items(f"/apis/events.k8s.io/v1/namespaces/{services.namespace}/events")
        return {(each["type"], each["reason"]) for each in found if each["regarding"]["kind"] == "InferenceService"}

    until("the event", lambda: ("Warning", "InsufficientGPUs") in reasons())


def test_the_operator_has_no_right_to_more(plane: ControlPlane, operator: OperatorProcess) -> None:
    """Least privilege, asked of the API server itself."""
    for verb, what, allowed in (
        ("list", "secrets", "no"),
        ("get", "secrets", "yes"),
        ("create", "secrets", "no"),
        ("delete", "pods", "no"),
        ("create", "pods", "no"),
        ("patch", "pods", "yes"),
        ("patch", "deployments.apps", "yes"),
        ("create", "statefulsets.apps", "no"),
        ("patch", "inferenceservices.quire.dev", "no"),
        ("patch", "inferenceservices.quire.dev/status", "yes"),
        ("*", "*", "no"),
    ):
        resource, _, subresource = what.partition("/")
        extra = [f"--subresource={subresource}"] if subresource else []
        answer = plane.kubectl("auth", "can-i", verb, resource, *extra, f"--as={USER}", "-n", "default")
        assert answer.stdout.strip() == allowed, (verb, what, answer.stderr)
    assert operator.is_running
