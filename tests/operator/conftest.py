"""One control plane and one operator for all tests that need them; a namespace of its own for each test."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import pytest
from control_plane import HOW_TO_GET_THEM, ControlPlane, control_plane, missing_programs
from kubernetes_validate import utils as validation
from operator_process import OperatorProcess, Services, install

_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def schemas_are_read_once() -> Iterator[None]:
    """The package reads a megabyte of them for every object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "schema_contents", functools.cache(validation.schema_contents))
        yield


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """Running, with the CRD and the operator's rights in it."""
    if missing := missing_programs():
        pytest.skip(f"no control plane here, {', '.join(missing)} are missing: {HOW_TO_GET_THEM}")
    with control_plane(tmp_path_factory.mktemp("control-plane")) as plane:
        install(plane)
        yield plane


@pytest.fixture(scope="session")
def operator(plane: ControlPlane) -> Iterator[OperatorProcess]:
    """Running."""
    operator = OperatorProcess(plane).start()
    yield operator
    operator.stop()


@pytest.fixture
def services(plane: ControlPlane) -> Services:
    """Services of a new namespace, which takes only pods of the restricted Pod Security profile."""
    name = f"test-{next(_numbers)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    plane.api.request("POST", "/api/v1/namespaces", namespace)
    return Services(plane.api, name)


@pytest.fixture
def idle_plane(plane: ControlPlane, operator: OperatorProcess) -> Iterator[ControlPlane]:
    """While no operator runs."""
    operator.stop()
    yield plane
    operator.start()
