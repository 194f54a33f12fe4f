"""The life of a service whose pods really run: all four services as processes behind a real API server.

Streams run all the while, and each must come out whole: what a rollout, a kill or an eviction breaks, users see.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificate_files import CertificateFiles, new_ca
from control_plane import HOW_TO_GET_THEM, ApiError, control_plane, missing_programs, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kubelet import Kubelet
from openai import OpenAI
from operator_process import OperatorProcess, Services, install
from own_network import HOST, in_own_network

from quire.operator.kinds import BUILT_IN, CHILD_OF, POD, SECRET

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Document = dict[str, Any]

TOKENS = 24
SECONDS = 120.0
ENGINE: Document = {
    "kvCache": "64Mi",
    "maxModelLen": 512,
    "maxNumSeqs": 4,
    "extraArgs": ["--threads=1"],
    "drainSeconds": 20,
    "surge": 3,
}

WELL = {
    "Ready": ("True", "Serving"),
    "ModelReady": ("True", "Loaded"),
    **{f"{part}Ready": ("True", "Available") for part in ("Engines", "Router", "Gateway")},
    "Progressing": ("False", "Settled"),
    "Degraded": ("False", "AsWanted"),
}


class Users:
    """They ask one after another, each as soon as the one before has a whole answer."""

    def __init__(self, url: str, count: int) -> None:
        self._client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=90.0)
        self._numbers = itertools.count()
        self._leave = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on) for _ in range(count)]
        self.whole = 0
        self.broken: list[str] = []

    def ask(self, question: str) -> str:
        """An answer in words."""
        message = {"role": "user", "content": question}
        answer = self._client.chat.completions.create(
            model="SmolLM2-135M-Instruct", messages=[message], temperature=0, max_tokens=TOKENS,  # type: ignore[list-item]
        )  # fmt: skip
        return answer.choices[0].message.content or ""

    def ask_at_once(self, count: int) -> None:
        """For so many answers of one token; all must come."""
        answer = self._client.completions.create(
            model="SmolLM2-135M-Instruct", prompt="Count upwards from 1.", n=count, max_tokens=1
        )
        assert len(answer.choices) == count

    @contextmanager
    def streaming(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._leave.set()
            for thread in self._threads:
                thread.join()

    def until_more(self) -> None:
        """Returns when as many as there are users have got an answer from now on."""
        before = self.whole
        until("answers", lambda: self.whole >= before + len(self._threads) or self.broken, seconds=SECONDS)
        assert not self.broken

    def _ask_on(self) -> None:
        while not self._leave.is_set():
            try:
                self._stream(f"Count upwards from {next(self._numbers)}.")
                self.whole += 1
            except Exception as error:  # noqa: BLE001
                self.broken.append(repr(error))

    def _stream(self, prompt: str) -> None:
        chunks = self._client.completions.create(
            model="SmolLM2-135M-Instruct", prompt=prompt, stream=True, max_tokens=TOKENS,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        reasons, used = [], 0
        for chunk in chunks:
            reasons += [choice.finish_reason for choice in chunk.choices if choice.finish_reason]
            used = chunk.usage.completion_tokens if chunk.usage else used
        if (reasons, used) != (["length"], TOKENS):
            raise RuntimeError(f"the stream ended with {reasons} after {used} tokens")


@contextmanager
def running(tmp_path: Path) -> Iterator[tuple[Services, Kubelet]]:
    """Services of a namespace whose pods run; what these have said is shown if the block fails."""
    if missing := missing_programs():
        pytest.skip(f"no control plane here, {', '.join(missing)} are missing: {HOW_TO_GET_THEM}")
    with ExitStack() as stack:
        plane = stack.enter_context(control_plane(tmp_path / "plane", address=HOST, on_paper=False))
        install(plane)
        kubelet = stack.enter_context(Kubelet(plane.api, plane.authority, tmp_path / "pods").running())
        operator = OperatorProcess(plane, "operator-0", "--scale-interval=1").start()
        stack.callback(operator.stop)
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        plane.api.request("POST", "/api/v1/namespaces", {"metadata": {"name": "models", "labels": labels}})
        services = Services(plane.api, "models")
        try:
            yield services, kubelet
        except BaseException:
            print(kubelet.logs()[-20000:])
            raise


@in_own_network(seconds=280)
def test_the_life_of_a_service(tmp_path: Path) -> None:
    """Applied, asked, scaled, rolled out and back, killed, evicted, asleep, woken, deleted, without a broken stream."""
    with running(tmp_path) as (services, kubelet):
        life(services, kubelet)


@in_own_network(seconds=120)
def test_services_that_trust_only_one_another(tmp_path: Path) -> None:
    """With a Secret as cert-manager makes it: probes, routers and gateways speak TLS, and nobody else is answered."""
    files = CertificateFiles(tmp_path / "certificates").write(new_ca(), "demo.models.svc")
    with running(tmp_path) as (services, kubelet):
        data = {each.name: b64encode(each.read_bytes()).decode() for each in (files.certificate, files.key, files.ca)}
        services.api.request("POST", SECRET.path("models"), {"metadata": {"name": "peers"}, "data": data})
        services.apply("demo", {"engine": ENGINE, "tls": {"secret": "peers"}})
        services.until("demo", "Ready", "True", "Serving", seconds=SECONDS)
        assert "Paris" in Users(url_of(services), 0).ask("What is the capital of France?")
        for component, port in (("engine", 9100), ("router", 9000)):
            (pod,) = [each for each in kubelet.pods.values() if each.component == component]
            with grpc.insecure_channel(f"{pod.address}:{port}") as stranger, pytest.raises(grpc.RpcError):
                health_pb2_grpc.HealthStub(stranger).Check(health_pb2.HealthCheckRequest(), timeout=10)


def url_of(services: Services) -> str:
    """The OpenAI API."""
    gateway = services.api.get(CHILD_OF["Service"].path("models", "demo-gateway")) or {}
    return f"http://{gateway['spec']['clusterIP']}:8000/v1"


def life(services: Services, kubelet: Kubelet) -> None:
    settled = ("Progressing", "False", "Settled")

    def status() -> Document:
        return dict((services.get("demo") or {})["status"])

    def engines(shown: str) -> None:
        until(f"{shown} engines", lambda: status()["engines"] == shown, seconds=SECONDS)
        services.until("demo", *settled, seconds=SECONDS)

    def conditions() -> dict[str, tuple[str, str]]:
        return {each["type"]: (each["status"], each["reason"]) for each in status()["conditions"]}

    def apply(needs: int = 2, **engine: Any) -> None:
        canary = {"weights": [33], "intervalSeconds": 1, "minRequests": needs}
        services.apply(
            "demo",
            {"engine": {**ENGINE, **engine}, "router": {"holdSeconds": 60}, "rollout": {"canary": canary}},
        )

    apply()
    services.until("demo", "Ready", "True", "Serving", seconds=SECONDS)
    services.until("demo", *settled, seconds=SECONDS)
    assert conditions() == WELL
    users = Users(url_of(services), 2)
    assert "Paris" in users.ask("What is the capital of France?")

    with users.streaming():
        users.until_more()

        # An argument that no engine starts with: the new engine goes again, the old one has served all the while.
        before = pids(kubelet)
        apply(extraArgs=["--threads=1", "--max-waiting=-1"])
        said = services.until("demo", "Degraded", "True", "CanaryRolledBack", seconds=SECONDS)
        assert "max_waiting is -1" in said["message"]
        assert pids(kubelet) == before

        # One that engines start with and then refuse most of what they get: another engine answers instead.
        apply(needs=20, maxNumSeqs=1, extraArgs=["--threads=1", "--max-waiting=1"])
        until("new engines get requests", lambda: status().get("rollout", {}).get("weight") == 33, seconds=SECONDS)
        while status().get("rollout", {}).get("phase") == "Canary":
            users.ask_at_once(8)
        said = services.condition("demo", "Degraded")
        assert said["reason"] == "CanaryRolledBack"
        assert "requests failed on them, more than spec.rollout.canary.maxErrorPercent (5) allows" in said["message"]
        assert pids(kubelet) == before

        scale = "/apis/quire.dev/v1alpha1/namespaces/models/inferenceservices/demo/scale"
        apply()
        services.api.patch(scale, {"spec": {"replicas": 3}})
        engines("3/3")
        assert conditions() == WELL
        users.until_more()

        # A better one: a new engine has answered some of the requests before the old ones drain.
        before = pids(kubelet)
        apply(maxNumSeqs=5, replicas=3)
        services.until("demo", "Progressing", "True", "Canary", seconds=SECONDS)
        until("new engines in their place", lambda: pids(kubelet) and not before & pids(kubelet), seconds=SECONDS)
        engines("3/3")
        assert all("--max-num-seqs=5" in command_of(pid) for pid in pids(kubelet))
        assert conditions() == WELL
        users.until_more()

        # One is killed: what it had goes on elsewhere, the pod comes back.
        victim = kubelet.containers("engine", "engine")[0]
        os.killpg(victim.pid, signal.SIGKILL)
        services.until("demo", "EnginesReady", "False", seconds=SECONDS)
        assert services.condition("demo", "Ready")["status"] == "True"
        engines("3/3")
        assert (victim.restarts, conditions()) == (1, WELL)
        users.until_more()

        # A node is drained: the budget lets one engine go at a time. What it has goes on elsewhere, too.
        listed = services.api.items(POD.path("models"), "app.kubernetes.io/component=engine")
        pods = [each for each in listed if "deletionTimestamp" not in each["metadata"]]
        until("the budget has seen that all are ready", lambda: evict(services, pods[0]))
        assert not evict(services, pods[1])
        users.until_more()

        # Routers are replaced, too, since from now on they hold requests that no engine takes.
        autoscaling = {"minReplicas": 0, "maxReplicas": 1, "idleSeconds": 2}
        apply(maxNumSeqs=5, replicas=1, autoscaling=autoscaling)
        services.until("demo", "Progressing", "True", seconds=SECONDS)
        services.until("demo", *settled, seconds=SECONDS)
        users.until_more()
    assert not users.broken

    services.until("demo", "Ready", "True", "Idle", seconds=SECONDS)
    until("no engine is left", lambda: not kubelet.containers("engine", "engine"))
    services.until("demo", *settled, seconds=SECONDS)
    asleep = {"EnginesReady": ("False", "ScaledToZero"), "ModelReady": ("False", "ScaledToZero")}
    assert conditions() == {**WELL, "Ready": ("True", "Idle"), **asleep}
    assert "Paris" in users.ask("What is the capital of France?")
    services.until("demo", "Ready", "True", "Serving", seconds=SECONDS)

    services.delete("demo")
    until("nothing is left", lambda: not left(services) and not kubelet.pods, seconds=SECONDS)


def pids(kubelet: Kubelet) -> set[int]:
    return {each.pid for each in kubelet.containers("engine", "engine") if each.process}


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def evict(services: Services, pod: Document) -> bool:
    """Whether the pod may go."""
    metadata = {"name": pod["metadata"]["name"], "namespace": "models"}
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    try:
        services.api.request("POST", POD.path("models", metadata["name"]) + "/eviction", body)
    except ApiError as error:
        if "disruption budget" not in error.message:
            raise
        return False
    return True


def left(services: Services) -> list[Document]:
    return [
        each for kind in (*BUILT_IN, POD) for each in services.api.items(kind.path("models"), "quire.dev/service=demo")
    ]
