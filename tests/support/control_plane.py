"""A real Kubernetes control plane on loopback: etcd, API server with RBAC, controller manager, scheduler, and kwok.

Programs are found by KUBEBUILDER_ASSETS, as controller-runtime's envtest does. Nothing runs containers: kwok's nodes
say at once that their pods are ready, and tests play the kubelet where something should go wrong.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "kwok")
HOW_TO_GET_THEM = (
    "set KUBEBUILDER_ASSETS to a folder with " + ", ".join(PROGRAMS) + ": `setup-envtest use` has the first two and "
    "kubectl, Kubernetes' and kwok's releases have the others"
)

Document = dict[str, Any]
T = TypeVar("T")

_TOKEN = "admin-token"
_DEADLINE = 60.0

_KWOK_STAGES = r"""
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: node-ready}
spec:
  resourceRef: {apiGroup: v1, kind: Node}
  selector:
    matchExpressions:
    - {key: '.status.conditions.[] | select( .type == "Ready" ) | .status', operator: NotIn, values: ["True"]}
  next:
    statusTemplate: |
      conditions:
      - {type: Ready, status: "True", reason: KubeletReady, message: fake,
         lastHeartbeatTime: {{ Now | Quote }}, lastTransitionTime: {{ Now | Quote }}}
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: pod-ready}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
    - {key: .metadata.deletionTimestamp, operator: DoesNotExist}
    - {key: .status.podIP, operator: DoesNotExist}
  next:
    statusTemplate: |
      phase: Running
      startTime: {{ Now | Quote }}
      podIP: {{ PodIPWith .spec.nodeName false .metadata.uid .metadata.name .metadata.namespace | Quote }}
      conditions:
        {{ range list "Initialized" "ContainersReady" "Ready" }}
        - {type: {{ . }}, status: "True", lastTransitionTime: {{ Now | Quote }}}
        {{ end }}
      containerStatuses:
        {{ range .spec.containers }}
        - {name: {{ .name | Quote }}, image: {{ .image | Quote }}, ready: true, started: true, restartCount: 0,
           state: {running: {startedAt: {{ Now | Quote }}}}}
        {{ end }}
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: pod-delete}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
    - {key: .metadata.deletionTimestamp, operator: Exists}
  next:
    finalizers: {empty: true}
    delete: true
"""


def missing_programs() -> list[str]:
    """Those that are not in KUBEBUILDER_ASSETS; all of them if it is not set."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if not assets:
        return list(PROGRAMS)
    return [name for name in PROGRAMS if not (Path(assets) / name).exists()]


def until(what: str, check: Callable[[], T | None], *, seconds: float = _DEADLINE) -> T:
    """The first result of `check` that is not None or False; fails after a deadline."""
    deadline = time.monotonic() + seconds
    while True:
        found = check()
        if found is not None and found is not False:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.1)


class ApiError(Exception):
    """What the API server refused, in its words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class Api:
    """The API server as an administrator uses it: plain JSON."""

    def __init__(self, url: str, authority: Path, token: str) -> None:
        self.url = url
        self._context = ssl.create_default_context(cafile=str(authority))
        self._token = token

    def request(
        self, method: str, path: str, body: Any = None, *, content_type: str = "application/json", **query: str
    ) -> Document:
        """One request. Raises ApiError for a refusal."""
        url = f"{self.url}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        request = urllib.request.Request(url, method=method, data=None if body is None else json.dumps(body).encode())
        request.add_header("Authorization", f"Bearer {self._token}")
        request.add_header("Content-Type", content_type)
        try:
            with urllib.request.urlopen(request, context=self._context, timeout=20) as response:
                return json.loads(response.read() or b"{}")
        except urllib.error.HTTPError as error:
            answer = error.read().decode()
            try:
                message = json.loads(answer).get("message", answer)
            except ValueError:
                message = answer
            raise ApiError(error.code, message) from None

    def get(self, path: str) -> Document | None:
        """The object, None if there is none."""
        try:
            return self.request("GET", path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def items(self, path: str, selector: str = "") -> list[Document]:
        """The objects of a list."""
        query = {"labelSelector": selector} if selector else {}
        return list(self.request("GET", path, **query)["items"])

    def apply(self, path: str, body: Document, *, manager: str = "kubectl", **query: str) -> Document:
        """Server-side apply, as strict about fields as kubectl is."""
        return self.request(
            "PATCH", path, body, content_type="application/apply-patch+yaml", fieldManager=manager, force="true",
            fieldValidation="Strict", **query,
        )  # fmt: skip

    def patch(self, path: str, body: Any, **query: str) -> Document:
        """A merge patch."""
        return self.request("PATCH", path, body, content_type="application/merge-patch+json", **query)


class ControlPlane:
    """The running programs. `folder` has their logs."""

    def __init__(self, folder: Path, url: str, start_api_server: Callable[[], subprocess.Popen[bytes]]) -> None:
        self.folder = folder
        self.url = url
        self.audit = folder / "audit.log"
        self._start_api_server = start_api_server
        self._api_server = start_api_server()
        self.authority = folder / "certs/apiserver.crt"
        until("the API server's certificate", lambda: _alive(self._api_server) and self.authority.exists())
        self.api = Api(url, self.authority, _TOKEN)
        until("the API server is ready", lambda: _alive(self._api_server) and _is_ready(self.api))

    def restart_api_server(self) -> None:
        """Ends it and starts it anew, with the same store behind it."""
        end(self._api_server)
        self._api_server = self._start_api_server()
        until("the API server is ready", lambda: _alive(self._api_server) and _is_ready(self.api))

    def kubeconfig(self, name: str, token: str) -> Path:
        """A file for programs that act with `token`."""
        file = self.folder / f"{name}.kubeconfig"
        authority = base64.b64encode(self.authority.read_bytes()).decode()
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "it", "cluster": {"server": self.url, "certificate-authority-data": authority}}],
            "users": [{"name": name, "user": {"token": token}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": name}}],
            "current-context": "it",
        }
        file.write_text(yaml.safe_dump(document))
        return file

    def kubectl(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs kubectl as an administrator."""
        program = str(Path(os.environ["KUBEBUILDER_ASSETS"]) / "kubectl")
        environment = {**os.environ, "KUBECONFIG": str(self.folder / "admin.kubeconfig")}
        return subprocess.run(
            [program, *arguments], input=stdin, env=environment, text=True, capture_output=True, timeout=60, check=False
        )

    def requests(self, user: str) -> list[Document]:
        """Requests by `user`, from the API server's audit log, oldest first."""
        entries = (json.loads(line) for line in self.audit.read_text().splitlines())
        return [each for each in entries if each["user"]["username"] == user]


