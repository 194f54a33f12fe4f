"""Operators die, meet each other and find the API server gone; services come out whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from control_plane import ControlPlane, until
from kubernetes.aio import client
from kubernetes.aio import config as kubernetes_config
from operator_process import OperatorProcess, Services

from quire.operator.cluster import Cluster
from quire.operator.config import OperatorConfig
from quire.operator.kinds import BUILT_IN, CHILD_OF, Kind
from quire.operator.listing import fill
from quire.operator.reconciler import Reconciler
from quire.operator.spec import Key
from quire.operator.store import Store

pytestmark = pytest.mark.e2e

Document = dict[str, Any]


class KilledError(BaseException):
    """The process is gone; nothing that it would have done next happens."""


class MortalCluster(Cluster):
    """Lives for a number of writes, of which the last still reaches the API server."""

    def __init__(self, api: client.ApiClient, lives: int) -> None:
        super().__init__(api)
        self._lives = lives

    async def apply(self, kind: Kind, manifest: Document, *, subresource: str = "") -> Document:
        found = await super().apply(kind, manifest, subresource=subresource)
        self._die()
        return found

    async def create(self, kind: Kind, manifest: Document) -> Document:
        found = await super().create(kind, manifest)
        self._die()
        return found

    async def delete(self, kind: Kind, manifest: Document) -> None:
        await super().delete(kind, manifest)
        self._die()

    def _die(self) -> None:
        self._lives -= 1
        if not self._lives:
            raise KilledError


def state(services: Services) -> Document:
    """What matters of a service and its children, in any namespace."""
    found = {
        (kind.name, each["metadata"]["name"]): each.get("spec") or each.get("data") or each.get("rules")
        for kind in BUILT_IN
        for each in services.api.items(kind.path(services.namespace), "quire.dev/service=demo")
    }
    plain: Document = json.loads(
        json.dumps({"/".join(key): value for key, value in found.items()}).replace(services.namespace, "NAMESPACE")
    )
    for each in plain.values():
        # Addresses are drawn by the API server.
        for drawn in ("clusterIP", "clusterIPs", "volumeName"):
            if isinstance(each, dict):
                each.pop(drawn, None)
    return plain


async def test_killed_after_every_single_write(idle_plane: ControlPlane) -> None:
    """Creation, change and shrinking, one life per write: each next life finds its way from what it sees."""
    plane = idle_plane
    configuration = client.Configuration()
    await kubernetes_config.load_kube_config(
        config_file=str(OperatorProcess(plane).kubeconfig), client_configuration=configuration
    )
    cached = {"model": {"hub": {"name": "a/b"}, "cache": {"size": "1Gi"}}, "engine": {"gpus": 1}}
    changed = {"gateway": {"replicas": 2}, "observability": {"logLevel": "debug"}}
    mortal, immortal = (_new_namespace(plane, name) for name in ("mortal", "immortal"))
    async with client.ApiClient(configuration) as api:
        for spec in (cached, changed):
            for services in (mortal, immortal):
                services.apply("demo", spec)
            deaths = 0
            while True:
                try:
                    await look(MortalCluster(api, 1), mortal)
                    break
                except KilledError:
                    deaths += 1
                    assert deaths < 60
            assert deaths >= 5
            await look(Cluster(api), immortal)
            assert state(mortal) == state(immortal)
            assert (mortal.get("demo") or {})["status"]["observedGeneration"] == (1 if spec is cached else 2)


async def test_what_was_just_asked_for_is_not_so_yet(idle_plane: ControlPlane) -> None:
    """`kubectl wait` right behind an apply would come back with the new generation and the old pods."""
    configuration = client.Configuration()
    await kubernetes_config.load_kube_config(
        config_file=str(OperatorProcess(idle_plane).kubeconfig), client_configuration=configuration
    )
    services = _new_namespace(idle_plane, "hasty")
    engine = CHILD_OF["Deployment"].path("hasty", "demo-engine")
    async with client.ApiClient(configuration) as api:
        services.apply("demo", {})
        await look(Cluster(api), services)
        until("all are ready", lambda: all(
            each.get("status", {}).get("availableReplicas") == 1
            for each in services.api.items(CHILD_OF["Deployment"].path("hasty"))
        ))  # fmt: skip
        await look(Cluster(api), services)
        assert services.condition("demo", "Progressing")["reason"] == "Settled"
        services.apply("demo", {"engine": {"extraArgs": ["--max-waiting=7"]}})
        await look(Cluster(api), services)
        assert "--max-waiting=7" in str(services.api.get(engine))
        said = services.condition("demo", "Progressing")
        assert (said["reason"], said["observedGeneration"]) == ("RollingOut", 2)


class RacingCluster(Cluster):
    """Somebody edits the service right before its status is written."""

    def __init__(self, api: client.ApiClient, services: Services) -> None:
        super().__init__(api)
        self.services: Services | None = services

    async def apply(self, kind: Kind, manifest: Document, *, subresource: str = "") -> Document:
        if subresource == "status" and self.services is not None:
            self.services.apply("demo", {"engine": {"extraArgs": ["--max-waiting=7"]}})
            self.services = None
        return await super().apply(kind, manifest, subresource=subresource)


async def test_an_edit_that_meets_a_write_is_not_lost(idle_plane: ControlPlane) -> None:
    """The answer to the write has both, so neither watch nor list has news of the edit: nobody would look again."""
    configuration = client.Configuration()
    await kubernetes_config.load_kube_config(
        config_file=str(OperatorProcess(idle_plane).kubeconfig), client_configuration=configuration
    )
    services = _new_namespace(idle_plane, "racing")
    async with client.ApiClient(configuration) as api:
        services.apply("demo", {})
        cluster, store = RacingCluster(api, services), Store()
        await fill(cluster, store)
        reconciler = Reconciler(cluster, store, OperatorConfig(identity="racing", namespace="quire-system"))
        key = Key("racing", "demo")
        assert await reconciler.reconcile(key) == 0
        await reconciler.reconcile(key)
        assert "--max-waiting=7" in str(services.api.get(CHILD_OF["Deployment"].path("racing", "demo-engine")))


async def look(cluster: Cluster, services: Services) -> None:
    """An operator's first look."""
    store = Store()
    await fill(cluster, store)
    config = OperatorConfig(identity="mortal", namespace="quire-system")
    await Reconciler(cluster, store, config).reconcile(Key(services.namespace, "demo"))


