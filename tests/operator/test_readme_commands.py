"""The README's way from nothing to an answer on Kubernetes, line by line.

kubectl is the real one, before a real control plane with an operator. Nothing here can run containers: `kind` and
`docker` are stand-ins that only look at what they are asked for, and pods are ready because a node on paper says so. So
the images, and the answer at the end, stay untested.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from control_plane import ControlPlane

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

# A cluster takes only images that were built, and those only from stages that there are.
KIND = """#!/bin/sh -e
case "$1 $2" in
  "create cluster") ;;
  "load docker-image") grep -qx "$3" "$BUILT" ;;
  *) exit 1 ;;
esac
"""
DOCKER = """#!/bin/sh -e
test "$1 $2 $4 $6 $8" = "build -f --target --build-arg -t"
grep -qE "^FROM .* AS $5$" "$3"
grep -qE "^ARG ${7%%=*}\\b" "$3"
test -d "${10}"
echo "$9" >> "$BUILT"
"""


@pytest.fixture
def environment(tmp_path: Path, plane: ControlPlane) -> Iterator[dict[str, str]]:
    """A shell's, with the stand-ins; what the commands make in the default namespace goes at the end."""
    for name, script in (("kind", KIND), ("docker", DOCKER)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join((str(tmp_path), os.environ["KUBEBUILDER_ASSETS"], os.environ["PATH"]))
    kubeconfig = str(plane.folder / "admin.kubeconfig")
    yield os.environ | {"PATH": path, "KUBECONFIG": kubeconfig, "BUILT": str(tmp_path / "built")}
    plane.kubectl("delete", "qis/llm", "--wait=false")


@pytest.mark.usefixtures("operator")
def test_from_nothing_to_a_service(environment: dict[str, str], plane: ControlPlane) -> None:
    """Who has a laptop and kind has only these lines to go by."""
    (block,) = re.findall(r"```sh\n(kind create cluster\n.*?)```", README, re.DOTALL)
    *lines, last = block.splitlines()
    for line in lines:
        done = subprocess.run(
            ["sh", "-ec", line], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    # Nobody answers behind it, but it is there.
    service, port = re.findall(r"^kubectl port-forward (svc/\S+) (\d+) &.* curl http://127.0.0.1:\2/", last)[0]
    ports = plane.kubectl("get", service, "-o", "jsonpath={.spec.ports[*].port}")
    assert port in ports.stdout.split(), ports.stderr
