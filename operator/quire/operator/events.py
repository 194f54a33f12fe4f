"""Events of a service's transitions, for `kubectl describe`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from quire.operator import names
from quire.operator.resources.metadata import Manifest, digest
from quire.operator.spec import InferenceService
from quire.operator.status_types import Condition, Status

# What the API allows.
_NOTE_CHARACTERS = 1024

# The others say the same in parts.
_TOLD = ("Ready", "Degraded")


def events(
    service: InferenceService, previous: Mapping[str, Any], status: Status, now: datetime, identity: str
) -> list[Manifest]:
    """One for each condition of those told that changed its status or its reason, and where a canary begins or ends."""
    before = {each["type"]: each for each in previous.get("conditions", ())}
    return [
        _event(service, condition, before.get(condition.type, {}), now, identity)
        for condition in status.conditions
        if _is_told(condition, before.get(condition.type)) and _is_news(condition, before.get(condition.type))
    ]


def _is_told(condition: Condition, before: Mapping[str, Any] | None) -> bool:
    reasons = (condition.reason, before["reason"] if before else "")
    return condition.type in _TOLD or (condition.type == "Progressing" and "Canary" in reasons)


def _is_news(condition: Condition, before: Mapping[str, Any] | None) -> bool:
    if before is None:
        # That nothing is wrong with a new service is none.
        return (condition.type, condition.status) != ("Degraded", "False")
    return (before["status"], before["reason"]) != (condition.status, condition.reason)


def _event(
    service: InferenceService, condition: Condition, before: Mapping[str, Any], now: datetime, identity: str
) -> Manifest:
    # Whoever is killed before the status is written comes to the same name again, and the event is there already.
    transition = digest([service.uid, dict(before), condition.type, condition.status, condition.reason])
    is_bad = condition.type == "Degraded" and condition.status == "True"
    said = condition.message or f"{condition.type} is {condition.status}"
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{service.name}.{transition}", "namespace": service.namespace},
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "type": "Warning" if is_bad else "Normal",
        "reason": condition.reason,
        "action": f"{condition.type}{'' if condition.status == 'True' else 'Not'}",
        "note": said[:_NOTE_CHARACTERS],
        "reportingController": f"{names.GROUP}/{names.FIELD_MANAGER}",
        "reportingInstance": identity[:128],
        "regarding": {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "name": service.name,
            "namespace": service.namespace,
            "uid": service.uid,
        },
    }
