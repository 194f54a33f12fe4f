"""A folder of some of the installed packages alone, for programs that must run without the others."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PORTIONS = ("services", "operator", "kernels")


def requirements(package: str, found: set[str]) -> set[str]:
    """The distributions that pip would install with `package`, itself included."""
    name = re.sub(r"[-_.]+", "-", package).lower()
    if name not in found:
        found.add(name)
        for requirement in importlib.metadata.requires(name) or ():
            needed = re.match(r"[\w.-]+", requirement)
            if needed and "extra ==" not in requirement and installed(needed[0]):
                requirements(needed[0], found)
    return found


def installed(name: str) -> bool:
    """Whether it is, here."""
    return bool(list(importlib.metadata.distributions(name=name)))


def link_packages(folder: Path, packages: Iterable[str]) -> Path:
    """`folder`, made to hold links to `packages` and what they require, and nothing else."""
    folder.mkdir()
    found: set[str] = set()
    for package in packages:
        requirements(package, found)
    for name in found:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder


def bare_python(site_packages: Path, home: Path) -> tuple[list[str], Mapping[str, str]]:
    """A Python that sees `site_packages` and Quire's source: its command, and its environment."""
    path = [site_packages, *(ROOT / portion for portion in PORTIONS)]
    environment = {"PYTHONPATH": ":".join(map(str, path)), "HOME": str(home), "PATH": "/usr/bin:/bin"}
    # -S: without the site-packages of this interpreter.
    return [sys.executable, "-S"], environment
