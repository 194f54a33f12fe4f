"""What holds for all tests.

Before any of them imports Triton: without a GPU its kernels run in its interpreter, which has to be asked for first.
Hypothesis takes no time: a machine that is held up says nothing of an example.
"""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, settings

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
