"""The README tells a newcomer where to look: what it says must be there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_every_link_leads_somewhere() -> None:
    """A moved file must take its mention along."""
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 15
    for link in links:
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_the_request_path_lists_real_files_in_the_order_of_the_services() -> None:
    """The list is the map of the code: gateway, router, engine, sidecar, and back."""
    section = README.split("## A request's path")[1].split("\n## ")[0]
    steps = re.findall(r"^(\d+)\. \[([^]]+)\]\(([^)]+)\)", section, flags=re.MULTILINE)
    assert [int(number) for number, _, _ in steps] == list(range(1, len(steps) + 1))
    assert all(name == target for _, name, target in steps)
    services = [target.split("/")[2] for _, _, target in steps]
    order = [service for index, service in enumerate(services) if index == 0 or services[index - 1] != service]
    assert order == ["gateway", "router", "engine", "sidecar", "engine", "gateway"]


def test_every_flag_that_it_names_exists() -> None:
    """An example that fails is worse than none."""
    files = [*(ROOT / "services").rglob("*.py"), *(ROOT / "tests/benchmarks").glob("*.py")]
    sources = "".join(path.read_text() for path in files)
    ours = "\n".join(line for line in README.splitlines() if not re.match(r"(for|kind|kubectl|curl) ", line))
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)):
        # argparse makes --no-x of a switch --x.
        assert f'"{flag}"' in sources or f'"{flag.replace("--no-", "--")}"' in sources, flag
