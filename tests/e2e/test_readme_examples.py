"""The README's examples, pasted as they stand there: only the address is this test's."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
from pathlib import Path

import pytest
from served import Served

pytestmark = pytest.mark.e2e

README = (Path(__file__).parents[2] / "README.md").read_text()


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
