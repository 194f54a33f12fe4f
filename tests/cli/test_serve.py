"""`quire serve`: what it says before it starts anything, what it shows while it starts, and one whole life of it."""

from __future__ import annotations

import io
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from processes import until_ended
from served import MODEL, descendants, free_port
from terminal import Terminal

from quire.cli.gpus import _count_gpus, gpus_of
from quire.cli.main import main
from quire.cli.progress import LoadProgress
from quire.cli.runtime_dir import find_serving, runtime_dir
from quire.cli.services import ServeConfig, stages
from quire.service.errors import ConfigError

Output = pytest.CaptureFixture[str]

TLS = ("tls_cert", "tls_key", "tls_client_ca")

SERVE = [sys.executable, "-m", "quire.cli.main", "serve"]


@pytest.mark.parametrize("flag", ["--port", "--grpc-port"])
def test_a_port_in_use_is_said_at_once(flag: str, capsys: Output) -> None:
    """A second `quire serve` must not load a model for ten seconds to find its port taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        other = [] if flag == "--port" else ["--port", "0"]
        assert main(["serve", *other, flag, str(port)]) == 2
    error = capsys.readouterr().err
    assert f"can't listen on 127.0.0.1 port {port} (Address already in use): choose another {flag}" in error
    assert f"or {flag} 0 for one that is free" in error


def commands(tmp_path: Path, config: ServeConfig) -> dict[str, list[str]]:
    planned = stages(config, tmp_path, lambda name, activity, fraction: None)
    return {spec.name: list(spec.command) for stage in planned for spec in stage}


def test_flags_reach_the_services(tmp_path: Path) -> None:
    """A flag that is dropped on the way is a setting that silently does not hold."""
    config = ServeConfig("m.gguf", 2, "float32", "::", 81, 82, 512, 8, 99, 1 << 30, 3, "debug", "json", "/keys", 4)
    files = [str(tmp_path / name) for name in ("crt", "key", "ca")]
    for file in files:
        Path(file).write_text("")
    config = replace(config, tool_call_format="hermes", **dict(zip(TLS, files, strict=True)))
    config = replace(config, speculation="auto", num_speculative_tokens=4)
    config = replace(config, device="cuda", gpu_memory_utilization=0.5, kv_cache_dtype="fp8")
    config = replace(config, tensor_parallel_size=2)
    planned = commands(tmp_path, config)
    assert list(planned) == ["gateway", "router", "engine-0", "engine-1", "sidecar-0", "sidecar-1"]
    assert len(planned) == config.num_processes
    for command in planned.values():
        assert {"--log-level=debug", "--log-format=json"} <= set(command)
    assert {
        "--host=::",
        "--port=81",
        f"--grpc-listen=[::]:82,unix:{tmp_path}/gateway.sock",
        "--max-model-len=512",
        "--model=m.gguf",
    } <= set(planned["gateway"])
    assert {"--api-keys=/keys", "--workers=4", "--tool-call-format=hermes"} <= set(planned["gateway"])
    assert {f"--{name.replace('_', '-')}={file}" for name, file in zip(TLS, files, strict=True)} <= set(
        planned["gateway"]
    )
    assert config.url == "https://[::1]:81"
    assert f"--engines=unix:{tmp_path}/engine-0.sock,unix:{tmp_path}/engine-1.sock" in planned["router"]
    for index in range(2):
        assert {
            f"--name=engine-{index}", "--dtype=float32", "--max-model-len=512", "--max-num-seqs=8", "--num-pages=99",
            f"--kv-cache-bytes={1 << 30}", "--threads=3", "--speculation=auto", "--num-speculative-tokens=4",
            f"--sidecar=unix:{tmp_path}/sidecar-{index}.sock", "--device=cuda", "--gpu-memory-utilization=0.5",
            "--kv-cache-dtype=fp8", "--tensor-parallel-size=2",
        } <= set(planned[f"engine-{index}"])  # fmt: skip
        assert "--model=m.gguf" in planned[f"sidecar-{index}"]


def test_services_have_their_own_defaults(tmp_path: Path) -> None:
    """What was not asked for is the service's to decide: two places for one default come to differ."""
    given = {flag.partition("=")[0] for flag in commands(tmp_path, ServeConfig())["engine-0"]}
    assert not given & {
        "--max-model-len", "--max-num-seqs", "--num-pages", "--kv-cache-bytes", "--model", "--speculation",
        "--num-speculative-tokens", "--gpu-memory-utilization", "--kv-cache-dtype", "--tensor-parallel-size",
    }  # fmt: skip


