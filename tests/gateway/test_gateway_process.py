"""The process: its flags, its start, its end."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fake_router import FakeRouter, scripted
from gateway_testing import ANSWER, until_ready

from quire.gateway.__main__ import build_config, build_parser, main
from quire.gateway.config import GatewayConfig
from quire.gateway.tools.choice import ToolFormat
from quire.service.errors import ConfigError


@pytest.fixture
def process_logging() -> Iterator[None]:
    """`main` sends the process's log to its standard error; the next test's is another."""
    handlers, level = list(logging.root.handlers), logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def config_of(*argv: str) -> GatewayConfig:
    return build_config(build_parser().parse_args(argv))


def test_flags_have_the_configs_defaults() -> None:
    """Without it the two places that give a default could drift apart."""
    assert config_of("--routers", "a:1") == GatewayConfig(routers=("a:1",))


def test_flags() -> None:
    """Without it a flag could be parsed and lost."""
    argv = shlex.split(
        "--routers a:1,b:2 --model m --served-model-name x --served-model-name y --max-model-len 100 --host ::1 "
        "--port 1 --grpc-listen [::]:2 --router-timeout 3 --grace 4 --max-body-bytes 5000 "
        "--tool-call-format llama3_json"
    )
    assert config_of(*argv) == GatewayConfig(
        routers=("a:1", "b:2"),
        model="m",
        served_model_names=("x", "y"),
        max_model_len=100,
        tool_call_format=ToolFormat.LLAMA3_JSON,
        host="::1",
        port=1,
        grpc_listen="[::]:2",
        router_timeout=3,
        grace=4,
        max_body_bytes=5000,
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["--routers", ""],
        ["--routers", "a:1,"],
        ["--routers", "a:1,a:1"],
        ["--routers", "a:1", "--port", "70000"],
        ["--routers", "a:1", "--served-model-name", ""],
        ["--routers", "a:1", "--grpc-listen", ""],
        ["--routers", "a:1", "--router-timeout", "0"],
        ["--routers", "a:1", "--grace", "-1"],
        ["--routers", "a:1", "--max-model-len", "1"],
        ["--routers", "a:1", "--max-body-bytes", "10"],
    ],
)
def test_wrong_flags_are_named(argv: list[str]) -> None:
    """Without it a wrong flag would show only when a request fails."""
    flag = argv[-2]
    with pytest.raises(ConfigError, match=flag):
        config_of(*argv)


@pytest.mark.usefixtures("process_logging")
def test_wrong_flag_and_wrong_model_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    """Without it a start that can't succeed would be a traceback."""
    assert main(["--routers", "a:1", "--port", "-1"]) == 2
    assert main(["--routers", "a:1", "--port", "0", "--model", "/nowhere/at/all"]) == 2
    assert "/nowhere/at/all" in capsys.readouterr().err


@pytest.mark.usefixtures("process_logging")
def test_occupied_port_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without it a second gateway on one port would fail without a word that helps."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        argv = ["--routers", "unix:/x", "--port", str(taken.getsockname()[1]), "--grpc-listen", f"unix:{tmp_path}/g"]
        assert main(argv) == 2
    assert "choose an address of this machine and a free port" in capsys.readouterr().err
    assert main(["--routers", "unix:/x", "--port", "0", "--grpc-listen", "unix:/no/such/folder/g"]) == 2


@pytest.mark.e2e
async def test_process_serves_and_ends(tmp_path: Path, encode: object, text_model: object) -> None:
    """Without it the command line, uvloop, or the end by SIGTERM could be broken."""
    tokens = text_model.tokenizer.encode(ANSWER).ids  # type: ignore[attr-defined]
    fake = await FakeRouter(f"unix:{tmp_path}/router.sock", "tiny", scripted(tokens)).start()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "quire.gateway", "--routers", fake.address, "--served-model-name", "tiny"),
        *("--port", "0", "--grpc-listen", f"unix:{tmp_path}/gateway.sock", "--grace", "5"),
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    try:
        url = ""
        while not url:
            line = (await asyncio.wait_for(process.stderr.readline(), 20)).decode()
            found = re.search(r"url=(\S+)", line)
            url = found[1] if found else ""
        async with httpx.AsyncClient(base_url=url, timeout=20) as http:
            await until_ready(http)
            body = {"model": "tiny", "prompt": "x"}
            assert (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"] == ANSWER
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await fake.kill()
