"""How long the operator takes for many services, on a real control plane whose pods exist on paper.

    KUBEBUILDER_ASSETS=… python tests/benchmarks/operator_scale.py --services 200 --steady 60

It applies all services at once, waits until each is Ready and settled, then watches what is still written.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests/support")]

from control_plane import ControlPlane, control_plane, until  # noqa: E402
from operator_process import USER, OperatorProcess, Services, install  # noqa: E402

Document = dict[str, Any]


def main() -> None:
    """Prints one line for each number."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--services", type=int, default=200)
    parser.add_argument("--resync", type=float, default=30.0, help="the operator's, so that one shows in the memory")
    parser.add_argument("--steady", type=float, default=60.0, help="seconds to watch after all have settled")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, control_plane(Path(folder)) as plane:
        install(plane)
        plane.api.patch("/api/v1/nodes/node-0/status", {"status": dict.fromkeys(("capacity", "allocatable"), ROOM)})
        operator = OperatorProcess(plane, "operator-0", f"--resync={arguments.resync}").start()
        try:
            until("the operator leads", lambda: "leads" in operator.log.read_text())
            measure(plane, operator, arguments.services, arguments.steady)
        finally:
            operator.stop()


ROOM = {"cpu": "100000", "memory": "100000Gi", "pods": "100000"}


def measure(plane: ControlPlane, operator: OperatorProcess, count: int, steady: float) -> None:
    services = Services(plane.api, "default")
    cpu, began = operator.cpu_seconds, time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: services.apply(f"service-{index}", {}), range(count)))
    applied = time.monotonic() - began
    while settled(plane) < count:
        # Each look is a list of all: more of them would be what is measured.
        time.sleep(1)
    seconds = time.monotonic() - began
    # The last status may be on its way.
    time.sleep(2)
    before = writes(plane)
    made = sum(number for what, number in before.items() if what != "patch inferenceservices")
    print(f"{count} services: applied after {applied:.1f} s, all settled after {seconds:.1f} s")
    print(
        f"{sum(before.values())} writes for {made} objects, {sum(before.values()) / made:.3f} an object: {dict(before)}"
    )
    print(f"operator: {operator.cpu_seconds - cpu:.1f} s of CPU, {operator.memory_mb:.0f} MB")
    time.sleep(steady)
    after = writes(plane)
    print(f"{sum((after - before).values())} writes in {steady:g} s after that; {operator.memory_mb:.0f} MB at most")


def settled(plane: ControlPlane) -> int:
    found = plane.api.items("/apis/quire.dev/v1alpha1/inferenceservices")
    return sum(
        {("Ready", "True"), ("Progressing", "False")}
        <= {(each["type"], each["status"]) for each in service.get("status", {}).get("conditions", ())}
        for service in found
    )


def writes(plane: ControlPlane) -> collections.Counter[str]:
    """What the operator wrote, by kind, leases aside."""
    return collections.Counter(
        f"{each['verb']} {each['objectRef']['resource']}"
        for each in plane.requests(USER)
        if each["verb"] not in ("get", "list", "watch") and each["objectRef"]["resource"] != "leases"
    )


if __name__ == "__main__":
    main()