def test_each_engine_has_gpus_of_its_own(tmp_path: Path) -> None:
    """Two on one GPU would both ask for most of its memory; the other services need none."""
    config = ServeConfig(engines=2, gpus=("0,1", "GPU-7f"))
    planned = stages(config, tmp_path, lambda name, activity, fraction: None)
    found = {spec.name: spec.environment.get("CUDA_VISIBLE_DEVICES") for stage in planned for spec in stage}
    assert (found.pop("engine-0"), found.pop("engine-1")) == ("0,1", "GPU-7f")
    assert set(found.values()) == {None}


@pytest.mark.parametrize(
    ("engines", "each", "device", "visible", "count", "given"),
    [
        (1, 1, "auto", None, 8, ()),
        (2, 1, "cpu", None, 8, ()),
        (2, 1, "auto", None, 0, ()),
        (2, 1, "auto", None, 2, ("0", "1")),
        (2, 1, "cuda", "3, GPU-7f,1", 3, ("3", "GPU-7f")),
        (2, 1, "auto", "", 0, ()),
        (2, 2, "auto", None, 5, ("0,1", "2,3")),
        (2, 2, "auto", "4,5,6,7", 4, ("4,5", "6,7")),
        (1, 4, "auto", None, 4, ()),
    ],
)
def test_gpus_of_engines(
    engines: int,
    each: int,
    device: str,
    visible: str | None,
    count: int,
    given: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many as the engines need, of those that may be seen; without GPUs engines run on the CPU, as before."""
    monkeypatch.setattr("quire.cli.gpus._DRIVERS", (Path("/"),))
    monkeypatch.setattr("quire.cli.gpus._count_gpus", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_of(engines, device, each) == given


def test_more_engines_than_gpus(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    """It is said at once, not by the second engine when it has loaded."""
    monkeypatch.setattr("quire.cli.gpus._DRIVERS", (Path("/"),))
    monkeypatch.setattr("quire.cli.gpus._count_gpus", lambda: 2)
    assert main(["serve", "--engines", "3", "--port", "0"]) == 2
    assert "--engines is 3, and torch sees 2 GPUs: each engine takes one; lower it, or" in capsys.readouterr().err
    assert main(["serve", "--engines", "2", "--tensor-parallel-size", "2", "--port", "0"]) == 2
    assert "each engine takes 2, as --tensor-parallel-size says; lower it" in capsys.readouterr().err


def test_gpus_are_counted_as_torch_does() -> None:
    """A build of torch for CPUs runs engines on the CPU, whatever is in the machine."""
    assert _count_gpus() == torch.cuda.device_count()


def test_sockets_fit_into_an_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A long TMPDIR, as on macOS and in CI, must not keep the services from meeting; the folder goes with the end."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with runtime_dir() as folder:
        assert len(f"{folder}/sidecar-63.sock") < 104 and folder.stat().st_mode & 0o077 == 0
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/sidecar-63.sock")
    assert not folder.exists() and not list(deep.iterdir())


def test_no_folder_for_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only machine gets a reason and a way out, not a traceback."""

    def refuse(**_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(ConfigError, match=r"/tmp: Permission denied.*set TMPDIR to a short path"), runtime_dir():
        pass


def test_the_bar_goes_forward_and_stays_below_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log line in the middle of the bar would tear both."""
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    progress = LoadProgress(4, stream, bar=True)
    progress.loading("engine-0", "loading weights with a very long name", 0.5)
    progress.write("a line")
    progress.ready("gateway")
    progress.clear()
    progress.write("another")
    drawn = stream.getvalue().split("\x1b[2K\r")
    assert drawn[1].startswith("━━────") and " 12%  engine-0: lo" in drawn[1] and len(drawn[1]) == 39
    assert drawn[2] == f"a line\n{drawn[1]}"
    assert " 38%" in drawn[3]
    assert drawn[4] == "another\n"


def test_without_a_terminal_each_activity_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """A log file wants to know what happens, not a hundred percentages of it, and no control characters."""
    stream = io.StringIO()
    progress = LoadProgress(4, stream, bar=False)
    with caplog.at_level("INFO"):
        for percent in range(100):
            progress.loading("engine-0", "loading weights", percent / 100)
        progress.loading("engine-0", "warming up", 1.0)
    progress.ready("engine-0")
    progress.write("a line")
    progress.clear()
    assert [record.getMessage() for record in caplog.records] == ["engine-0: loading weights", "engine-0: warming up"]
    assert stream.getvalue() == "a line\n"


class ClosedTerminal(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_closed_terminal_is_no_error() -> None:
    """Who closes the window wants everything stopped; a failing write must not be in the way."""
    progress = LoadProgress(1, ClosedTerminal(), bar=True)
    progress.loading("engine-0", "loading", 0.5)
    progress.write("a line")
    progress.clear()


def is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@pytest.mark.e2e
def test_a_whole_life_in_a_terminal() -> None:
    """What a newcomer sees: progress, a line to paste that works, and an end that leaves nothing behind."""
    port, grpc_port = free_port(), free_port()
    with Terminal([*SERVE, "--port", str(port), "--grpc-port", str(grpc_port)]) as terminal:
        terminal.expect("0%  ")
        terminal.expect("engine-0: loading weights")
        terminal.expect("100%")
        terminal.expect("Ready in ")
        terminal.expect(f"{MODEL} on http://127.0.0.1:{port}/v1 and gRPC on port {grpc_port}. Ctrl-C stops it.")
        terminal.expect("}'\r\n")
        pasted = re.search(r"^  (curl .*)$", "\n".join(terminal.screen), flags=re.MULTILINE)
        assert pasted and f"chat --url http://127.0.0.1:{port}" in terminal.output
        assert answer_to(pasted[1])
        assert f"http://127.0.0.1:{port}" in [serving.url for serving in find_serving()]
        pids = descendants(terminal.process.pid)
        folders = sockets_of(pids)
        terminal.type("\x03")
        terminal.expect("stopping: Ctrl-C again stops at once")
        assert terminal.wait() == 130
        # One line each: the bar was taken away before, and after it nothing was drawn.
        assert not [line for line in terminal.screen if "━" in line or "%" in line]
        assert "ERROR" not in terminal.output and "Traceback" not in terminal.output
    until_ended(pids)
    assert folders and not any(map(Path.exists, folders))
    assert is_free(port) and is_free(grpc_port)
    assert f"http://127.0.0.1:{port}" not in [serving.url for serving in find_serving()]


def answer_to(line: str) -> str:
    """What the pasted line answers; the request is sent as curl would if there is no curl."""
    words = shlex.split(line)
    assert words[:1] == ["curl"] and words[2::2] == ["-H", "-d"]
    name, _, value = words[3].partition(": ")
    response = httpx.post(words[1], content=words[5], headers={name: value}, timeout=180)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def sockets_of(pids: dict[int, list[str]]) -> set[Path]:
    """The folders of the sockets that the processes listen on."""
    found = re.findall(r"unix:(/[^,\0]+)/[^/]+\.sock", "\0".join(word for words in pids.values() for word in words))
    return {Path(folder) for folder in found}


@pytest.mark.e2e
def test_ctrl_c_while_it_loads() -> None:
    """A wrong flag noticed too late: the load is broken off at once, and nothing is left of it."""
    port = free_port()
    with Terminal([*SERVE, "--port", str(port)]) as terminal:
        terminal.expect("engine-0: starting")
        pids = descendants(terminal.process.pid)
        terminal.type("\x03")
        assert terminal.wait() == 130
        assert "Ready in" not in terminal.output and "Traceback" not in terminal.output
    assert pids
    until_ended(pids)
    assert is_free(port)


@pytest.mark.e2e
def test_an_engine_that_can_not_start_ends_the_whole(tmp_path: Path) -> None:
    """The reason stands last in the log, the status is a failure's, and no process goes on without its engine."""
    port = free_port()
    done = subprocess.run(
        [*SERVE, "--port", str(port), "--max-model-len", "1000000"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    *_, reason, last = done.stderr.splitlines()
    assert "1000000" in done.stderr and "Traceback" not in done.stderr and "\x1b" not in done.stderr
    assert re.search(r"ERROR +serve +\S+ ended with status 2 before it was ready: the log above says why", last), reason
    assert is_free(port)


@pytest.mark.e2e
def test_a_closed_window_stops_everything() -> None:
    """Closing the terminal must not leave a model in memory."""
    terminal = Terminal([*SERVE, "--port", str(free_port())])
    with terminal:
        terminal.expect("engine-0: ")
        pids = descendants(terminal.process.pid)
        terminal.process.send_signal(signal.SIGHUP)
        assert terminal.wait() == 0
    assert pids
    until_ended(pids)
