"""One pod as processes, in a network namespace of its own: what a kubelet does with a container runtime.

Images are not looked at: `python` is the one that runs the tests. Probes are asked every half a second, whatever period
they have, and mean as many seconds as in a cluster.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from own_network import HOST, ROOT

Document = dict[str, Any]

_PROBE_SECONDS = 0.5
_TOKEN = "/run/secrets/kubernetes.io/serviceaccount"


@dataclass
class Sources:
    """What containers are given from outside: ConfigMaps, Secrets and a token, by name."""

    config_map: Callable[[str], Mapping[str, str]]
    secret: Callable[[str], Mapping[str, bytes]]
    token: Callable[[str], Mapping[str, bytes]]
    api_port: int


@dataclass
class Container:
    """A container: its process, how it is, and how it was before."""

    spec: Document
    process: asyncio.subprocess.Process | None = None
    started: bool = False
    ready: bool = False
    restarts: int = 0
    last: Document = field(default_factory=dict)
    has_started: asyncio.Event = field(default_factory=asyncio.Event)
    began: str = ""

    @property
    def name(self) -> str:
        return str(self.spec["name"])

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def status(self) -> Document:
        """As a kubelet has it in the pod's status."""
        is_running = self.process is not None and self.process.returncode is None
        state = {"running": {"startedAt": self.began}} if is_running else {"waiting": {"reason": "ContainerCreating"}}
        return {
            "name": self.name, "image": self.spec["image"], "imageID": "", "ready": self.ready,
            "started": self.started, "restartCount": self.restarts, "state": state,
            **({"lastState": {"terminated": self.last}} if self.last else {}),
        }  # fmt: skip


