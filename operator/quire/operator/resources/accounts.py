"""ServiceAccounts, and the one right that one of them has."""

from __future__ import annotations

from quire.operator.resources.metadata import LASTING, Component, Manifest, child_name, manifest
from quire.operator.spec import InferenceService

_RBAC = "rbac.authorization.k8s.io"


def accounts(service: InferenceService) -> list[Manifest]:
    """An account for each component. Only routers talk to the API server: they watch where engines are."""
    found = [
        manifest(
            service, "v1", "ServiceAccount", child_name(service, component), component=component,
            automountServiceAccountToken=False,
        )
        for component in LASTING
    ]  # fmt: skip
    router = child_name(service, Component.ROUTER)
    rules = [{"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}]
    role = manifest(service, f"{_RBAC}/v1", "Role", router, component=Component.ROUTER, rules=rules)
    binding = manifest(
        service,
        f"{_RBAC}/v1",
        "RoleBinding",
        router,
        component=Component.ROUTER,
        roleRef={"apiGroup": _RBAC, "kind": "Role", "name": router},
        subjects=[{"kind": "ServiceAccount", "name": router, "namespace": service.namespace}],
    )
    return [*found, role, binding]
