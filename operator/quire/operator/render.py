"""What services become, without a cluster: `quire manifests render` prints it.

Owners are missing, since only a cluster gives objects their identity.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from quire.operator import names
from quire.operator.config import Images
from quire.operator.core import children
from quire.operator.plain_yaml import dump
from quire.operator.resources.metadata import Manifest
from quire.operator.spec import parse
from quire.service.errors import ConfigError


def render(text: str, images: Images) -> str:
    """The YAML of all children of the InferenceServices in `text`; other documents in it are left out.

    Raises ConfigError for YAML that can't be read, a spec that is wrong, and a text without a service.
    """
    services = [parse(document) for document in _documents(text) if _is_service(document)]
    if not services:
        raise ConfigError(f"there is no {names.KIND} of {names.API_VERSION} in it: see manifests/samples for one")
    return _stream(child for service in services for child in children(service, images))


def _documents(text: str) -> list[Any]:
    try:
        return list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"it is not YAML: {error}") from error


def _is_service(document: Any) -> bool:
    return (
        isinstance(document, dict)
        and document.get("kind") == names.KIND
        and document.get("apiVersion") == names.API_VERSION
    )


def _stream(manifests: Iterable[Manifest]) -> str:
    return "---\n".join(map(dump, manifests))
