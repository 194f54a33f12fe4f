"""The tree: four portions of one namespace, beside a standard module called `operator`."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PORTIONS = ("services", "operator", "kernels")
SERVICES = ("gateway", "router", "engine", "sidecar")


def test_portions_are_namespace_packages() -> None:
    """An __init__.py in operator/ breaks Python itself there; one in a quire/ folder hides the other portions."""
    for portion in PORTIONS:
        assert not (ROOT / portion / "__init__.py").exists()
        assert not (ROOT / portion / "quire" / "__init__.py").exists()


def test_the_standard_library_works_at_the_root() -> None:
    """`python -m pip` run from a checkout must find the standard module operator, not the folder."""
    code = "import operator, collections, quire.service; print(operator.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(ROOT) not in done.stdout
    subprocess.run([sys.executable, "-m", "pip", "--version"], cwd=ROOT, check=True, capture_output=True)


def test_top_level_holds_what_it_should() -> None:
    """Everything has its place; a stray file at the top is where disorder starts."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.split("/")[0] for name in listed if not name.startswith(".")}
    allowed = {
        "pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt",
        "services", "protos", "kernels", "manifests", "operator", "tests",
    }  # fmt: skip
    assert top <= allowed


def test_the_engine_core_needs_no_server_packages() -> None:
    """The core must run where only torch and its friends are: no protobuf, gRPC, HTTP or telemetry."""
    code = (
        "import sys\n"
        "import quire.engine.core, quire.engine.cpu_runner, quire.engine.loading\n"
        "bad = {'grpc', 'google.protobuf', 'opentelemetry', 'prometheus_client', 'starlette', 'transformers'}\n"
        "print(sorted(bad & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_services_do_not_load_torch() -> None:
    """Only the engine's core may pay for torch: the others would start seconds later and hold its memory."""
    for service in ("gateway", "router", "sidecar", "engine"):
        code = f"import sys, quire.{service}.__main__; print('torch' in sys.modules, 'transformers' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["False", "False"], service


@pytest.mark.slow
def test_a_wheel_runs_without_the_checkout(tmp_path: Path) -> None:
    """What users install is the wheel: it must carry all four portions and the contracts' generated Python."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("quire-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("quire/v1/session_pb2.py", "quire/kernels/token_mask.py", "quire/engine/core.py", "quire/cli/main.py"):
        assert name in names
    assert "quire/engine/speculation/heads/SmolLM2-135M-Instruct/model.safetensors" in names
    assert not [name for name in names if name == "quire/__init__.py" or name.startswith(("tests/", "protos/"))]
    # Its own environment sees this one's packages but not the editable install of the checkout.
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    site = next(environment.glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    packages = Path(pytest.__file__).parents[1]
    for service in SERVICES:
        command = [str(environment / "bin" / "python"), "-m", f"quire.{service}", "--help"]
        done = subprocess.run(
            command, cwd=tmp_path, env={"PYTHONPATH": f"{site}:{packages}"}, capture_output=True, text=True, check=True
        )
        assert "examples:" in done.stdout
        where = subprocess.run(
            [command[0], "-c", f"import quire.{service}; print(quire.{service}.__file__)"],
            cwd=tmp_path, env={"PYTHONPATH": f"{site}:{packages}"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert where.stdout.startswith(str(site))
