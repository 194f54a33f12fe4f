"""Engines by a Service's EndpointSlices: what a slice means, and a real API server that is watched as it changes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from control_plane import HOW_TO_GET_THEM, ControlPlane, control_plane, missing_programs
from router_testing import until

from quire.router.canary import Canary
from quire.router.discovery import discovery_of
from quire.router.discovery.endpoint_slices import EndpointSlices, addresses_of
from quire.service.errors import ConfigError

NAMESPACE = "models"
SLICES = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"
READ = [{"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}]


def slice_of(name: str, ready: dict[str, bool | None], *, service: str = "engines", **fields: Any) -> dict[str, Any]:
    """A slice whose endpoints have these addresses, ready or not; None leaves it out."""
    endpoints = [
        {"addresses": [address], "conditions": {} if is_ready is None else {"ready": is_ready}}
        for address, is_ready in ready.items()
    ]
    return {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4", "endpoints": endpoints,
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "ports": [{"name": "grpc", "port": 9100}, {"name": "metrics", "port": 9101}], **fields,
    }  # fmt: skip


def test_ready_endpoints_are_engines_at_the_port_that_is_named() -> None:
    """A pod that is not ready, or another port, would be a session that never comes about."""
    slices = [slice_of("a", {"10.0.0.1": True, "10.0.0.2": False, "10.0.0.3": None}), slice_of("b", {"10.0.0.4": True})]
    expected = dict.fromkeys(f"10.0.0.{last}:9100" for last in (1, 3, 4))
    assert addresses_of(slices, "grpc") == addresses_of(slices, "9100") == expected
    assert addresses_of(slices, "http") == addresses_of(slices, "") == {}
    six = slice_of("c", {"fd00::1": True}, addressType="IPv6", ports=[{"port": 9100}])
    assert addresses_of([six], "") == {"[fd00::1]:9100": None}
    # A Service without ready pods has slices without endpoints or ports.
    assert addresses_of([slice_of("d", {}, endpoints=None, ports=None)], "grpc") == {}


@pytest.mark.parametrize(("percent", "meant"), [("10", 10), ("0", 0), ("900", 100), ("", None), ("-1", None)])
def test_labels_of_a_slice_put_its_engines_on_trial(percent: str, meant: int | None) -> None:
    """Without them all engines are alike; what is no percentage must not keep a router from its engines."""
    canary = slice_of("a", {"10.0.0.1": True})
    canary["metadata"]["labels"] |= {"quire.dev/revision": "r2", "quire.dev/canary-percent": percent}
    found = addresses_of([canary, slice_of("b", {"10.0.0.2": True})], "grpc")
    assert found == {"10.0.0.1:9100": None if meant is None else Canary("r2", meant), "10.0.0.2:9100": None}


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    if missing := missing_programs():
        pytest.skip(f"no control plane here, {', '.join(missing)} are missing: {HOW_TO_GET_THEM}")
    with control_plane(tmp_path_factory.mktemp("control-plane")) as plane:
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        plane.api.request("POST", "/api/v1/namespaces", namespace)
        yield plane


def kubeconfig_of(plane: ControlPlane, account: str, rules: list[dict[str, Any]]) -> Path:
    """A service account with these rights in the namespace, and the file that makes a program act as it."""
    core, rbac = f"/api/v1/namespaces/{NAMESPACE}", f"/apis/rbac.authorization.k8s.io/v1/namespaces/{NAMESPACE}"
    named = {"metadata": {"name": account}}
    plane.api.request("POST", f"{core}/serviceaccounts", named)
    plane.api.request("POST", f"{rbac}/roles", {**named, "rules": rules})
    group = "rbac.authorization.k8s.io"
    binding = {
        **named, "roleRef": {"apiGroup": group, "kind": "Role", "name": account},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}],
    }  # fmt: skip
    plane.api.request("POST", f"{rbac}/rolebindings", binding)
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    token = plane.api.request("POST", f"{core}/serviceaccounts/{account}/token", asked)["status"]["token"]
    return plane.kubeconfig(account, token)


@pytest.mark.e2e
async def test_the_slices_of_a_service_are_followed(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the router's service account, with no more rights than it needs: pods come, fail their probe, and go."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig_of(plane, "router", READ)))
    api = plane.api
    await asyncio.to_thread(api.request, "POST", SLICES, slice_of("other", {"10.0.0.9": True}, service="other"))
    await asyncio.to_thread(api.request, "POST", SLICES, slice_of("a", {"10.0.0.1": True}))
    discovery = await discovery_of((f"kubernetes:{NAMESPACE}/engines+canary:grpc",), resolve_interval=1)
    assert isinstance(discovery, EndpointSlices)
    async with asyncio.timeout(30), aclosing(discovery.addresses()) as changes:  # type: ignore[type-var]
        assert await anext(changes) == {"10.0.0.1:9100": None}
        new = slice_of("b", {"10.0.0.2": True, "10.0.0.3": False}, service="canary")
        await asyncio.to_thread(api.request, "POST", SLICES, new)
        assert await anext(changes) == dict.fromkeys(("10.0.0.1:9100", "10.0.0.2:9100"))
        ready = slice_of("b", {"10.0.0.2": True, "10.0.0.3": True}, service="canary")
        ready["metadata"]["labels"] |= {"quire.dev/revision": "r2", "quire.dev/canary-percent": "25"}
        await asyncio.to_thread(api.request, "PUT", f"{SLICES}/b", ready)
        on_trial = dict.fromkeys(("10.0.0.2:9100", "10.0.0.3:9100"), Canary("r2", 25))
        assert await anext(changes) == {"10.0.0.1:9100": None, **on_trial}
        failing = slice_of("a", {"10.0.0.1": False})
        await asyncio.to_thread(api.request, "PUT", f"{SLICES}/a", failing)
        assert await anext(changes) == on_trial
        await asyncio.to_thread(api.request, "DELETE", f"{SLICES}/b")
        assert await anext(changes) == {}
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


@pytest.mark.e2e
async def test_without_the_right_to_watch_the_log_says_so(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing Role is a mistake of the installation: the router goes on asking, and tells why it has no engines."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig_of(plane, "nobody", [])))
    discovery = await EndpointSlices.here(["engines"], namespace=NAMESPACE, port="grpc")
    first = asyncio.create_task(anext(discovery.addresses()))  # type: ignore[arg-type]
    await until(lambda: "endpointslices.discovery.k8s.io is forbidden" in caplog.text)
    assert not first.done()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


async def test_a_namespace_is_needed_outside_a_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pod it is the pod's own; elsewhere there is none to guess."""
    config = tmp_path / "config"
    config.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: it\nclusters: [{name: it, cluster: {server: https://nowhere}}]\n"
        "users: [{name: it, user: {token: x}}]\ncontexts: [{name: it, context: {cluster: it, user: it}}]\n"
    )
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(config))
    with pytest.raises(ConfigError, match="NAMESPACE/SERVICE"):
        await discovery_of(("kubernetes:engines:grpc",), resolve_interval=1)
