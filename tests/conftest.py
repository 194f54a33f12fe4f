"""Before any test imports Triton: without a GPU its kernels run in its interpreter, which has to be asked for first."""

from __future__ import annotations

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
