"""One `quire serve` with two exact engines, or one where there is one GPU, for the whole of e2e, its traces sent to a
real receiver."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from openai import OpenAI
from otlp_receiver import OtlpReceiver
from served import Served, serve


@pytest.fixture(scope="session")
def receiver() -> Iterator[OtlpReceiver]:
    receiver = OtlpReceiver()
    yield receiver
    receiver.stop()


@pytest.fixture(scope="session")
def served(receiver: OtlpReceiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    log = tmp_path_factory.mktemp("serve") / "log"
    engines = "1" if torch.cuda.device_count() == 1 else "2"
    with serve(log, "--engines", engines, "--dtype", "float32", environment=environment) as served:
        yield served


@pytest.fixture(scope="session")
def client(served: Served) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)
