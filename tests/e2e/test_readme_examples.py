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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from certificate_files import CertificateFiles, new_ca
from served import MODEL, Served, serve

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FRANCE = "What is the capital of France?\n"
# `quire` by its name alone.
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def examples(language: str, word: str, served: Served) -> list[str]:
    """The code blocks in a language that begin with a word."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    found = [block.replace("http://127.0.0.1:8000", served.url) for block in blocks if block.startswith(word)]
    assert found
    return found


def test_curl(served: Served) -> None:
    """The first thing that a newcomer pastes."""
    for example in examples("sh", "curl", served):
        output = subprocess.run(["sh", "-c", example], capture_output=True, text=True, check=True, timeout=120).stdout
        answer = json.loads(output)
        assert "error" not in answer, output
        if "response_format" in example:
            person = json.loads(answer["choices"][0]["message"]["content"])
            assert person["age"] == 34 and set(person) == {"name", "age"}


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


def test_quire_chat(served: Served) -> None:
    """What a newcomer types next."""
    for line in commands(".venv/bin/quire chat"):
        said = run(line.removeprefix(".venv/bin/"), "--url", served.url, "--temperature", "0", text=FRANCE)
        assert "Paris" in said


def test_quire_bench(served: Served) -> None:
    """The numbers' commands; here with short prompts and outputs."""
    for line in commands("quire bench"):
        shown = run(line, "--url", served.url, "--input-len", "8", "--output-len", "2")
        assert "answers in" in shown and "end to end" in shown


def test_quire_top(served: Served) -> None:
    """It finds the engines by itself, and one that is named."""
    assert "`quire top --engine HOST:PORT`" in README and "`--once`" in README
    engines = [word.removeprefix("--listen=") for word in served.command_of("quire.engine", "--name=engine-0")]
    (address,) = (word for word in engines if word.startswith("unix:"))
    for flags in ((), ("--engine", address)):
        shown = run("quire top --once", *flags)
        assert "engine-0" in shown and "ready" in shown


def test_keys_workers_and_tls(tmp_path: Path) -> None:
    """Who opens the server to others has only this page to go by: a key that is made is let in, and nobody else."""
    making, serving = commands("quire keys")[0], commands("quire serve --api-keys")[0]
    key = re.findall(r"quire-\S+|sk-\S+", run(making, folder=tmp_path))[0]
    (tls,) = {match[0] for match in re.finditer(r"--tls-cert \S+ --tls-key [^\s`]+", README)}
    files = CertificateFiles(tmp_path).write(new_ca())
    flags = [*shlex.split(serving, comments=True)[2:], *shlex.split(tls)]
    with serve(tmp_path / "log", *flags, folder=tmp_path, ca=files.ca) as served:
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


def test_each_benchmark_starts() -> None:
    """A number whose command is gone can't be checked by anybody."""
    scripts = sorted(set(re.findall(r"`(?:python tests/benchmarks/)?(\w+\.py)\b", README)))
    scripts += [name for name in re.findall(r"python tests/benchmarks/(\w+\.py)", README) if name not in scripts]
    assert len(scripts) > 4
    path = {"PYTHONPATH": os.pathsep.join(("services", "kernels", "operator", "tests/support"))}

    def told(script: str) -> str:
        return run(f"{shlex.quote(sys.executable)} tests/benchmarks/{script} --help", folder=ROOT, **path)

    with ThreadPoolExecutor(2) as pool:
        for script, help_text in zip(scripts, pool.map(told, scripts), strict=True):
            assert "usage:" in help_text, script
