"""What lies in manifests/: overlays that a cluster takes, images with what pods run, rules that fire."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from control_plane import ControlPlane, until
from operator_process import OperatorProcess, Services

from quire.operator.config import Images
from quire.operator.core import children
from quire.operator.kinds import CHILD_OF, POD
from quire.operator.spec import parse

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"

Document = dict[str, Any]


def test_the_operator_itself_is_admitted(plane: ControlPlane) -> None:
    """`kubectl apply -k manifests/` as a user types it, with the operator's pods in a restricted namespace."""
    applied = plane.kubectl("apply", "--server-side", "-k", str(MANIFESTS))
    assert applied.returncode == 0, applied.stderr
    path = CHILD_OF["Deployment"].path("quire-system", "quire-operator")
    until("two operators", lambda: (plane.api.get(path) or {}).get("status", {}).get("availableReplicas") == 2)


@pytest.mark.parametrize("overlay", ["laptop", "one-gpu", "many-gpus"])
def test_overlays_are_taken_and_mean_what_they_say(plane: ControlPlane, overlay: str) -> None:
    """Built by kubectl's own kustomize, judged by the API server, and read by `render`."""
    folder = str(MANIFESTS / "overlays" / overlay)
    judged = plane.kubectl("apply", "--server-side", "--dry-run=server", "-k", folder)
    assert judged.returncode == 0, judged.stderr
    built = yaml.safe_load(plane.kubectl("kustomize", folder).stdout)
    made = children(parse(built), Images())
    engine = next(each for each in made if each["kind"] == "Deployment" and "engine" in each["metadata"]["name"])
    limits = engine["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert ("nvidia.com/gpu" in limits) is (overlay != "laptop")


@pytest.mark.parametrize("sample", sorted(MANIFESTS.glob("samples/*.yaml")), ids=lambda path: path.stem)
def test_samples_become_pods_that_the_restricted_profile_takes(
    sample: Path, services: Services, operator: OperatorProcess
) -> None:
    """Every kind of volume and every option; what the profile forbids shows only when pods are made."""
    document = yaml.safe_load(sample.read_text())
    services.apply("demo", document["spec"])
    for component in ("gateway", "router", "engine"):
        path = CHILD_OF["Deployment"].path(services.namespace, f"demo-{component}")
        until(f"the {component}'s Deployment", lambda path=path: services.api.get(path))
        selector = f"quire.dev/service=demo,app.kubernetes.io/component={component}"
        until(
            f"a pod of the {component}; it is {services.condition('demo', 'Degraded')}",
            lambda selector=selector: services.api.items(POD.path(services.namespace), selector),
        )
    assert operator.is_running


def test_images_have_what_pods_run() -> None:
    """A target for each image that the operator names, of an extra that the wheel has, for the user in the pods."""
    text = (MANIFESTS / "images/Containerfile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = dict(re.findall(r"^FROM base AS (\w+)\n(.*?)(?=^FROM|\Z)", text, flags=re.MULTILINE | re.DOTALL))
    assert set(targets) == {"gateway", "router", "engine", "sidecar", "operator"}
    for name, target in targets.items():
        (extra,) = re.findall(r"\.whl\)\[([\w-]+)\]", target)
        assert extra in extras
        assert extra.startswith(name)
        assert "USER 10001:10001" in target
        assert f'"quire.{name}"' in target
    for source in re.findall(r"^COPY (?!--)(.+) \S+$", text, flags=re.MULTILINE):
        assert all((ROOT / each).exists() for each in source.split())


def test_rules_fire_when_they_should() -> None:
    """promtool runs the rules against series that should and should not raise an alert."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on PATH: it comes with Prometheus (Debian's package prometheus has it)")
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "rules.test.yaml"]):
        ran = subprocess.run(
            [promtool, *command], cwd=MANIFESTS / "monitoring", text=True, capture_output=True, timeout=60, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_rules_ask_for_metrics_that_there_are() -> None:
    """A renamed metric silences its alert for ever."""
    asked = set(re.findall(r"\bquire_(\w+?)\b(?=[{\[ )])", (MANIFESTS / "monitoring/rules.yaml").read_text()))
    sources = "".join(path.read_text() for path in ROOT.glob("*/quire/**/*.py"))
    assert len(asked) > 10
    for metric in asked - {"dev_service"}:
        service, _, name = metric.partition("_")
        plain = re.sub(r"_(total|bucket)$", "", name)
        known = (f'"quire_{service}_{name}"', f'"quire_{service}_{plain}"', f'"{plain}"')
        assert any(each in sources for each in known), metric
