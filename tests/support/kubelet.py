"""A node for tests whose pods really run, as processes: a small kubelet, the names of Services, and their addresses.

It works in the namespaces of `own_network`: pods have addresses on its bridge, /etc/hosts knows the Services, and each
cluster IP leads to a ready pod. It asks the API server every 0.2 s what there is to do.
"""

from __future__ import annotations

import _thread
import asyncio
import base64
import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from control_plane import Api, ApiError, until
from pod_process import Container, PodProcess, Sources, command

Document = dict[str, Any]

_LOOK_SECONDS = 0.2
_PODS = "/api/v1/namespaces/{}/pods/{}"


class Kubelet:
    """Node, kubelet and kube-proxy of one machine. `folder` has the pods' volumes and logs."""

    def __init__(self, api: Api, authority: Path, folder: Path) -> None:
        self._api = api
        self._authority = authority
        self._folder = folder
        self._hosts = folder / "hosts"
        self.pods: dict[str, PodProcess] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopping: dict[str, asyncio.Task[None]] = {}
        self._told: dict[str, Document] = {}
        self._proxies: dict[tuple[str, int], asyncio.Server] = {}
        self._backends: dict[tuple[str, int], list[tuple[str, int]]] = {}
        self._last_address = 1

    @contextmanager
    def running(self) -> Iterator[Kubelet]:
        """In a thread, until the block ends; raises what ended it before that."""
        self._folder.mkdir(parents=True)
        self._hosts.write_text("127.0.0.1 localhost\n")
        (self._folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        for name in ("hosts", "resolv.conf"):
            subprocess.run(["mount", "--bind", str(self._folder / name), f"/etc/{name}"], check=True)
        self._add_node()
        stop, failures = threading.Event(), list[BaseException]()

        def work() -> None:
            try:
                asyncio.run(self._run(stop))
            except BaseException as error:  # noqa: BLE001
                failures.append(error)
                _thread.interrupt_main()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()
            if failures:
                raise failures[0]

    def containers(self, component: str, name: str) -> list[Container]:
        """The containers of that name in the component's pods that are not on their way out."""
        return [
            container
            for uid, pod in list(self.pods.items())
            if pod.component == component and uid not in self._stopping
            for container in (*pod.init, *pod.main)
            if container.name == name
        ]

    def logs(self) -> str:
        """The last words of every container, also of those that are gone."""
        return "\n".join(f"== {log.parent.name}/{log.name}\n{log.read_text()[-1500:]}"
                         for log in sorted(self._folder.glob("*/*.log")))  # fmt: skip

    def _add_node(self) -> None:
        amounts = {"cpu": "64", "memory": "64Gi", "pods": "100"}
        self._api.request(
            "POST", "/api/v1/nodes",
            {
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": "real"},
                "status": {
                    "capacity": amounts, "allocatable": amounts,
                    "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
                },
            },
        )  # fmt: skip
        until(
            "the node is ready", lambda: not (self._api.get("/api/v1/nodes/real") or {}).get("spec", {}).get("taints")
        )

    async def _run(self, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                await self._look()
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            for server in self._proxies.values():
                server.close()
            await asyncio.gather(*(pod.stop(0) for pod in self.pods.values()))
            for task in self._tasks.values():
                task.cancel()

    async def _look(self) -> None:
        pods = await asyncio.to_thread(self._api.items, "/api/v1/pods?fieldSelector=spec.nodeName%3Dreal")
        for pod in pods:
            uid, metadata = pod["metadata"]["uid"], pod["metadata"]
            if uid not in self.pods and not metadata.get("deletionTimestamp"):
                self._start(pod)
            if metadata.get("deletionTimestamp") and uid not in self._stopping:
                self._stopping[uid] = asyncio.create_task(self._stop(pod))
        for task in (*self._tasks.values(), *self._stopping.values()):
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error
        await asyncio.gather(*(self._tell(uid) for uid in list(self.pods) if uid not in self._stopping))
        await self._route()

    def _start(self, pod: Document) -> None:
        self._last_address += 1
        metadata = pod["metadata"]
        folder = self._folder / metadata["name"]
        folder.mkdir()
        address = f"10.244.0.{self._last_address}"
        process = PodProcess(pod, address, folder, self._sources(metadata["namespace"]))
        self.pods[metadata["uid"]] = process
        self._tasks[metadata["uid"]] = asyncio.create_task(process.run())

    async def _stop(self, pod: Document) -> None:
        metadata = pod["metadata"]
        if process := self.pods.get(metadata["uid"]):
            self._tasks.pop(metadata["uid"]).cancel()
            await process.stop(metadata["deletionGracePeriodSeconds"])
            del self.pods[metadata["uid"]]
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": metadata["uid"]}}
        with suppress(ApiError):
            path = _PODS.format(metadata["namespace"], metadata["name"])
            await asyncio.to_thread(self._api.request, "DELETE", path, body)

    async def _tell(self, uid: str) -> None:
        process = self.pods[uid]
        status = process.status()
        if status == self._told.get(uid):
            return
        metadata = process.pod["metadata"]
        with suppress(ApiError):
            path = _PODS.format(metadata["namespace"], metadata["name"]) + "/status"
            await asyncio.to_thread(
                lambda: self._api.request(
                    "PATCH", path, {"status": status}, content_type="application/strategic-merge-patch+json"
                )
            )
            self._told[uid] = status

    def _sources(self, namespace: str) -> Sources:
        path = f"/api/v1/namespaces/{namespace}"

        def token(account: str) -> dict[str, bytes]:
            asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
            found = self._api.request("POST", f"{path}/serviceaccounts/{account}/token", asked)
            content = self._authority.read_bytes()
            return {"token": found["status"]["token"].encode(), "ca.crt": content, "namespace": namespace.encode()}

        def secret(name: str) -> dict[str, bytes]:
            found = (self._api.get(f"{path}/secrets/{name}") or {})["data"]
            return {key: base64.b64decode(value) for key, value in found.items()}

        def config_map(name: str) -> dict[str, str]:
            return dict((self._api.get(f"{path}/configmaps/{name}") or {})["data"])

        return Sources(config_map, secret, token, urlsplit(self._api.url).port or 443)

    async def _route(self) -> None:
        services = await asyncio.to_thread(self._api.items, "/api/v1/services")
        slices = await asyncio.to_thread(self._api.items, "/apis/discovery.k8s.io/v1/endpointslices")
        lines = ["127.0.0.1 localhost"]
        for service in services:
            metadata, spec = service["metadata"], service["spec"]
            own = [
                each for each in slices
                if each["metadata"]["labels"].get("kubernetes.io/service-name") == metadata["name"]
                and each["metadata"]["namespace"] == metadata["namespace"]
            ]  # fmt: skip
            addresses = [spec["clusterIP"]]
            if spec["clusterIP"] == "None":
                addresses = [ready for each in own for ready, _ in _ready(each)]
            else:
                await self._balance(spec, own)
            lines += [f"{each} {metadata['name']}.{metadata['namespace']}.svc" for each in addresses]
        text = "\n".join(lines) + "\n"
        if text != self._hosts.read_text():
            # In its place: what is mounted over /etc/hosts is this very file.
            self._hosts.write_text(text)

    async def _balance(self, spec: Document, slices: list[Document]) -> None:
        for port in spec["ports"]:
            key = (spec["clusterIP"], port["port"])
            self._backends[key] = [
                (address, ports[port["name"]])
                for each in slices for address, ports in _ready(each) if port["name"] in ports
            ]  # fmt: skip
            if key not in self._proxies and port["name"] in ("http", "grpc"):
                await command("ip", "addr", "replace", f"{key[0]}/32", "dev", "pods")
                self._proxies[key] = await asyncio.start_server(partial(self._forward, key), *key)

    async def _forward(self, key: tuple[str, int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(*random.choice(self._backends[key]))
        except (OSError, IndexError):
            # No pod is ready, or it is gone already.
            writer.close()
            return
        await asyncio.gather(_copy(reader, back), _copy(there, writer))


def _ready(endpoints: Document) -> list[tuple[str, dict[str, int]]]:
    ports = {each["name"]: each["port"] for each in endpoints.get("ports") or ()}
    return [
        (each["addresses"][0], ports) for each in endpoints.get("endpoints") or () if each["conditions"].get("ready")
    ]


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    with suppress(OSError):
        writer.close()
