"""The two processes of an engine: which of them has the device."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from engine_process import core_of, engine, prompt_of, request
from session_client import SessionClient
from tiny_models import tiny_llama

from quire.v1 import engine_pb2


async def test_only_the_core_process_has_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA does not survive a fork, and a server that starts it holds memory on the GPU: the core is a program of its
    own, with the GPUs that the engine was given, and torch is in no other process, whatever crosses between the two."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    folder = tmp_path / "tiny"
    tiny_llama(folder)
    async with engine(folder, tmp_path / "e") as pod, SessionClient(pod.address) as session:
        await session.submit(request(prompt_of(20), 4, logprobs=2)).result()
        await pod.stub.Inspect(engine_pb2.InspectRequest(max_cells=8, max_sequences=8))
        core = core_of(pod.process.pid)
        assert words(core, "cmdline")[:3] == [sys.executable, "-m", "quire.engine.core_process"]
        assert "CUDA_VISIBLE_DEVICES=0" in words(core, "environ")
        assert "libtorch" in mapped(core)
        assert not {"libtorch", "libcuda"} & mapped(pod.process.pid)


def words(process: int, file: str) -> list[str]:
    return Path(f"/proc/{process}/{file}").read_bytes().decode().split("\0")


def mapped(process: int) -> set[str]:
    """The names, up to the first of . _ -, of the files that a process has in its memory."""
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    paths = [Path(line.split(maxsplit=5)[5]) for line in lines if "/" in line]
    return {path.name.replace("_", ".").replace("-", ".").split(".")[0] for path in paths}
