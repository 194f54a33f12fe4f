"""A cluster of paper: what the operator asks for is there at once, and what it looks at is what it asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from operator_strategies import document

from quire.operator.canary import Trial
from quire.operator.config import Images
from quire.operator.core import changes
from quire.operator.events import events
from quire.operator.observed import Observed, key_of
from quire.operator.resources.group import templates
from quire.operator.rollout import Rollout, rollout_of
from quire.operator.spec import parse
from quire.operator.status import plain, status_of

IMAGES = Images()

Document = dict[str, Any]


@dataclass
class Paper:
    """A cluster in which everything is ready at once, but for canaries until `finish_start`."""

    children: dict[tuple[str, str], Document] = field(default_factory=dict)
    pods: tuple[Document, ...] = ()
    status: Document = field(default_factory=dict)
    now: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    is_ready: bool = True
    # Engines of these kinds load their model.
    unready_kinds: frozenset[str] = frozenset()

    def look(self, spec: Document, trial: Trial = Trial()) -> Rollout:  # noqa: B008
        """As the reconciler does."""
        service = parse(document(spec))
        observed = Observed(tuple(self.children.values()), (*self.pods, *self._groups()))
        found = rollout_of(service, observed, IMAGES, previous=self.status, trial=trial, now=self.now)
        wanted = changes(found.service, observed, IMAGES, found.canary)
        for each in wanted.delete:
            del self.children[key_of(each)]
        for each in wanted.apply:
            self.children[key_of(each)] = {**each, "status": self._status(each)}
        status = status_of(found.service, observed, rollout=found.state, previous=self.status, now=self.now)
        self.told = events(found.service, self.status, status, self.now, "x")
        self.status = plain(status)
        return found

    def _status(self, child: Document) -> Document:
        if child["kind"] != "Deployment":
            return {}
        replicas = child["spec"]["replicas"]
        ready = replicas if self._is_ready(child) else 0
        return {"replicas": replicas, "updatedReplicas": replicas, "availableReplicas": ready}

    def _is_ready(self, child: Document) -> bool:
        name = child["metadata"]["name"]
        if name.endswith("-engine"):
            return child["kind"] not in self.unready_kinds
        return self.is_ready or not name.endswith("-canary")

    def _groups(self) -> list[Document]:
        """The pods of engines that span nodes."""
        return [
            {
                "kind": "Pod", "metadata": template["metadata"],
                "status": {"conditions": [{"type": "Ready", "status": str(self._is_ready(child))}]},
            }
            for child in self.children.values() if child["kind"] == "LeaderWorkerSet"
            for template in templates(child) for _ in range(child["spec"]["replicas"])
        ]  # fmt: skip

    def finish_start(self) -> None:
        self.is_ready = True
        for each in self.children.values():
            each["status"] = self._status(each)

    def arguments(self, name: str) -> Sequence[str]:
        kinds = ("Deployment", "LeaderWorkerSet")
        made = next(child for kind in kinds if (child := self.children.get((kind, name))))
        found: Sequence[str] = templates(made)[0]["spec"]["containers"][0]["args"]
        return found

    @property
    def percent(self) -> str:
        """What routers are told."""
        return str(self.children["Service", "demo-canary"]["metadata"]["labels"]["quire.dev/canary-percent"])

    def condition(self, kind: str) -> Document:
        return next(each for each in self.status["conditions"] if each["type"] == kind)
