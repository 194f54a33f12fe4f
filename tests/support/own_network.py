"""Tests that need addresses and /etc/hosts of their own: they run in namespaces where nothing else can be reached.

No root is needed for that on Linux. A container engine may forbid it; then they are skipped and say so.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The network's own machine, which all pods reach.
HOST = "10.244.0.1"

_INSIDE = "QUIRE_TESTS_OWN_NETWORK"
# Whatever ends the first process ends all: a test that is cut off leaves nothing behind.
_ENTER = ("unshare", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_BRIDGE = (
    "ip link set lo up",
    "ip link add pods type bridge",
    f"ip addr add {HOST}/16 dev pods",
    "ip link set pods up",
)


def in_own_network(seconds: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs the test in a pytest of its own inside of new namespaces, for `seconds` at most."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        if os.environ.get(_INSIDE):
            return test
        where = f"{inspect.getfile(test)}::{test.__name__}"

        @functools.wraps(test)
        def run(tmp_path: Path) -> None:
            steps = " && ".join((*_BRIDGE, "echo works"))
            tried = subprocess.run([*_ENTER, "sh", "-c", steps], capture_output=True, text=True, check=False)
            if tried.returncode:
                pytest.skip(f"no network of one's own here ({tried.stderr.strip()}): allow user namespaces, install ip")
            steps = " && ".join((*_BRIDGE, 'exec "$@"'))
            inner = f"--basetemp={tmp_path}/in"
            pytest_ = (sys.executable, "-m", "pytest", where, "-q", "-rs", "-p", "no:cacheprovider", inner)
            ended = subprocess.run(
                [*_ENTER, "sh", "-c", steps, "sh", *pytest_],
                env={**os.environ, _INSIDE: "1"}, cwd=ROOT, capture_output=True, text=True, check=False,
                timeout=seconds,
            )  # fmt: skip
            # The traceback comes first, and the last words of what the test ran last.
            assert ended.returncode == 0, ended.stdout[:8000] + ended.stdout[8000:][-8000:] + ended.stderr[-2000:]
            if skipped := re.search(r"^SKIPPED.*", ended.stdout, re.MULTILINE):
                pytest.skip(skipped[0])

        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter("tmp_path", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        )
        return run

    return decorate
