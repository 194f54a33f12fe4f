"""Which GPU each engine of `quire serve` gets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from quire.service.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"

# Of NVIDIA's driver on Linux, and on WSL.
_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
_COUNT = "import torch; print(torch.cuda.device_count())"


def gpus_of(engines: int, device: str) -> tuple[str, ...]:
    """A GPU for each engine, as CUDA_VISIBLE_DEVICES names it; none if they may take what they find.

    Raises ConfigError if there are GPUs and fewer than engines: each takes most of one's memory.
    """
    # One engine takes the first; without a driver there is none.
    if engines == 1 or device == "cpu" or not any(driver.exists() for driver in _DRIVERS):
        return ()
    count = _count_gpus()
    if 0 < count < engines:
        raise ConfigError(
            f"--engines is {engines}, and torch sees {count} GPU{'s' * (count > 1)}: each engine takes one; lower it, "
            "or set --device to cpu",
            field="engines",
        )
    given = os.environ.get(VISIBLE)
    names = given.split(",") if given else [str(index) for index in range(count)]
    return tuple(name.strip() for name in names[: min(count, engines)])


def _count_gpus() -> int:
    """As torch counts them, in a process that ends: CUDA started here would hold memory on each."""
    done = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0
