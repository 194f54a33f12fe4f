"""The offline API where only torch, numpy, safetensors, tokenizers and transformers are installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from bare_packages import bare_python, link_packages

from quire.service.checkpoint import locate

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "transformers")

_RUN = """
import sys
from quire.llm import LLM, SamplingParams, StructuredOutputsParams
from quire.service.errors import ConfigError

with LLM(sys.argv[1], dtype="float32", max_model_len=64) as llm:
    params = SamplingParams(temperature=0, max_tokens=4, stop=["zz"], logprobs=1)
    print(llm.generate(["hello", [5, 6]], params)[0].outputs[0].token_ids)
    print(llm.chat([{"role": "user", "content": "hi"}], params)[0].outputs[0].finish_reason)
    for structured_outputs in (StructuredOutputsParams(regex="a"), int):
        try:
            llm.generate("a", SamplingParams(structured_outputs=structured_outputs))
        except ConfigError as error:
            print(error)
try:
    LLM(sys.argv[2])
except ConfigError as error:
    print(error)
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {"grpc", "google", "starlette", "msgspec", "prometheus_client", "opentelemetry", "httpx"}))
"""


@pytest.fixture
def site_packages(tmp_path: Path) -> Path:
    """A folder that holds those packages and what they require, and nothing else."""
    folder = link_packages(tmp_path / "site-packages", PACKAGES)
    assert (folder / "torch").is_dir() and not {"grpc", "google", "msgspec"} & {path.name for path in folder.iterdir()}
    return folder


def test_it_runs_with_torch_and_its_friends_alone(
    site_packages: Path, checkpoint: Path, tiny: object, tmp_path: Path
) -> None:
    """Without it a notebook's user would have to install servers, or find out by an ImportError what is missing."""
    gguf = locate().path
    python, environment = bare_python(site_packages, tmp_path)
    done = subprocess.run(
        [*python, "-c", _RUN, str(checkpoint), str(gguf)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokens, reason, needs_llguidance, needs_outlines, needs_gguf, loaded = done.stdout.splitlines()
    assert len(tokens.split(",")) == 4 and reason in ("length", "stop")
    assert "needs llguidance, which is not installed: run pip install 'quire[llm,grammar]'" in needs_llguidance
    assert "pip install 'quire[llm,grammar]'" in needs_outlines
    assert "the package that reads its tensors is missing: run `pip install gguf`" in needs_gguf
    assert loaded == "[]"
