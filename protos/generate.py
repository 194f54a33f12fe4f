"""Compiles the contracts in protos/quire into Python: as a command, and as hatchling's build hook.

`python protos/generate.py` writes protos/generated/quire/v1; so does every build and editable install. The output is
not committed. Needs grpcio-tools and mypy-protobuf (see `[build-system] requires`).
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "generated"


def generate() -> Path:
    """Compiles every .proto into protos/generated, replacing what was there; raises RuntimeError if protoc fails."""
    import grpc_tools
    from grpc_tools import protoc

    sources = sorted(str(path.relative_to(HERE)) for path in HERE.glob("quire/**/*.proto"))
    well_known = str(Path(grpc_tools.__file__).parent / "_proto")
    # protoc finds its mypy plugins on PATH; pip's isolated build puts them beside the interpreter it runs.
    scripts = os.pathsep.join((sysconfig.get_path("scripts"), str(Path(sys.executable).parent)))
    os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")
    with tempfile.TemporaryDirectory(dir=HERE) as scratch:
        outputs = [f"--{kind}_out={scratch}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
        if protoc.main(["protoc", f"-I{HERE}", f"-I{well_known}", *outputs, *sources]) != 0:
            raise RuntimeError("protoc failed: see its message above")
        package = Path(scratch) / "quire" / "v1"
        (package / "__init__.py").touch()
        (package / "py.typed").touch()
        shutil.rmtree(OUTPUT, ignore_errors=True)
        shutil.copytree(scratch, OUTPUT)
    return OUTPUT


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # as a plain command, without hatchling
    pass
else:

    class GenerateProtobuf(BuildHookInterface[Any]):
        """Runs `generate` before a wheel or an editable install is put together."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            generate()


if __name__ == "__main__":
    print(generate())
