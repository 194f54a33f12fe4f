"""Which GPUs each engine of `quire serve` gets."""

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


def gpus_of(engines: int, device: str, each: int = 1) -> tuple[str, ...]:
    """The GPUs of each engine, `each` of them, as CUDA_VISIBLE_DEVICES has them; none if they may take what they find.

    Raises ConfigError if there are GPUs and too few: each engine takes most of its own's memory.
    """
    # One engine takes the first; without a driver there is none.
    if engines == 1 or device == "cpu" or not any(driver.exists() for driver in _DRIVERS):
        return ()
    count = _count_gpus()
    if 0 < count < engines * each:
        takes = f"{each}, as --tensor-parallel-size says" if each > 1 else "one"
        raise ConfigError(
            f"--engines is {engines}, and torch sees {count} GPU{'s' * (count > 1)}: each engine takes {takes}; lower "
            "it, or set --device to cpu",
            field="engines",
        )
    given = os.environ.get(VISIBLE)
    names = [name.strip() for name in given.split(",")] if given else [str(index) for index in range(count)]
    if not count:
        return ()
    return tuple(",".join(names[first * each : (first + 1) * each]) for first in range(engines))


def _count_gpus() -> int:
    """As torch counts them, in a process that ends: CUDA started here would hold memory on each."""
    done = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0