_AUDIT_POLICY = """
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
  userGroups: ["system:serviceaccounts"]
- level: None
"""


@contextmanager
def control_plane(folder: Path, *, address: str = "127.0.0.1", on_paper: bool = True) -> Iterator[ControlPlane]:
    """Starts everything, the API server at `address`; ends it all afterwards.

    `on_paper`: with one node that has no GPU and runs nothing.
    """
    etcd, peer, secure = _free_ports(3)
    _write_keys(folder)
    (folder / "tokens.csv").write_text(f'{_TOKEN},admin,admin-uid,"system:masters"\n')
    (folder / "audit.yaml").write_text(_AUDIT_POLICY)
    (folder / "stages.yaml").write_text(_KWOK_STAGES)
    with ExitStack() as stack:
        _start(
            stack, folder, "etcd", f"--data-dir={folder}/etcd", "--unsafe-no-fsync",
            f"--listen-client-urls=http://127.0.0.1:{etcd}", f"--advertise-client-urls=http://127.0.0.1:{etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}", f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-cluster=default=http://127.0.0.1:{peer}",
        )  # fmt: skip

        def start_api_server() -> subprocess.Popen[bytes]:
            return _start(
                stack, folder, "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{etcd}", f"--secure-port={secure}",
                f"--bind-address={address}", "--advertise-address=10.99.0.1", f"--cert-dir={folder}/certs",
                f"--token-auth-file={folder}/tokens.csv", "--authorization-mode=RBAC",
                "--service-cluster-ip-range=10.0.0.0/24", "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-key-file={folder}/sa.pub", f"--service-account-signing-key-file={folder}/sa.key",
                "--disable-admission-plugins=ServiceAccount", "--allow-privileged=true",
                "--endpoint-reconciler-type=none", f"--audit-policy-file={folder}/audit.yaml",
                f"--audit-log-path={folder}/audit.log", "--audit-log-mode=blocking",
            )  # fmt: skip

        plane = ControlPlane(folder, f"https://{address}:{secure}", start_api_server)
        admin = plane.kubeconfig("admin", _TOKEN)
        common = (
            f"--kubeconfig={admin}", "--bind-address=127.0.0.1", "--secure-port=0", "--leader-elect=false",
            # Their own limit of 20 requests a second is meant for clusters that others need, too.
            "--kube-api-qps=1000", "--kube-api-burst=1000",
        )  # fmt: skip
        _start(
            stack, folder, "kube-controller-manager", *common, f"--service-account-private-key-file={folder}/sa.key",
            # Nobody sends heartbeats for a node on paper, and a node without them takes its pods' readiness along.
            "--controllers=*", "--node-monitor-grace-period=24h",
        )  # fmt: skip
        _start(stack, folder, "kube-scheduler", *common, "--authentication-skip-lookup")
        if on_paper:
            _start(
                stack, folder, "kwok", f"--kubeconfig={admin}", f"--config={folder}/stages.yaml",
                "--manage-all-nodes=false", "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
            )  # fmt: skip
            _add_node(plane.api)
        yield plane


def _add_node(api: Api) -> None:
    amounts = {"cpu": "64", "memory": "256Gi", "pods": "500"}
    node = {
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "node-0", "annotations": {"kwok.x-k8s.io/node": "fake"}},
        "status": {"capacity": amounts, "allocatable": amounts},
    }  # fmt: skip
    api.request("POST", "/api/v1/nodes", node)
    until("the node is ready", lambda: not (api.get("/api/v1/nodes/node-0") or {}).get("spec", {}).get("taints"))


def _start(stack: ExitStack, folder: Path, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    program = Path(os.environ["KUBEBUILDER_ASSETS"]) / name
    log = stack.enter_context((folder / f"{name}.log").open("ab"))
    # They would spend a quarter of a small machine's time on collecting garbage.
    environment = {**os.environ, "GOGC": "400"}
    process = subprocess.Popen(
        [str(program), *arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
    )
    # Nothing of it is needed any more, and an API server takes its time to end.
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def end(process: subprocess.Popen[Any]) -> None:
    """Ends a process that was started here, by force if it has to be."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _alive(process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        raise AssertionError(f"{process.args!r} ended with {process.returncode}: see its log")
    return True


def _is_ready(api: Api) -> bool:
    try:
        api.request("GET", "/api/v1/namespaces/default")
    except (ApiError, OSError, ValueError):
        return False
    return True


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _write_keys(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "etcd", ignore_errors=True)
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (folder / "sa.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
    (folder / "sa.pub").write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
