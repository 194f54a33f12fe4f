"""What engines and routers say of their load in their Prometheus metrics, and the sample that it makes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from quire.operator.canary import Attempts
from quire.operator.scaling import Sample

_QUANTILE = 0.9


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """`first_tokens` counts the requests whose first token took no longer than each bound, in seconds."""

    queued_prefill_tokens: float
    requests: int
    pages_used: float
    pages_total: float
    first_tokens: Mapping[float, float]


@dataclass(frozen=True, slots=True)
class RouterLoad:
    """`requests` are in flight or held now, `ended` all that ever ended; `attempts` are engines', by revision."""

    requests: int
    ended: float
    attempts: Attempts = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loads:
    """What was told at one time, by address; None is who did not answer, or not in words that are known."""

    at: float = 0.0
    engines: Mapping[str, EngineLoad | None] = field(default_factory=dict)
    routers: Mapping[str, RouterLoad | None] = field(default_factory=dict)


def engine_load(text: str) -> EngineLoad:
    """An engine's metrics. Raises ValueError for others."""
    found = _samples(text, "quire_engine_")
    pages = {labels["state"]: value for labels, value in found.get("pages", ())}
    buckets = found.get("time_to_first_token_seconds_bucket", ())
    return EngineLoad(
        queued_prefill_tokens=_sum(found, "pending_prefill_tokens"),
        requests=int(_sum(found, "running_requests") + _sum(found, "waiting_requests")),
        pages_used=pages.get("used", 0.0),
        pages_total=sum(pages.values()),
        first_tokens={float(labels["le"]): value for labels, value in buckets},
    )


def router_load(text: str) -> RouterLoad:
    """A router's metrics. Raises ValueError for others."""
    found = _samples(text, "quire_router_")
    held = _sum(found, "held_requests")
    # Neither has a sample before the first engine and the first request.
    in_flight = sum(value for _, value in found.get("in_flight_requests", ()))
    ended = sum(value for _, value in found.get("requests_total", ()))
    attempts = {(labels["revision"], labels["outcome"]): value for labels, value in found.get("attempts_total", ())}
    return RouterLoad(int(held + in_flight), ended, attempts)


def sample(now: Loads, before: Loads | None) -> Sample:
    """The load at `now`. A counter that is new or went back counts from zero, since its process does."""
    engines = [load for load in now.engines.values() if load is not None]
    routers = [load for load in now.routers.values() if load is not None]
    pages = sum(load.pages_total for load in engines)
    told = before.routers if before else {}
    return Sample(
        at=now.at,
        engines=len(engines),
        is_complete=None not in (*now.engines.values(), *now.routers.values()) and bool(routers),
        queued_prefill_tokens=sum(load.queued_prefill_tokens for load in engines),
        page_use=sum(load.pages_used for load in engines) / pages if pages else 0.0,
        first_token_seconds=_first_token_seconds(now, before),
        requests=max(sum(load.requests for load in engines), sum(load.requests for load in routers)),
        had_requests=before is None or any(load and _ended(told.get(name)) != load.ended
                                           for name, load in now.routers.items()),
    )  # fmt: skip


def _ended(load: RouterLoad | None) -> float | None:
    return load.ended if load else None


def _first_token_seconds(now: Loads, before: Loads | None) -> float | None:
    """The quantile over the requests between the two, all engines together, as Prometheus' histogram_quantile."""
    counts: dict[float, float] = {}
    for name, load in now.engines.items():
        old = before.engines.get(name) if before else None
        if load is None or old is None:
            continue
        has_restarted = any(count < old.first_tokens.get(bound, 0) for bound, count in load.first_tokens.items())
        for bound, count in load.first_tokens.items():
            base = 0 if has_restarted else old.first_tokens.get(bound, 0)
            counts[bound] = counts.get(bound, 0) + count - base
    total = max(counts.values(), default=0)
    if not total:
        return None
    lower, below = 0.0, 0.0
    for bound, count in sorted(counts.items()):
        if count >= _QUANTILE * total:
            if bound == float("inf"):
                return lower
            return lower + (bound - lower) * (_QUANTILE * total - below) / (count - below)
        lower, below = bound, count
    return lower


def _samples(text: str, prefix: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for each in family.samples:
            if each.name.startswith(prefix):
                found.setdefault(each.name.removeprefix(prefix), []).append((each.labels, each.value))
    return found


def _sum(found: Mapping[str, list[tuple[dict[str, str], float]]], name: str) -> float:
    if name not in found:
        raise ValueError(f"there is no {name} among the metrics")
    return sum(value for _, value in found[name])
