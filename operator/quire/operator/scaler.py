"""Measures the load of services and remembers it; `scaling` decides from that how many engines each should have.

The reconciler follows a service here at each look, which is all that the two know of each other: it asks how many
engines are wanted and writes that number, and is woken when the answer has changed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

import aiohttp

from quire.operator import names
from quire.operator.autoscaling_spec import Autoscaling, ScalingTargets
from quire.operator.canary import Attempts, Trial, counted
from quire.operator.load import Loads, engine_load, router_load, sample
from quire.operator.observed import Observed
from quire.operator.pod_counts import PodCounts, is_ready
from quire.operator.resources.metadata import Component
from quire.operator.scaling import History, changed, decide, load_percent, observe
from quire.operator.spec import InferenceService, Key

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A process holds its metrics ready; one that takes longer has other troubles.
_ANSWER_SECONDS = 2.0
_MAX_CONNECTIONS = 64
# Where no number of engines depends on it, load is only shown.
_SHOWN_INTERVALS = 4
# A shown load that is this near to the truth stays; each new one is a write.
_SHOWN_STEP = 10


@dataclass(frozen=True, slots=True)
class Scale:
    """What is known of a service: `replicas` engines are wanted; `load` is in percent of the nearest target.

    `trial` is what the step of a canary has shown that its status tells of; `costs` is what each engine would lose by
    going, by its pod's address.
    """

    replicas: int
    load: int | None = None
    trial: Trial = field(default_factory=Trial)
    # Different at every measurement, and nobody is to be woken for it.
    costs: Mapping[str, int] = field(default_factory=dict, compare=False)


# Finds the scale of a service from what is there and the status that it has.
Follow: TypeAlias = Callable[[InferenceService, Observed, Mapping[str, Any]], Scale]


def unscaled(service: InferenceService, observed: Observed, previous: Mapping[str, Any]) -> Scale:
    """The scale where nobody measures: what the service says."""
    return Scale(service.spec.engine.replicas)


@dataclass(slots=True)
class _Followed:
    """A service that is measured, and where its pods tell their load."""

    history: History
    policy: Autoscaling | None
    scale: Scale
    has_canary: bool = False
    engines: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    loads: Loads | None = None
    # Of a canary: which step is counted, and each router's counters when they were last seen.
    step: Mapping[str, Any] = field(default_factory=dict)
    attempts: dict[str, Attempts] | None = None
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class Scaler:
    """Follows services until they are forgotten. `wake` is called when what `follow` answers has changed.

    `interval` is the time between two measurements, in seconds.
    """

    def __init__(self, wake: Callable[[Key], None], *, interval: float) -> None:
        self._wake = wake
        self._interval = interval
        self._followed: dict[Key, _Followed] = {}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=_MAX_CONNECTIONS),
            timeout=aiohttp.ClientTimeout(total=_ANSWER_SECONDS),
        )

    def follow(self, service: InferenceService, observed: Observed, previous: Mapping[str, Any]) -> Scale:
        """What is wanted of the service, which is measured from now on.

        `previous` is its status: what an operator before this one had decided holds until there is reason to change.
        """
        engine = service.spec.engine
        followed = self._followed.get(service.key)
        if followed is None:
            begin = Scale(previous.get("desiredReplicas", engine.replicas))
            followed = _Followed(History(self._now()), engine.autoscaling, begin)
            followed.task = asyncio.create_task(self._measure(service.key, followed))
            self._followed[service.key] = followed
        followed.engines = tuple(_addresses(observed, Component.ENGINE, names.ENGINE_METRICS))
        followed.routers = tuple(_addresses(observed, Component.ROUTER, names.ROUTER_METRICS))
        followed.policy = policy = engine.autoscaling
        wanted = followed.scale.replicas
        bounded = max(policy.min_replicas, min(wanted, policy.max_replicas)) if policy else engine.replicas
        followed.scale = replace(followed.scale, replicas=bounded)
        followed.has_canary = service.spec.rollout.canary is not None
        step = previous.get("rollout") or {}
        if step != followed.step:
            # What was counted says nothing about the step that has begun.
            followed.step, followed.scale = step, replace(followed.scale, trial=Trial())
        scale = replace(followed.scale, costs=_costs(followed.loads))
        return replace(scale, replicas=1) if not bounded and is_needed(service, observed) else scale

    def forget(self, key: Key) -> None:
        """The service is gone."""
        followed = self._followed.pop(key, None)
        if followed and followed.task:
            followed.task.cancel()

    async def close(self) -> None:
        """Ends all measuring."""
        tasks = [each.task for each in self._followed.values() if each.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    async def _measure(self, key: Key, followed: _Followed) -> None:
        while True:
            decides = followed.policy or followed.has_canary
            await asyncio.sleep(self._interval * (1 if decides else _SHOWN_INTERVALS))
            engines, routers = await asyncio.gather(
                self._ask_all(followed.engines, engine_load), self._ask_all(followed.routers, router_load)
            )
            found = _judge(followed, Loads(self._now(), engines, routers))
            if found != followed.scale:
                followed.scale = found
                self._wake(key)

    async def _ask_all(self, addresses: Iterable[str], read: Callable[[str], T]) -> dict[str, T | None]:
        answers = await asyncio.gather(*(self._ask(address, read) for address in addresses))
        return dict(zip(addresses, answers, strict=True))

    async def _ask(self, address: str, read: Callable[[str], T]) -> T | None:
        try:
            async with self._session.get(f"http://{address}/metrics") as response:
                return read(await response.text())
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            # The pod may be on its way out; what it would have said counts as not known.
            logger.debug("no load from %s: %s", address, error)
            return None

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _judge(followed: _Followed, loads: Loads) -> Scale:
    """One more measurement, and what follows from it."""
    told = sample(loads, followed.loads)
    followed.loads = loads
    scale, policy = followed.scale, followed.policy
    load = load_percent(policy.targets if policy else ScalingTargets(), told)
    wanted = scale.replicas
    if policy:
        followed.history = observe(policy, followed.history, told)
        wanted = decide(policy, followed.history, scale.replicas, loads.at)
        if wanted != scale.replicas:
            followed.history = changed(followed.history, loads.at, scale.replicas, wanted)
    return Scale(wanted, _shown(scale.load, load), _tried(followed, loads))


def _tried(followed: _Followed, loads: Loads) -> Trial:
    """The trial with what routers have counted since the last measurement."""
    now = {address: load.attempts for address, load in loads.routers.items() if load is not None}
    before, followed.attempts = followed.attempts, {**(followed.attempts or {}), **now}
    if before is None or followed.step.get("phase") != "Canary":
        return Trial()
    return followed.scale.trial.plus(counted(before, now), followed.step["revision"])


def _shown(before: int | None, load: int | None) -> int | None:
    if load is None or before is None:
        return load if load is None else _rounded(load)
    return before if abs(load - before) < _SHOWN_STEP else _rounded(load)


def _rounded(load: int) -> int:
    return _SHOWN_STEP * round(load / _SHOWN_STEP)


def is_needed(service: InferenceService, observed: Observed) -> bool:
    """Whether the last engine must stay: routers that don't hold requests without one are still being replaced."""
    is_there = any(each["spec"].get("replicas", 0) > 0 for each in observed.engines(service))
    routers = observed.deployment(service, Component.ROUTER)
    return service.scales_to_zero and is_there and not PodCounts.of(routers, service.spec.router.replicas).is_settled


def _addresses(observed: Observed, component: Component, port: int) -> Iterable[str]:
    """Of the component's ready pods."""
    for pod in observed.pods_of(component):
        address = pod.get("status", {}).get("podIP")
        if address and is_ready(pod):
            yield f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _costs(loads: Loads | None) -> dict[str, int]:
    """By the pod's address; of who did not tell it is not known."""
    engines = loads.engines.items() if loads else ()
    return {address.rpartition(":")[0].strip("[]"): int(load.pages_used) for address, load in engines if load}
