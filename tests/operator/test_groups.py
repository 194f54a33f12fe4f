"""Engines that span GPUs and nodes: what they become, how they change kind, on paper and by the real API server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
import yaml
from control_plane import ApiError, ControlPlane, until
from hypothesis import given, settings
from hypothesis import strategies as st
from leader_worker_sets import (
    SET,
    install_leader_worker_sets,
    leader_worker_controller,
    remove_leader_worker_sets,
)
from operator_process import ROOT, Services
from operator_strategies import document
from paper_cluster import Paper

from quire.operator.canary import Tally, Trial
from quire.operator.config import Images
from quire.operator.core import children
from quire.operator.diagnosis import problems
from quire.operator.kinds import BUILT_IN, CHILD_OF, POD
from quire.operator.observed import Observed
from quire.operator.resources.group import templates
from quire.operator.resources.metadata import Component
from quire.operator.scaler import is_needed
from quire.operator.spec import parse
from quire.service.errors import ConfigError

Document = dict[str, Any]

WORKLOADS = ("Deployment", "LeaderWorkerSet")


def spec_of(nodes: int, *, flag: str = "--max-waiting=1", **engine: Any) -> Document:
    return {"engine": {"gpus": 8, "nodes": nodes, "extraArgs": [flag], **engine}}


def engines_of(spec: Document) -> Document:
    made = children(parse(document(spec)), Images())
    return next(each for each in made if each["kind"] in WORKLOADS and each["metadata"]["name"] == "demo-engine")


def test_gpus_become_ranks() -> None:
    """All GPUs of an engine share the model, and all of its pods must agree on their number and on where they meet."""

    def flags(spec: Document) -> list[set[str]]:
        return [set(each["spec"]["containers"][0]["args"]) for each in templates(engines_of(spec))]

    (one,), (several,) = flags({"engine": {"gpus": 1}}), flags(spec_of(1))
    assert {"--device=cuda", "--tensor-parallel-size=8"} <= several
    assert not [each for each in one if each.startswith("--tensor")]
    assert not [each for each in several if each.startswith(("--nnodes", "--node-rank", "--master"))]
    for each in flags(spec_of(2)):
        assert {
            "--tensor-parallel-size=16", "--nnodes=2", "--node-rank=$(LWS_WORKER_INDEX)",
            "--master-addr=$(LWS_LEADER_ADDRESS)", "--master-port=29500", "--rendezvous-timeout=1800",
        } <= each  # fmt: skip


def test_a_groups_further_pods_serve_nobody() -> None:
    """A port or the engines' label would bring them requests; without shared memory NCCL fails at its start."""
    spec = engines_of(spec_of(2))["spec"]
    first, further = (spec["leaderWorkerTemplate"][name] for name in ("leaderTemplate", "workerTemplate"))
    assert (spec["leaderWorkerTemplate"]["size"], spec["replicas"]) == (2, 1)
    assert further["metadata"]["labels"]["app.kubernetes.io/component"] == "engine-worker"
    (engine,) = further["spec"]["containers"]
    assert not {"ports", "readinessProbe", "livenessProbe", "lifecycle"} & set(engine)
    assert "initContainers" not in further["spec"]
    for template in (first, further):
        assert {"name": "shared", "emptyDir": {"medium": "Memory"}} in template["spec"]["volumes"]
        assert {"name": "shared", "mountPath": "/dev/shm"} in template["spec"]["containers"][0]["volumeMounts"]
        assert template["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_pods_of_a_group_reach_one_another() -> None:
    """NCCL chooses its ports, and a policy that forgets them is a group that hangs at its start."""
    made = children(parse(document(spec_of(2))), Images())
    policies = {each["metadata"]["name"]: each["spec"]["ingress"] for each in made if each["kind"] == "NetworkPolicy"}
    for name in ("demo-engine", "demo-engine-worker"):
        inside = policies[name][-1]
        assert "ports" not in inside
        found = {each["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for each in inside["from"]}
        assert found == {"engine", "engine-worker"}
    assert len(policies["demo-engine-worker"]) == 1


def test_a_name_that_is_too_long_for_a_group() -> None:
    """Kubernetes makes a label of it and a hash; the pods would be refused, which no status tells."""
    parse(document(spec_of(1), name="a" * 50))
    parse(document(spec_of(2), name="a" * 40))
    with pytest.raises(ConfigError, match="more than 40 characters") as refused:
        parse(document(spec_of(2), name="a" * 41))
    assert refused.value.field == "spec.engine.nodes"


def test_the_trouble_of_a_groups_further_pod_is_the_engines() -> None:
    """Its first pod only waits for it, and says nothing."""
    template = templates(engines_of(spec_of(2)))[1]
    full = {"type": "PodScheduled", "reason": "Unschedulable", "message": "0/3 nodes: 3 Insufficient nvidia.com/gpu."}
    metadata = {**template["metadata"], "name": "demo-engine-0-1", "namespace": "models"}
    pod = {"kind": "Pod", "metadata": metadata, "status": {"conditions": [full]}}
    (found,) = problems(parse(document(spec_of(2))), Observed(pods=(pod,)))
    assert (found.component, found.reason) == (Component.ENGINE, "InsufficientGPUs")
    assert "no node has 8 free GPUs for another engine" in found.message


def test_the_last_group_stays_until_routers_hold_requests() -> None:
    """As the last engine of one pod does: nobody would answer what comes in between."""
    autoscaling = {"minReplicas": 0, "maxReplicas": 2}
    service = parse(document(spec_of(2, replicas=1, autoscaling=autoscaling)))
    router = {"kind": "Deployment", "metadata": {"name": "demo-router", "generation": 2}, "spec": {"replicas": 1}}
    there = Observed((engines_of(spec_of(2)), router))
    assert is_needed(service, there)
    settled = {"observedGeneration": 2, "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}
    assert not is_needed(service, Observed((engines_of(spec_of(2)), {**router, "status": settled})))


def kinds_of(paper: Paper) -> list[str]:
    return [kind for kind, name in paper.children if kind in WORKLOADS and name == "demo-engine"]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_the_old_kind_serves_until_the_new_one_does(before: int, after: int) -> None:
    """Loading takes minutes, and in these a service with no engine would fail every request."""
    paper = Paper()
    for _ in range(2):
        paper.look(spec_of(before))
    old, new = WORKLOADS[before - 1], WORKLOADS[after - 1]
    assert kinds_of(paper) == [old]
    paper.unready_kinds = frozenset({new})
    for _ in range(3):
        paper.look(spec_of(after))
        assert sorted(kinds_of(paper)) == sorted(WORKLOADS)
    assert paper.condition("Ready")["status"] == "True"
    assert paper.condition("Progressing")["reason"] == "RollingOut"
    paper.unready_kinds = frozenset()
    paper.finish_start()
    paper.look(spec_of(after))
    assert kinds_of(paper) == [new]
    paper.look(spec_of(after))
    assert paper.condition("Progressing")["reason"] == "Settled"
    assert paper.status["engines"] == "1/1"


def test_without_surge_there_is_no_room_for_both() -> None:
    """With every GPU taken the new engines would wait for those of the old for ever."""
    paper = Paper()
    for nodes in (1, 1, 2):
        paper.look(spec_of(nodes, surge=0))
    assert kinds_of(paper) == ["LeaderWorkerSet"]


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.integers(1, 3)), min_size=1, max_size=8))
def test_however_often_the_mind_is_changed_somebody_serves(steps: list[tuple[int, bool, int]]) -> None:
    """And what there is in the end is what was asked for last, and nothing else."""
    paper = Paper()
    nodes, replicas = 1, 1
    for _ in range(2):
        paper.look(spec_of(nodes))
    for nodes, is_slow, replicas in steps:
        there = set(kinds_of(paper))
        wanted = WORKLOADS[nodes > 1]
        paper.unready_kinds = frozenset({wanted} - there if is_slow else ())
        paper.look(spec_of(nodes, replicas=replicas))
        assert paper.condition("Ready")["status"] == "True"
        paper.finish_start()
    paper.unready_kinds = frozenset()
    for _ in range(3):
        paper.finish_start()
        paper.look(spec_of(nodes, replicas=replicas))
    assert kinds_of(paper) == [WORKLOADS[nodes > 1]]
    assert paper.status["engines"] == f"{replicas}/{replicas}"
    assert paper.condition("Progressing")["reason"] == "Settled"


@pytest.mark.parametrize(("before", "after"), [(2, 2), (1, 2), (2, 1)])
def test_a_canary_of_groups(before: int, after: int) -> None:
    """Also where one kind tries the other: new groups get their share, and the old engines stay as they were."""
    canary = {"rollout": {"canary": {"weights": [50], "intervalSeconds": 60, "minRequests": 1}}}
    old, new = spec_of(before) | canary, spec_of(after, flag="--max-waiting=2") | canary
    paper = Paper()
    for _ in range(2):
        paper.look(old)
    paper.is_ready = False
    assert paper.look(new).look_again == 1860
    assert (WORKLOADS[after - 1], "demo-canary") in paper.children
    assert kinds_of(paper) == [WORKLOADS[before - 1]]
    assert (("NetworkPolicy", "demo-canary-worker") in paper.children) is (after == 2)
    assert paper.percent == "0"
    paper.finish_start()
    paper.look(new)
    assert paper.percent == "50"
    paper.now += timedelta(seconds=60)
    for _ in range(2):
        paper.look(new, Trial(Tally(5, 0), Tally(5, 0)))
    assert kinds_of(paper) == [WORKLOADS[after - 1]]
    assert "--max-waiting=2" in paper.arguments("demo-engine")
    assert not [name for _, name in paper.children if "canary" in name]


def test_a_group_that_is_never_ready_is_rolled_back() -> None:
    """A LeaderWorkerSet has no deadline of its own."""
    canary = {"rollout": {"canary": {}}}
    paper = Paper(is_ready=False)
    paper.look(spec_of(2) | canary)
    for days in (0, 1):
        paper.now += timedelta(days=days)
        paper.look(spec_of(2, flag="--max-waiting=2") | canary)
    assert paper.condition("Degraded")["reason"] == "CanaryRolledBack"
    assert "--max-waiting=1" in paper.arguments("demo-engine")


@pytest.fixture
def gpu_node(plane: ControlPlane) -> Iterator[None]:
    """A node with GPUs, for those who ask for it by name."""
    amounts = {"cpu": "64", "memory": "256Gi", "pods": "500", "nvidia.com/gpu": "64"}
    node = {
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "gpu-node", "annotations": {"kwok.x-k8s.io/node": "fake"}},
        "spec": {"taints": [{"key": "for", "value": "gpus", "effect": "NoSchedule"}]},
        "status": {"capacity": amounts, "allocatable": amounts},
    }  # fmt: skip
    plane.api.request("POST", "/api/v1/nodes", node)
    yield
    plane.api.request("DELETE", "/api/v1/nodes/gpu-node")


