"""What there is in the cluster, as the watches have told it: reconciling reads this and asks the API server nothing.

`handlers` puts in what kopf's watches say, the reconciler what its own writes came to, and `listing` what a list says.
Versions order them, since news of one object comes on two ways: an older version never replaces a newer one.
"""

from __future__ import annotations

from collections.abc import Iterable

from quire.operator import names
from quire.operator.kinds import CHILDREN, POD, SERVICE, Kind
from quire.operator.resources.metadata import Manifest
from quire.operator.spec import Key

# Of a kind: namespace and name.
_Name = tuple[str, str]

_CHILDREN = frozenset(CHILDREN)


class Store:
    """Objects by kind and name, and by the service that their label names."""

    def __init__(self) -> None:
        self._objects: dict[Kind, dict[_Name, Manifest]] = {}
        self._of_service: dict[Key, dict[tuple[Kind, str], Manifest]] = {}
        # At which version an object went, and that of the last list: no older news brings an object back.
        self._gone: dict[Kind, dict[_Name, int]] = {}
        self._listed: dict[Kind, int] = {}

    def service(self, key: Key) -> Manifest | None:
        """The service itself, None if there is none."""
        return self.find(SERVICE, key.namespace, key.name)

    def find(self, kind: Kind, namespace: str, name: str) -> Manifest | None:
        """The object, None if there is none."""
        return self._objects.get(kind, {}).get((namespace, name))

    def children(self, key: Key) -> tuple[Manifest, ...]:
        """What has the service's label, pods aside."""
        of_service = self._of_service.get(key, {})
        return tuple(each for (kind, _), each in of_service.items() if kind in _CHILDREN)

    def pods(self, key: Key) -> tuple[Manifest, ...]:
        """The service's pods: their metadata and status."""
        return tuple(each for (kind, _), each in self._of_service.get(key, {}).items() if kind == POD)

    def put(self, kind: Kind, found: Manifest) -> bool:
        """An object is so now. Returns whether that is news."""
        name, version = _name(found), _version(found)
        there = self._objects.get(kind, {}).get(name)
        if version <= (self._last_gone(kind, name) if there is None else _version(there)):
            return False
        self._drop(kind, name)
        kept = slim(kind, found)
        self._objects.setdefault(kind, {})[name] = kept
        if owner := _service(kind, found):
            self._of_service.setdefault(owner, {})[kind, name[1]] = kept
        return True

    def written(self, kind: Kind, found: Manifest) -> bool:
        """A write of ours came to this. Returns whether others have changed it since it was last heard of: their news
        came with the answer, and when a watch tells of it, it is none any more."""
        there = self.find(kind, *_name(found))
        self.put(kind, found)
        return there is not None and _others_part(kind, there) != _others_part(kind, slim(kind, found))

    def hear(self, kind: Kind, found: Manifest, *, is_gone: bool) -> Key | None:
        """A watch tells of an object. Returns the service about which that is news."""
        if is_gone:
            self.remove(kind, found)
        elif not self.put(kind, found):
            return None
        return _service(kind, found)

    def remove(self, kind: Kind, found: Manifest) -> None:
        """An object is gone, last seen as `found`."""
        name = _name(found)
        there = self._objects.get(kind, {}).get(name)
        if there is None or _version(there) <= _version(found):
            self._drop(kind, name)
            self._gone.setdefault(kind, {})[name] = max(_version(found), self._last_gone(kind, name))

    def replace(self, kind: Kind, found: Iterable[Manifest], version: int) -> set[Key]:
        """Objects of the kind are these at `version`. Returns the services about which that is news.

        What is newer than the list stays: it was made, or changed, since.
        """
        listed = {_name(each): each for each in found}
        news = set()
        for name, there in list(self._objects.get(kind, {}).items()):
            if name not in listed and _version(there) <= version:
                news.add(_service(kind, there))
                self._drop(kind, name)
        news |= {_service(kind, each) for each in listed.values() if self.put(kind, each)}
        version = self._listed[kind] = max(version, self._listed.get(kind, 0))
        self._gone[kind] = {name: at for name, at in self._gone.get(kind, {}).items() if at > version}
        return {key for key in news if key}

    def _last_gone(self, kind: Kind, name: _Name) -> int:
        return max(self._listed.get(kind, 0), self._gone.get(kind, {}).get(name, 0))

    def _drop(self, kind: Kind, name: _Name) -> None:
        there = self._objects.get(kind, {}).pop(name, None)
        if there is not None and (owner := _service(kind, there)):
            of_service = self._of_service.get(owner, {})
            of_service.pop((kind, name[1]), None)
            if not of_service:
                self._of_service.pop(owner, None)


def _name(found: Manifest) -> _Name:
    return found["metadata"]["namespace"], found["metadata"]["name"]


def _version(found: Manifest) -> int:
    # A number that grows, by the API's own word since Kubernetes 1.35, and in fact since ever.
    return int(found["metadata"]["resourceVersion"])


def _service(kind: Kind, found: Manifest) -> Key | None:
    if kind == SERVICE:
        return Key(*_name(found))
    name = found["metadata"].get("labels", {}).get(names.SERVICE)
    return Key(found["metadata"]["namespace"], name) if name else None


def _others_part(kind: Kind, found: Manifest) -> Manifest:
    """What nobody here writes: all but the status of a service, and that of anything else."""
    metadata = found["metadata"]
    if kind == SERVICE:
        kept = {name: value for name, value in metadata.items() if name != "resourceVersion"}
        return {**found, "metadata": kept, "status": None}
    return {"status": found.get("status"), "end": metadata.get("deletionTimestamp")}


def slim(kind: Kind, found: Manifest) -> Manifest:
    """What anybody here looks at; items of a list don't say what they are, these do."""
    metadata = {name: value for name, value in found["metadata"].items() if name != "managedFields"}
    kept = {**found, "apiVersion": kind.api_version, "kind": kind.name, "metadata": metadata}
    if kind == POD:
        kept.pop("spec", None)
    return kept
