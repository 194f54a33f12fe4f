"""The API server, as the operator uses it: plain JSON in and out, every write by one field manager.

The package's models know only built-in kinds and drop fields that they don't know; its client below them has
connections, credentials and their renewal.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from kubernetes.aio import client

from quire.operator import names
from quire.operator.kinds import Kind
from quire.operator.resources.metadata import Manifest

ApiException = client.ApiException

# A request that takes longer has lost its connection without a word.
_ANSWER_SECONDS = 20.0

# Objects of one answer: what an operator must hold at a time.
_PAGE = 100

_METADATA = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"
_APPLY = "application/apply-patch+yaml"


class Cluster:
    """Reads and writes objects. Raises ApiException for what the API server refuses, aiohttp's errors if it is away."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api

    async def serves(self, kind: Kind) -> bool:
        """Whether the API server knows the kind."""
        try:
            await self._request("GET", kind.everywhere, {"limit": "1"})
        except ApiException as error:
            if error.status == 404:
                return False
            raise
        return True

    async def get(self, kind: Kind, namespace: str, name: str) -> Manifest | None:
        """The object, None if there is none."""
        try:
            return await self._request("GET", kind.path(namespace, name))
        except ApiException as error:
            if error.status == 404:
                return None
            raise

    async def pages(self, kind: Kind, selector: str = "") -> AsyncIterator[tuple[list[Manifest], int]]:
        """Objects of all namespaces with the labels that `selector` asks for, some at a time, and their version.

        They are so, all together, at that version of the cluster.
        """
        query = {"labelSelector": selector, "limit": str(_PAGE)}
        while True:
            page = await self._request("GET", kind.everywhere, query)
            yield page["items"], int(page["metadata"]["resourceVersion"])
            if not (more := page["metadata"].get("continue")):
                return
            query["continue"] = more

    async def list_metadata(self, kind: Kind, namespace: str, selector: str) -> list[Manifest]:
        """Who the objects of a namespace are that have the labels that `selector` asks for, and no more of them."""
        found = await self._request(
            "GET", kind.path(namespace), {"labelSelector": selector}, accept=f"{_METADATA},application/json"
        )
        # An empty list of metadata is null.
        return list(found["items"] or ())

    async def apply(self, kind: Kind, manifest: Manifest, *, subresource: str = "") -> Manifest:
        """Server-side apply: fields that are asked for become so, whoever wrote them last."""
        metadata = manifest["metadata"]
        path = kind.path(metadata["namespace"], metadata["name"]) + (f"/{subresource}" if subresource else "")
        query = {"fieldManager": names.FIELD_MANAGER, "force": "true"}
        return await self._request("PATCH", path, query, manifest, content_type=_APPLY)

    async def create(self, kind: Kind, manifest: Manifest) -> Manifest:
        """A new object."""
        query = {"fieldManager": names.FIELD_MANAGER}
        return await self._request("POST", kind.path(manifest["metadata"]["namespace"]), query, manifest)

    async def delete(self, kind: Kind, manifest: Manifest) -> None:
        """This very object; one of the same name that came after it stays. What it owns goes later."""
        metadata = manifest["metadata"]
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": metadata["uid"]},
        }
        try:
            await self._request("DELETE", kind.path(metadata["namespace"], metadata["name"]), body=body)
        except ApiException as error:
            # Gone already, or another by now.
            if error.status not in (404, 409):
                raise

    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        *,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Manifest:
        request = await self._api.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params={"Accept": accept, "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        response = await self._api.call_api(*request, _request_timeout=_ANSWER_SECONDS)
        data = await response.read()
        if not 200 <= response.status <= 299:
            raise ApiException(status=response.status, reason=_message(data) or response.reason)
        found: Manifest = json.loads(data)
        return found


def _message(data: bytes) -> str:
    """The API server's words; what stands in front of it may answer with anything."""
    try:
        answer: Any = json.loads(data)
    except ValueError:
        return ""
    return str(answer.get("message", "")) if isinstance(answer, dict) else ""