class PodProcess:
    """Runs one pod until it is stopped."""

    def __init__(self, pod: Document, address: str, folder: Path, sources: Sources) -> None:
        self.pod = pod
        self.address = address
        self._folder = folder
        self._sources = sources
        spec = pod["spec"]
        self.init = [Container(each) for each in spec.get("initContainers", ())]
        self.main = [Container(each) for each in spec["containers"]]
        self._pause: asyncio.subprocess.Process | None = None
        self._volumes: dict[str, Path] = {}
        self._told_of = {each["name"] for each in spec.get("volumes", ()) if "secret" in each}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def component(self) -> str:
        """Of which it is one."""
        return str(self.pod["metadata"]["labels"]["app.kubernetes.io/component"])

    @property
    def is_ready(self) -> bool:
        """Whether all containers are."""
        return all(each.ready for each in self.main) and all(each.started for each in self.init)

    def status(self) -> Document:
        """The pod's status, without who scheduled it."""
        ready = "True" if self.is_ready else "False"
        kinds = {"Initialized": "True", "ContainersReady": ready, "Ready": ready}
        return {
            "phase": "Running" if all(each.started for each in self.init) else "Pending",
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "hostIP": HOST,
            "conditions": [{"type": kind, "status": value} for kind, value in kinds.items()],
            "initContainerStatuses": [each.status() for each in self.init],
            "containerStatuses": [each.status() for each in self.main],
        }

    async def run(self) -> None:
        """Starts everything, native sidecars first, and starts again what ends."""
        await self._make_network()
        self._volumes = {each["name"]: await self._volume(each) for each in self.pod["spec"].get("volumes", ())}
        for container in self.init:
            self._tasks.append(asyncio.create_task(self._keep(container)))
            await container.has_started.wait()
        self._tasks += [asyncio.create_task(self._keep(container)) for container in self.main]
        await asyncio.gather(*self._tasks)

    async def stop(self, grace: float) -> None:
        """preStop, SIGTERM, and SIGKILL after `grace` seconds in all; sidecars go last."""
        deadline = time.monotonic() + grace
        hooks = [each.spec.get("lifecycle", {}).get("preStop", {}).get("sleep", {}) for each in self.main]
        await asyncio.sleep(min(grace, max((each.get("seconds", 0) for each in hooks), default=0)))
        for task in self._tasks:
            task.cancel()
        for containers in (self.main, self.init):
            await asyncio.gather(*(_end(each, deadline) for each in containers))
        if self._pause is not None and self._pause.returncode is None:
            self._pause.kill()
            await self._pause.wait()
        for each in self.pod["spec"].get("volumes", ()):
            if each.get("emptyDir", {}).get("medium") == "Memory" and each["name"] in self._volumes:
                await command("umount", "--lazy", str(self._volumes[each["name"]]))

    async def _make_network(self) -> None:
        # It holds the namespace, and says when it does.
        self._pause = await asyncio.create_subprocess_exec(
            "unshare", "--net", "sh", "-c", "echo ready && exec sleep infinity", stdout=asyncio.subprocess.PIPE
        )
        assert self._pause.stdout is not None
        await self._pause.stdout.readline()
        pid = self._pause.pid
        link = "pod" + self.address.replace(".", "")[-8:]
        await command("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        await command("ip", "link", "set", link, "master", "pods", "up")
        inside = (
            f"ip addr add {self.address}/16 dev eth0 && ip link set eth0 up && ip link set lo up && "
            f"ip route add default via {HOST}"
        )
        await command("nsenter", f"--net=/proc/{pid}/ns/net", "sh", "-c", inside)

    async def _volume(self, volume: Document) -> Path:
        folder = self._folder / "volumes" / volume["name"]
        folder.mkdir(parents=True)
        if (empty := volume.get("emptyDir")) is not None:
            if empty.get("medium") == "Memory":
                await command("mount", "-t", "tmpfs", "tmpfs", str(folder))
        elif "secret" in volume:
            found = self._sources.secret(volume["secret"]["secretName"])
            for item in volume["secret"].get("items") or [{"key": key, "path": key} for key in found]:
                (folder / item["path"]).write_bytes(found[item["key"]])
        else:
            raise NotImplementedError(f"volumes of this kind are not made here: {volume}")
        return folder

    async def _keep(self, container: Container) -> None:
        while True:
            container.started = container.ready = False
            container.began = _now()
            await self._start(container)
            assert container.process is not None
            probing = asyncio.create_task(self._probe(container))
            try:
                status = await container.process.wait()
            finally:
                probing.cancel()
            _kill_group(container)
            container.last = {
                "exitCode": status if status >= 0 else 128 - status, "startedAt": container.began, "finishedAt": _now(),
                "reason": "Error", "message": self.log(container.name)[-500:],
            }  # fmt: skip
            container.restarts += 1
            container.started = container.ready = False
            await asyncio.sleep(0.5)  # a kubelet waits longer

    def log(self, name: str) -> str:
        """What the container has said in all its lives."""
        return (self._folder / f"{name}.log").read_text(errors="replace")

    async def _start(self, container: Container) -> None:
        spec = container.spec
        environment = self._environment(spec)
        python, *words = self._words(spec, [*spec["command"], *spec.get("args", ())])
        assert python == "python"
        words = [re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], word) for word in words]
        steps = []
        if self.pod["spec"].get("automountServiceAccountToken"):
            token = self._folder / "token"
            token.mkdir(exist_ok=True)
            for name, content in self._sources.token(self.pod["spec"]["serviceAccountName"]).items():
                (token / name).write_bytes(content)
            steps += [f"mount -t tmpfs tmpfs /run && mkdir -p {_TOKEN} && mount --bind {token} {_TOKEN}"]
        for mount in spec.get("volumeMounts", ()):
            folder = self._volumes[mount["name"]]
            if mount["mountPath"] == "/tmp":
                # Not mounted: what runs here may itself lie under /tmp.
                environment |= {"TMPDIR": str(folder), "HOME": str(folder)}
            elif mount["name"] not in self._told_of:
                steps.append(f"mount --bind {folder} {mount['mountPath']}")
        assert self._pause is not None
        with (self._folder / f"{container.name}.log").open("ab") as log:
            container.process = await asyncio.create_subprocess_exec(
                "nsenter", f"--net=/proc/{self._pause.pid}/ns/net", "unshare", "--mount",
                "sh", "-c", " && ".join((*steps, 'exec "$@"')), "sh", sys.executable, *words,
                env=environment, cwd=ROOT, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def _words(self, spec: Document, words: Sequence[str]) -> list[str]:
        """A command as it is here: where there is no folder to mount a Secret on, its flags name the Secret's own."""
        for mount in spec.get("volumeMounts", ()):
            if mount["name"] in self._told_of:
                words = [word.replace(mount["mountPath"], str(self._volumes[mount["name"]])) for word in words]
        return list(words)

    def _environment(self, spec: Document) -> dict[str, str]:
        found = {
            **{name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ},
            "KUBERNETES_SERVICE_HOST": HOST,
            "KUBERNETES_SERVICE_PORT": str(self._sources.api_port),
        }
        for source in spec.get("envFrom", ()):
            found |= self._sources.config_map(source["configMapRef"]["name"])
        for each in spec.get("env", ()):
            fields = {"metadata.name": self.pod["metadata"]["name"], "status.podIP": self.address}
            found[each["name"]] = each.get("value") or fields[each["valueFrom"]["fieldRef"]["fieldPath"]]
        return found

    async def _probe(self, container: Container) -> None:
        spec = container.spec
        if startup := spec.get("startupProbe"):
            deadline = time.monotonic() + startup["failureThreshold"] * startup["periodSeconds"]
            while not await self._passes(spec, startup):
                if time.monotonic() > deadline:
                    _kill_group(container)
                await asyncio.sleep(_PROBE_SECONDS)
        container.started = True
        container.has_started.set()
        _come_second(container)
        lived = time.monotonic()
        while True:
            container.ready = await self._passes(spec, spec["readinessProbe"]) if "readinessProbe" in spec else True
            if live := spec.get("livenessProbe"):
                if await self._passes(spec, live):
                    lived = time.monotonic()
                elif time.monotonic() > lived + live["failureThreshold"] * live["periodSeconds"]:
                    _kill_group(container)
            await asyncio.sleep(_PROBE_SECONDS)

    async def _passes(self, spec: Document, probe: Document) -> bool:
        seconds = probe.get("timeoutSeconds", 1)
        try:
            async with asyncio.timeout(seconds):
                if "exec" in probe:
                    return await self._ends_well(self._words(spec, probe["exec"]["command"]))
                if "grpc" in probe:
                    async with grpc.aio.insecure_channel(f"{self.address}:{probe['grpc']['port']}") as channel:
                        stub = health_pb2_grpc.HealthStub(channel)
                        answer = await stub.Check(health_pb2.HealthCheckRequest())
                        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
                get = probe["httpGet"]
                url = f"{get.get('scheme', 'HTTP').lower()}://{self.address}:{get['port']}{get['path']}"
                async with aiohttp.ClientSession() as session, session.get(url, ssl=False) as answer:
                    return 200 <= answer.status < 400
        except (grpc.aio.AioRpcError, aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def _ends_well(self, words: Sequence[str]) -> bool:
        assert self._pause is not None
        process = await asyncio.create_subprocess_exec(
            "nsenter", f"--net=/proc/{self._pause.pid}/ns/net", sys.executable, *words[1:],
            cwd=ROOT, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            return await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()


async def _end(container: Container, deadline: float) -> None:
    if container.process is None:
        return
    if container.process.returncode is None:
        container.process.send_signal(signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await container.process.wait()
    _kill_group(container)
    await container.process.wait()


def _come_second(container: Container) -> None:
    """Who starts has the cores first, or engines that are busy would keep all others from getting ready.

    Linux shares its cores out by session, and each container is one.
    """
    with suppress(OSError):
        Path(f"/proc/{container.pid}/autogroup").write_text("15")


def _kill_group(container: Container) -> None:
    with suppress(ProcessLookupError):
        os.killpg(container.pid, signal.SIGKILL)


async def command(*words: str) -> None:
    """Runs a command to its end. Raises RuntimeError with what it said if it fails."""
    process = await asyncio.create_subprocess_exec(*words, stderr=asyncio.subprocess.PIPE)
    _, said = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)}: {said.decode()}")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
