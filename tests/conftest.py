"""What holds for all tests.

Before any of them imports Triton: without a GPU its kernels run in its interpreter, which has to be asked for first.
Hypothesis takes no time: a machine that is held up says nothing of an example.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

_E2E = Path(__file__).parent / "e2e"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run side by side, those of a file stay together, and those that share one `quire serve`."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("e2e" if _E2E in item.path.parents else str(item.path)))
