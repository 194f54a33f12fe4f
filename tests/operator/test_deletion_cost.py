"""Which engine goes when there are to be fewer: the one that loses least, by the real ReplicaSet controller."""

from __future__ import annotations

from typing import Any

import pytest
from control_plane import ControlPlane, until
from kubernetes.aio import client
from kubernetes.aio import config as kubernetes_config
from operator_process import OperatorProcess, Services
from operator_strategies import document

from quire.operator.cluster import Cluster
from quire.operator.config import OperatorConfig
from quire.operator.deletion_cost import ANNOTATION, priced
from quire.operator.kinds import POD
from quire.operator.listing import fill
from quire.operator.observed import Observed
from quire.operator.reconciler import Reconciler
from quire.operator.scaler import Scale
from quire.operator.spec import Key, parse
from quire.operator.store import Store

Document = dict[str, Any]


def pods_of(services: Services) -> list[Document]:
    return services.api.items(POD.path(services.namespace), "quire.dev/service=demo,app.kubernetes.io/component=engine")


@pytest.mark.e2e
async def test_the_idle_ones_go(operator: OperatorProcess, services: Services, plane: ControlPlane) -> None:
    """Without it the youngest go, however many streams they have."""
    services.apply("demo", {"engine": {"replicas": 3}})
    services.until("demo", "EnginesReady", "True")
    by_age = sorted(pods_of(services), key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))
    busy = by_age[-1]["metadata"]["name"]
    costs = {pod["status"]["podIP"]: 100 if pod["metadata"]["name"] == busy else 3 for pod in by_age}
    assert len(costs) == 3
    operator.stop()
    services.apply("demo", {"engine": {"replicas": 1}})
    configuration = client.Configuration()
    await kubernetes_config.load_kube_config(config_file=str(operator.kubeconfig), client_configuration=configuration)
    async with client.ApiClient(configuration) as api:
        store, cluster = Store(), Cluster(api)
        await fill(cluster, store)
        config = OperatorConfig(identity="x", namespace="quire-system")
        scale = Scale(1, costs={**costs, "10.9.9.9": 7})
        await Reconciler(cluster, store, config, lambda *_: scale).reconcile(Key(services.namespace, "demo"))
    operator.start()
    until("one is left", lambda: len(pods_of(services)) == 1)
    assert [pod["metadata"]["name"] for pod in pods_of(services)] == [busy]


def test_pods_are_written_to_only_when_some_must_go() -> None:
    """An annotation for each change of load would be a write in every interval."""
    labels = {"app.kubernetes.io/component": "engine"}
    metadata = {"name": "p", "namespace": "models", "uid": "u", "labels": labels, "annotations": {ANNOTATION: "5"}}
    pod = {"kind": "Pod", "metadata": metadata, "status": {"podIP": "10.0.0.1"}}
    live = {"kind": "Deployment", "metadata": {"name": "demo-engine"}, "spec": {"replicas": 2}}
    observed = Observed((live,), (pod,))
    fewer, same = (parse(document({"engine": {"replicas": replicas}})) for replicas in (1, 2))
    assert priced(same, observed, {"10.0.0.1": 9}) == []
    (written,) = priced(fewer, observed, {"10.0.0.1": 9})
    assert (written["metadata"]["uid"], written["metadata"]["annotations"]) == ("u", {ANNOTATION: "9"})
    assert priced(fewer, observed, {"10.0.0.1": 5}) == priced(fewer, observed, {}) == []