@pytest.mark.e2e
@pytest.mark.usefixtures("operator", "gpu_node")
def test_the_life_of_groups(services: Services) -> None:
    """By the API server and Kubernetes' own controllers; only LeaderWorkerSet's own is played by a test."""
    api = services.api
    sets, deployments = (kind.path(services.namespace, "demo-engine") for kind in (SET, CHILD_OF["Deployment"]))

    def apply(nodes: int, **engine: Any) -> None:
        services.apply("demo", spec_of(nodes, tolerations=[{"key": "for", "value": "gpus"}], **engine))

    def settled(engines: str) -> None:
        until(f"{engines} engines", lambda: (services.get("demo") or {})["status"]["engines"] == engines)
        services.until("demo", "Progressing", "False", "Settled")
        assert services.condition("demo", "Ready")["status"] == "True"

    apply(1)
    services.until("demo", "Ready", "True", "Serving")
    apply(2)
    said = services.until("demo", "Degraded", "True", "KindNotInstalled")
    assert "install LeaderWorkerSet (github.com/kubernetes-sigs/lws), or leave spec.engine.nodes out" in said["message"]
    assert services.condition("demo", "Ready")["status"] == "True"

    with ExitStack() as stack:
        install_leader_worker_sets(api)
        stack.callback(remove_leader_worker_sets, api)
        assert_fields_are_known(services)
        until("the set is made", lambda: api.get(sets))
        services.until("demo", "Degraded", "False", "AsWanted")
        # Nobody makes its pods yet.
        assert api.get(deployments) is not None
        # By this it goes with the service.
        (owner,) = (api.get(sets) or {})["metadata"]["ownerReferences"]
        assert owner["uid"] == (services.get("demo") or {})["metadata"]["uid"]
        stack.enter_context(leader_worker_controller(api))
        until("the old kind is gone", lambda: api.get(deployments) is None)
        settled("1/1")
        assert pods_of(services) == {"engine": 1, "engine-worker": 1}
        assert serving(services) == {"demo-engine-0"}
        budget = CHILD_OF["PodDisruptionBudget"].path(services.namespace, "demo-engine")
        until("the budget counts both", lambda: (api.get(budget) or {})["status"]["expectedPods"] == 2)

        api.patch(f"/apis/quire.dev/v1alpha1/namespaces/{services.namespace}/inferenceservices/demo/scale",
                  {"spec": {"replicas": 2}})  # fmt: skip
        settled("2/2")
        assert pods_of(services) == {"engine": 2, "engine-worker": 2}
        assert serving(services) == {"demo-engine-0", "demo-engine-1"}

        apply(2, flag="--max-waiting=2", replicas=2)
        services.until("demo", "Progressing", "True", "RollingOut")
        settled("2/2")
        found = api.items(POD.path(services.namespace), "app.kubernetes.io/component=engine")
        assert all("--max-waiting=2" in each["spec"]["containers"][0]["args"] for each in found)

        apply(2, replicas=0)
        services.until("demo", "Ready", "False", "ScaledToZero")
        apply(1)
        until("the set is gone", lambda: api.get(sets) is None)
        settled("1/1")
        assert api.get(CHILD_OF["NetworkPolicy"].path(services.namespace, "demo-engine-worker")) is None

        services.delete("demo")
        until("nothing is left", lambda: not left(services))


