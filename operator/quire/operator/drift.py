"""Whether what is in the cluster is what was asked for.

Server-side apply would find out too, but as a write; the steady state must have none. The API server adds fields, which
are not ours to judge, and it writes quantities its own way.
"""

from __future__ import annotations

from typing import Any

from quire.operator import names
from quire.operator.quantity import quantity
from quire.operator.resources.metadata import Manifest, digest

_QUANTITIES = frozenset({"limits", "requests"})


def stamped(desired: Manifest) -> Manifest:
    """`desired` with its own hash: a field that is no longer asked for shows as another hash, not as a difference."""
    metadata = desired["metadata"]
    annotations = {**metadata.get("annotations", {}), names.DESIRED_HASH: digest(desired)}
    return {**desired, "metadata": {**metadata, "annotations": annotations}}


def covers(live: Any, desired: Any, *, inside: str = "") -> bool:
    """Whether every field of `desired` is so in `live`; `inside` is the field that holds them."""
    if isinstance(desired, dict):
        return isinstance(live, dict) and all(
            key in live and covers(live[key], value, inside=key if inside not in _QUANTITIES else inside)
            for key, value in desired.items()
        )
    if isinstance(desired, list):
        return isinstance(live, list) and _list_covers(live, desired, inside)
    if inside in _QUANTITIES:
        return live == desired or (quantity(live) is not None and quantity(live) == quantity(desired))
    return bool(live == desired)


def _list_covers(live: list[Any], desired: list[Any], inside: str) -> bool:
    key = next((key for key in ("name", "uid") if desired and _tells_apart(key, desired)), "")
    if not key:
        return len(live) == len(desired) and all(
            covers(there, wanted, inside=inside) for there, wanted in zip(live, desired, strict=True)
        )
    # Others may add entries of their own, such as a container that a mesh injects.
    by_key = {each.get(key): each for each in live if isinstance(each, dict)}
    return all(each[key] in by_key and covers(by_key[each[key]], each, inside=inside) for each in desired)


def _tells_apart(key: str, entries: list[Any]) -> bool:
    # A route may lead through several listeners of one Gateway.
    found = [each[key] for each in entries if isinstance(each, dict) and key in each]
    return len(set(found)) == len(entries) == len(found)
