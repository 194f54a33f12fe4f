"""One sidecar process for the tests that do not disturb it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sidecar_process import SidecarProcess, StepClient

from quire.service.checkpoint import TextModel, load_text, locate


@pytest.fixture(scope="session")
def smollm() -> TextModel:
    return load_text(locate())


@pytest.fixture(scope="session")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    with SidecarProcess(tmp_path_factory.mktemp("sidecar")) as process:
        process.wait_until_serving()
        yield process


@pytest.fixture
def stream(sidecar: SidecarProcess, smollm: TextModel, tmp_path: Path) -> Iterator[StepClient]:
    client = StepClient(sidecar.address, tmp_path, smollm.vocab_size)
    yield client
    client.close()


@pytest.fixture(scope="session")
def shared_stream(
    sidecar: SidecarProcess, smollm: TextModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StepClient]:
    client = StepClient(sidecar.address, tmp_path_factory.mktemp("masks"), smollm.vocab_size)
    yield client
    client.close()
