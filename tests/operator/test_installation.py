"""What lies in manifests/: overlays that a cluster takes, images with what pods run, rules that fire."""

from __future__ import annotations

import json
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
    spans_nodes = document["spec"].get("engine", {}).get("nodes", 1) > 1
    # The pods of a LeaderWorkerSet are test_groups' matter.
    for component in ("gateway", "router", *(() if spans_nodes else ("engine",))):
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


def assert_metrics_exist(text: str) -> None:
    asked = set(re.findall(r"\bquire_(\w+?)\b(?=[{\[ )])", text))
    sources = "".join(path.read_text() for path in ROOT.glob("*/quire/**/*.py"))
    assert len(asked) > 10
    for metric in asked - {"dev_service"}:
        service, _, name = metric.partition("_")
        plain = re.sub(r"_(total|bucket)$", "", name)
        known = (f'"quire_{service}_{name}"', f'"quire_{service}_{plain}"', f'"{plain}"')
        assert any(each in sources for each in known), metric


def test_rules_ask_for_metrics_that_there_are() -> None:
    """A renamed metric silences its alert for ever."""
    assert_metrics_exist((MANIFESTS / "monitoring/rules.yaml").read_text())


def test_the_dashboard_shows_metrics_that_there_are(tmp_path: Path) -> None:
    """A panel that asks for nothing is empty, which looks like calm; recorded series must be those of the rules."""
    dashboard = json.loads((MANIFESTS / "monitoring/dashboard.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    assert_metrics_exist("\n".join(asked))
    recorded = set(re.findall(r"\bquire:[\w:]+", "\n".join(asked)))
    assert recorded <= set(re.findall(r"record: (\S+)", (MANIFESTS / "monitoring/rules.yaml").read_text()))
    assert all(panel["description"] for panel in panels)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    places = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places)
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not on PATH: it comes with Prometheus (Debian's package prometheus has it)")
    rules = [
        {"record": f"panel{index}", "expr": each.replace("$__rate_interval", "5m")} for index, each in enumerate(asked)
    ]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    ran = subprocess.run(
        [promtool, "check", "rules", str(file)], text=True, capture_output=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