def pods_of(services: Services) -> dict[str, int]:
    """How many there are of engines, by component."""
    found = services.api.items(POD.path(services.namespace), "app.kubernetes.io/component in (engine, engine-worker)")
    kinds = [each["metadata"]["labels"]["app.kubernetes.io/component"] for each in found]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def serving(services: Services) -> set[str]:
    """The pods that routers see."""
    slices = services.api.items(
        f"/apis/discovery.k8s.io/v1/namespaces/{services.namespace}/endpointslices",
        "kubernetes.io/service-name=demo-engine",
    )
    return {each["targetRef"]["name"] for found in slices for each in found["endpoints"] or ()}


def left(services: Services) -> list[Document]:
    # But for what the set owned: the garbage collector looks for new kinds only every half minute.
    selector = "quire.dev/service=demo"
    return [each for kind in (*BUILT_IN, SET) for each in services.api.items(kind.path(services.namespace), selector)]


def assert_fields_are_known(services: Services) -> None:
    """The sample's set; a misspelt field of it, or of a pod in it, would be dropped without a word."""
    file = ROOT / "tests/operator/golden/many-nodes.yaml"
    (made,) = [each for each in yaml.safe_load_all(file.read_text()) if each["kind"] == SET.name]
    made["metadata"]["namespace"] = services.namespace
    path = SET.path(services.namespace, made["metadata"]["name"])
    services.api.apply(path, made, dryRun="All")
    for place in (made["spec"], templates(made)[1]["spec"]["containers"][0]):
        place["replica"] = 1
        with pytest.raises(ApiError, match="field not declared in schema"):
            services.api.apply(path, made, dryRun="All")
        del place["replica"]