def _new_namespace(plane: ControlPlane, name: str) -> Services:
    plane.api.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    return Services(plane.api, name)


def test_a_killed_operator_goes_on_where_it_was(operator: OperatorProcess, services: Services) -> None:
    """The process, in the midst of its work and without a chance to clean up."""
    services.apply("demo", {})
    accounts = f"/api/v1/namespaces/{services.namespace}/serviceaccounts"
    until("it has begun", lambda: services.api.items(accounts, "quire.dev/service=demo"))
    operator.kill()
    operator.start()
    services.until("demo", "Ready", "True")
    services.until("demo", "Progressing", "False", "Settled")


def holder(plane: ControlPlane) -> str:
    lease = plane.api.get("/apis/coordination.k8s.io/v1/namespaces/quire-system/leases/quire-operator") or {}
    return str(lease.get("spec", {}).get("holderIdentity", ""))


def test_two_operators_one_leads(plane: ControlPlane, operator: OperatorProcess, services: Services) -> None:
    """The second writes nothing while the first lives, takes over when it dies, and gives the lease back when asked."""
    until("the first leads", lambda: holder(plane) == operator.name)
    second = OperatorProcess(plane, "operator-1").start()
    try:
        services.apply("demo", {})
        services.until("demo", "Ready", "True")
        assert holder(plane) == operator.name
        assert "wrote" not in second.log.read_text()
        operator.kill()
        services.apply("other", {})
        services.until("other", "Ready", "True")
        assert holder(plane) == second.name
        operator.start()
    finally:
        second.stop()
    until("the first leads again", lambda: holder(plane) == operator.name)


def test_the_api_server_goes_and_comes_back(plane: ControlPlane, operator: OperatorProcess, services: Services) -> None:
    """It restarts with every upgrade of a cluster; a change in that moment must not be lost."""
    services.apply("demo", {})
    services.until("demo", "Ready", "True")
    service = f"/api/v1/namespaces/{services.namespace}/services/demo-router"
    plane.restart_api_server()
    services.api.request("DELETE", service)

    def is_back() -> bool:
        if not operator.is_running:
            # Its lease ran out meanwhile. A kubelet starts it again.
            operator.start()
        return services.api.get(service) is not None

    until("the Service is back", is_back)
    services.apply("demo", {"engine": {"replicas": 2}})
    until("two engines", lambda: is_back() and (services.get("demo") or {})["status"]["engines"] == "2/2")
