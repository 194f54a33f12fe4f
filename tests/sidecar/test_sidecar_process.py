"""The sidecar as a process: flags, health, reflection, shutdown, what it imports."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sidecar_process import DEADLINE, SidecarProcess, eventually

from quire.sidecar.config import CacheLimits, GrammarLimits, MaskLimits, SidecarConfig


def test_health_and_reflection(sidecar: SidecarProcess) -> None:
    """Kubernetes would never find the sidecar ready, and grpcurl could not talk to it."""
    with sidecar.channel as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "quire.v1.GrammarService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=DEADLINE)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(reflection.ServerReflectionInfo(iter([request]), timeout=DEADLINE))
    assert "quire.v1.GrammarService" in {service.name for service in answer.list_services_response.service}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    """Pods would be killed after their grace period, and processes would be left behind."""
    with SidecarProcess(tmp_path) as sidecar:
        sidecar.wait_until_serving()
        children = sidecar.children()
        sidecar.process.send_signal(number)
        assert sidecar.process.wait(DEADLINE) == 0
        eventually(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


def test_it_imports_no_framework(sidecar: SidecarProcess) -> None:
    """The sidecar's image would need torch, and its start would take seconds longer."""
    program = (
        "import sys, quire.sidecar.__main__, quire.sidecar.grammar.trial\n"
        "print([name for name in ('torch', 'transformers', 'outlines', 'gguf') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quire.sidecar", *flags], capture_output=True, text=True, timeout=DEADLINE
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--listen", "unix:x", "--cache-mib", "0"], "--cache-mib is 0: give at least 1"),
        (["--listen", "unix:x", "--compile-seconds", "0"], "--compile-seconds is 0.0: give more than 0"),
        (["--listen", "unix:x", "--mask-seconds", "0"], "--mask-seconds is 0.0: give more than 0"),
        (["--listen", "unix:x", "--metrics-port", "70000"], "--metrics-port is 70000: give a port from 1 to 65535"),
        (["--listen", ""], "--listen is empty: give an address"),
        (["--listen", "unix:x", "--model", "nowhere"], "no model at nowhere: name a .gguf file"),
        (["--listen", "unix:/no/such/folder/x"], "can't listen on unix:/no/such/folder/x"),
    ],
)
def test_wrong_flags_end_in_one_line(flags: list[str], words: str) -> None:
    """The operator would get a traceback, or a sidecar that does something else than asked for."""
    result = run(*flags)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_help_shows_every_setting() -> None:
    """A setting of the configuration could not be reached from the command line."""
    text = run("--help").stdout
    assert "examples:" in text
    parts = {"limits", "masks", "cache"}
    flags = {*SidecarConfig.__dataclass_fields__, *GrammarLimits.__dataclass_fields__} - parts
    flags |= {"mask_seconds", "mask_step_seconds", "mask_token_seconds", "cache_entries", "cache_mib"}
    assert (len(MaskLimits.__dataclass_fields__), len(CacheLimits.__dataclass_fields__)) == (3, 2)
    for name in flags:
        assert re.search(rf"--{name.replace('_', '-')}\b", text), name


def test_an_address_in_use() -> None:
    """Another program's port would be taken for the sidecar's, and the sidecar would look alive."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = run("--listen", f"127.0.0.1:{port}")
    assert result.returncode == 2
    assert f"can't listen on 127.0.0.1:{port}" in result.stderr
