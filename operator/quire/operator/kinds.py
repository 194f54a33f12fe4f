"""The kinds of objects that the operator reads and writes, and where the API has them."""

from __future__ import annotations

from dataclasses import dataclass

from quire.operator import names


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of namespaced objects."""

    api_version: str
    name: str
    plural: str

    @property
    def group(self) -> str:
        """The API group; empty is the core's."""
        return self.api_version.rpartition("/")[0]

    @property
    def everywhere(self) -> str:
        """Where the API server has those of all namespaces."""
        return f"/{'apis' if self.group else 'api'}/{self.api_version}/{self.plural}"

    def path(self, namespace: str, name: str = "") -> str:
        """Where the API server has them."""
        root = "apis" if self.group else "api"
        base = f"/{root}/{self.api_version}/namespaces/{namespace}/{self.plural}"
        return f"{base}/{name}" if name else base


SERVICE = Kind(names.API_VERSION, names.KIND, names.PLURAL)
POD = Kind("v1", "Pod", "pods")
SECRET = Kind("v1", "Secret", "secrets")
CLAIM = Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
EVENT = Kind("events.k8s.io/v1", "Event", "events")

# Of other projects: a cluster need not have them. Whose they are, and which field asks for one.
OPTIONAL = {
    Kind("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", "leaderworkersets"): (
        "LeaderWorkerSet (github.com/kubernetes-sigs/lws)",
        "spec.engine.nodes",
    ),
    Kind("gateway.networking.k8s.io/v1", "HTTPRoute", "httproutes"): ("the Gateway API", "spec.gateway.httpRoute"),
    Kind("monitoring.coreos.com/v1", "PodMonitor", "podmonitors"): (
        "the Prometheus operator",
        "spec.observability.podMonitor",
    ),
}

BUILT_IN = (
    Kind("v1", "ServiceAccount", "serviceaccounts"),
    Kind("rbac.authorization.k8s.io/v1", "Role", "roles"),
    Kind("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings"),
    Kind("v1", "ConfigMap", "configmaps"),
    CLAIM,
    Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
    Kind("networking.k8s.io/v1", "Ingress", "ingresses"),
    Kind("v1", "Service", "services"),
    Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    Kind("apps/v1", "Deployment", "deployments"),
)
CHILDREN = (*BUILT_IN, *OPTIONAL)
CHILD_OF = {kind.name: kind for kind in CHILDREN}
