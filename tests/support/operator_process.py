"""The operator as a real process, with the rights that the manifests give it and nothing more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from control_plane import Api, ControlPlane, end, until

ROOT = Path(__file__).parents[2]
USER = "system:serviceaccount:quire-system:quire-operator"
SERVICES = "/apis/quire.dev/v1alpha1/namespaces/{}/inferenceservices"

Document = dict[str, Any]


def install(plane: ControlPlane) -> None:
    """CRD, namespace and RBAC from manifests/, as `kubectl apply -k` has them, without the operator's Deployment."""
    built = plane.kubectl("kustomize", str(ROOT / "manifests"))
    if built.returncode:
        raise AssertionError(built.stderr)
    documents = [each for each in yaml.safe_load_all(built.stdout) if each["kind"] != "Deployment"]
    applied = plane.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(documents))
    if applied.returncode:
        raise AssertionError(applied.stderr)
    crd = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/inferenceservices.quire.dev"
    until("the CRD is served", lambda: _is_established(plane.api.get(crd) or {}))


def _is_established(crd: Document) -> bool:
    conditions = crd.get("status", {}).get("conditions", [])
    return any(each["type"] == "Established" and each["status"] == "True" for each in conditions)


class OperatorProcess:
    """One operator. `log` is where it writes."""

    def __init__(self, plane: ControlPlane, name: str = "operator-0", *flags: str) -> None:
        account = "/api/v1/namespaces/quire-system/serviceaccounts/quire-operator/token"
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        token = plane.api.request("POST", account, request)["status"]["token"]
        self.kubeconfig = plane.kubeconfig(name, token)
        self._environment = {**os.environ, "KUBECONFIG": str(self.kubeconfig)}
        self._environment.pop("KUBERNETES_SERVICE_HOST", None)
        self.name = name
        self._flags = flags
        self.log = plane.folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> OperatorProcess:
        """Starts it; it leads when it can."""
        flags = ["--namespace=quire-system", f"--identity={self.name}"]
        flags += ["--lease-duration=4", "--resync=3600", "--look-again=1"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "quire.operator", *flags, *self._flags],
                stdout=log,
                stderr=log,
                env=self._environment,
                cwd=ROOT,
            )
        return self

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def memory_mb(self) -> float:
        """The most memory that it has had, shared libraries included."""
        (line,) = [each for each in self._proc("status").splitlines() if each.startswith("VmHWM")]
        return int(line.split()[1]) / 1000

    @property
    def cpu_seconds(self) -> float:
        """What it has computed until now."""
        user, system = self._proc("stat").rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def _proc(self, name: str) -> str:
        if self._process is None:
            raise RuntimeError("the operator has not been started")
        return Path(f"/proc/{self._process.pid}/{name}").read_text()

    def stop(self) -> None:
        """As a kubelet would."""
        if self._process is not None:
            end(self._process)

    def kill(self) -> None:
        """As the out-of-memory killer would."""
        if self._process is not None and self.is_running:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()


class Services:
    """InferenceServices of one namespace, as a user has them."""

    def __init__(self, api: Api, namespace: str) -> None:
        self.api = api
        self.namespace = namespace
        self._path = SERVICES.format(namespace)

    def apply(self, name: str, spec: Document, **query: str) -> Document:
        document = {
            "apiVersion": "quire.dev/v1alpha1", "kind": "InferenceService",
            "metadata": {"name": name, "namespace": self.namespace}, "spec": spec,
        }  # fmt: skip
        return self.api.apply(f"{self._path}/{name}", document, **query)

    def get(self, name: str) -> Document | None:
        return self.api.get(f"{self._path}/{name}")

    def delete(self, name: str) -> None:
        self.api.request("DELETE", f"{self._path}/{name}")

    def condition(self, name: str, kind: str) -> Document:
        """The condition, empty if there is none."""
        conditions = ((self.get(name) or {}).get("status") or {}).get("conditions", [])
        return next((each for each in conditions if each["type"] == kind), {})

    def until(self, name: str, kind: str, status: str, reason: str | None = None, *, seconds: float = 60.0) -> Document:
        """Waits for a condition and returns it."""
        seen: Document = {}

        def check() -> Document | None:
            nonlocal seen
            seen = self.condition(name, kind)
            is_so = seen.get("status") == status and reason in (None, seen.get("reason"))
            return seen if is_so else None

        try:
            return until(f"{kind} of {name} is {status} {reason or ''}", check, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {seen}") from None
