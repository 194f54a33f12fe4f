"""`quire bench throughput | latency | prefix | structured | startup`: what is measured, and what is said of it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from bare_packages import bare_python, link_packages
from hypothesis import given
from hypothesis import strategies as st
from terminal import Terminal
from tiny_checkpoint import tiny_checkpoint

from quire.cli.bench import startup
from quire.cli.bench.meter import Meter
from quire.cli.bench.report import Spread, number
from quire.cli.bench.workloads import Job, Lengths, Work, Workloads, longest
from quire.cli.main import main
from quire.engine.config import CoreConfig
from quire.engine.core import EngineCore
from quire.engine.loading import load_core
from quire.service.errors import InternalError
from quire.service.request import Finished, FinishReason, Update

Output = pytest.CaptureFixture[str]

SPREAD = {
    "type": "object",
    "additionalProperties": False,
    "required": ["median", "min", "max", "rounds"],
    "properties": {
        **{name: {"type": "number"} for name in ("median", "min", "max")},
        "rounds": {"type": "array", "minItems": 1, "items": {"type": "number"}},
    },
}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": [
        *("benchmark", "command", "date", "model", "device", "versions", "settings", "start_seconds", "stopped", "rows")
    ],
    "properties": {
        "benchmark": {"enum": ["throughput", "latency", "prefix", "structured", "startup"]},
        "command": {"type": "string", "pattern": "^quire bench "},
        "date": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$"},
        "model": {"type": "string"},
        "device": {
            "type": "object",
            "required": ["kind", "name", "dtype", "threads", "cores"],
            "properties": {"kind": {"enum": ["cpu", "cuda"]}, "name": {"type": "string", "minLength": 1}},
        },
        "versions": {"type": "object", "required": ["python", "torch"]},
        "settings": {"type": "object", "required": ["model", "rounds", "seed", "dtype"]},
        "start_seconds": {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}},
        "stopped": {"type": "boolean"},
        "rows": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "additionalProperties": {"anyOf": [{"type": ["string", "number", "null"]}, SPREAD]},
            },
        },
    },
}


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """Other tests' models have the threads that they had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def core(tiny: Path) -> Iterator[EngineCore]:
    """Pages for a few short requests."""
    loaded = load_core(CoreConfig(str(tiny), max_model_len=256, num_pages=40, max_num_seqs=4), lambda *_: None)
    yield loaded.core
    loaded.core.close()


def measured(tmp_path: Path, action: str, model: Path, *flags: str) -> dict[str, Any]:
    """The JSON that a benchmark writes, which is as its readers expect it."""
    out = tmp_path / "run.json"
    # Threads that wait for one another beside other tests take seconds for what one does at once.
    assert main(["bench", action, str(model), "--rounds", "2", "--out", str(out), "--threads", "1", *flags]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    jsonschema.validate(found, SCHEMA)
    assert found["benchmark"] == action and found["model"] == model.name and not found["stopped"]
    assert found["command"].startswith(f"quire bench {action} {model} --rounds 2 --out")
    return found


def test_throughput(tiny: Path, tmp_path: Path, capsys: Output) -> None:
    """A row for each number of requests, with all the tokens that were asked for: a request cut short is fast."""
    flags = ("--requests", "5", "9", "--input-len", "4:30", "--output-len", "2:12", "--seed", "3")
    found = measured(tmp_path, "throughput", tiny, *flags)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("throughput: tiny, ") and "output tok/s" in shown[1]
    for row, line, count in zip(found["rows"], shown[2:], (5, 9), strict=False):
        work = Workloads(259).mixed(count, Lengths(4, 30), Lengths(2, 12), 3)
        assert row["input_tokens"] == sum(len(job.prompt) for job in work)
        assert row["output_tokens"] == sum(job.output_len for job in work)
        rates = row["output_tokens_per_second"]
        assert rates["rounds"] == pytest.approx([row["output_tokens"] / s for s in row["seconds"]["rounds"]])
        assert rates["min"] <= rates["median"] <= rates["max"] and len(rates["rounds"]) == 2
        assert line.split()[:3] == [f"mixed{count}", str(row["input_tokens"]), str(row["output_tokens"])]
    assert found["start_seconds"].keys() >= {"model", "pages", "graphs"}
    assert found["settings"]["requests"] == [5, 9] and found["settings"]["seed"] == 3


def test_latency(tiny: Path, tmp_path: Path, capsys: Output) -> None:
    """First token, token and prefill are told apart; with one token there is no time between tokens."""
    one, four = measured(tmp_path, "latency", tiny, "--batch", "1", "4", "--input-len", "40", "--output-len", "9")[
        "rows"
    ]
    for row, batch in ((one, 1), (four, 4)):
        assert 0 < row["first_token_ms_p50"] <= row["first_token_ms_p99"]
        assert 0 < row["inter_token_ms_p50"] <= row["inter_token_ms_p99"]
        seconds = [batch * 9 / rate for rate in row["output_tokens_per_second"]["rounds"]]
        assert row["ms_per_token"]["rounds"] == pytest.approx([1e3 * s / 9 for s in seconds])
        # Prompts come before the last first token, which comes before the end.
        assert row["prefill_tokens_per_second"]["min"] >= batch * 40 / max(seconds)
    (alone,) = measured(tmp_path, "latency", tiny, "--batch", "2", "--output-len", "1")["rows"]
    assert alone["inter_token_ms_p50"] is None
    assert "ms/token" in capsys.readouterr().out


def test_prefix(tiny: Path, tmp_path: Path, capsys: Output) -> None:
    """Hits where they should be and nowhere else: a benchmark that hits a cache by mistake praises it."""
    flags = ("--requests", "4", "--prefix-len", "96", "--suffix-len", "16", "--output-len", "4")
    rows = measured(tmp_path, "prefix", tiny, *flags)["rows"]
    off, cold, warm, apart_off, apart_on = rows
    assert [row["part"] for row in rows] == ["shared"] * 3 + ["apart"] * 2
    assert off["hit_rate"] == apart_off["hit_rate"] == apart_on["hit_rate"] == 0
    # All but the first find the prefix; the second time all find all but their prompt's last page.
    assert cold["hit_rate"] == pytest.approx(3 * 96 / (4 * 112))
    assert warm["hit_rate"] == pytest.approx(96 / 112)
    assert off["ratio"]["rounds"] == apart_off["ratio"]["rounds"] == [1.0, 1.0]
    for row in (cold, warm):
        ratios = [a / b for a, b in zip(off["seconds"]["rounds"], row["seconds"]["rounds"], strict=True)]
        assert row["ratio"]["rounds"] == pytest.approx(ratios)
    assert "4 that share 96, warm: the same again" in capsys.readouterr().out


def test_structured(tiny: Path, tmp_path: Path, capsys: Output) -> None:
    """Free and constrained answers have the same length, or their difference is what is measured; a schema of one's own
    is obeyed."""
    flags = ("--concurrency", "3", "--input-len", "5", "--output-len", "40")
    (row,) = measured(tmp_path, "structured", tiny, *flags)["rows"]
    assert row["output_tokens"] == 3 * 40 and row["grammar_seconds"] > 0
    costs = [
        100 * (1 - slow / fast) for fast, slow in zip(row["free"]["rounds"], row["constrained"]["rounds"], strict=True)
    ]
    assert row["cost_percent"]["rounds"] == pytest.approx(costs)
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [true, false]}')
    (own,) = measured(tmp_path, "structured", tiny, "--concurrency", "3", "--schema", str(schema))["rows"]
    # A byte is a token here, and one ends it.
    assert 3 * len("true") <= own["output_tokens"] <= 3 * (len("false") + 1)
    assert "slower %" in capsys.readouterr().out


def test_a_schema_that_is_wrong(tiny: Path, tmp_path: Path, capsys: Output) -> None:
    """It is said before a model is loaded, which may take minutes."""
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "number", "multipleOf": "x"}')
    assert main(["bench", "structured", str(tiny), "--schema", str(schema)]) == 1
    assert "multipleOf" in capsys.readouterr().err


def test_startup(tiny: Path, tmp_path: Path, capsys: Output) -> None:
    """Real processes: the phases make up the whole, from the start of the process on."""
    rows = measured(tmp_path, "startup", tiny)["rows"]
    phases = {row["name"]: row["warm"]["rounds"] for row in rows}
    assert list(phases) == ["interpreter", "import", "model", "pages", "first token", "all"]
    for index in range(2):
        parts = [rounds[index] for name, rounds in phases.items() if name != "all"]
        assert all(part > 0 for part in parts)
        assert 0.8 * phases["all"][index] < sum(parts) <= phases["all"][index]
    assert all(row["cold"] is None for row in rows)
    assert "cold" not in capsys.readouterr().out


def test_startup_on_a_gpu(tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cold is a kernel cache that nobody has written to, warm the one that the last cold process has filled."""
    caches: list[Path] = []

    def first_token(argv: list[str], kernels: Path) -> dict[str, Any]:
        seconds = 2.0 if kernels in caches else 30.0
        caches.append(kernels)
        device = {"kind": "cuda", "name": "G", "dtype": "bfloat16", "threads": 1, "cores": 1}
        return {"model": "m", "device": device, "phases": {"import": 1.0, "all": seconds}}

    monkeypatch.setattr(startup, "_first_token", first_token)
    out = tmp_path / "run.json"
    assert main(["bench", "startup", "m", "--rounds", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    jsonschema.validate(found, SCHEMA)
    (whole,) = (row for row in found["rows"] if row["name"] == "all")
    assert whole["cold"]["rounds"] == [30.0, 30.0] and whole["warm"]["rounds"] == [2.0, 2.0]
    assert "cold, s" in capsys.readouterr().out


def test_startup_of_a_model_that_can_not_be_loaded(tiny: Path, capsys: Output) -> None:
    """The process's reason is this command's, not its traceback."""
    assert main(["bench", "startup", str(tiny), "--max-model-len", "1000000"]) == 2
    assert capsys.readouterr().err == ("quire: --max-model-len is 1000000 and the model's context is 4096: lower it\n")


@pytest.mark.parametrize("action", ["throughput", "latency", "prefix", "structured"])
def test_requests_that_do_not_fit(action: str, tiny: Path, capsys: Output) -> None:
    """They would end early and look fast."""
    assert main(["bench", action, str(tiny), "--max-model-len", "64"]) == 2
    error = capsys.readouterr().err
    assert "and the context is 64: lower them or raise --max-model-len" in error


def test_random_weights(tiny: Path, tmp_path: Path, capsys: Output) -> None:
    """A folder with config.json is enough to measure a shape, without its gigabytes."""
    folder = tmp_path / "shape"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny / "config.json").read_bytes())
    measured(tmp_path, "latency", folder, "--load-format", "dummy", "--batch", "1", "--output-len", "2")
    assert main(["bench", "structured", str(folder), "--load-format", "dummy"]) == 2
    assert "tokenizer.json is missing" in capsys.readouterr().err


def test_with_torch_and_its_friends_alone(tiny: Path, tmp_path: Path) -> None:
    """A machine that is lent for an hour has no more: no terminal's package, no server's, no grammar's."""
    site_packages = link_packages(tmp_path / "site", ["torch", "numpy", "safetensors", "tokenizers", "transformers"])
    for name in ("rich", "llguidance", "grpc", "httpx"):
        (site_packages / name).unlink(missing_ok=True)
    python, environment = bare_python(site_packages, tmp_path)

    def run(*line: str) -> subprocess.CompletedProcess[str]:
        command = [*python, "-m", "quire.cli.main", "bench", *line]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    for action, *flags in (
        ("throughput", "--requests", "2", "--input-len", "8", "--output-len", "2"),
        ("latency", "--batch", "1", "--output-len", "2"),
        ("prefix", "--requests", "2", "--prefix-len", "20", "--output-len", "2"),
        ("startup",),
    ):
        done = run(action, str(tiny), "--rounds", "1", *flags)
        assert done.returncode == 0 and done.stdout.startswith(f"{action}: tiny, "), done.stderr
    done = run("structured", str(tiny))
    assert done.returncode == 2
    assert done.stderr == (
        "quire: structured_outputs needs llguidance, which is not installed: run pip install 'quire[llm,grammar]'\n"
    )


def test_ctrl_c(tiny: Path, tmp_path: Path) -> None:
    """What took minutes to measure is not lost, and no traceback is shown."""
    out = tmp_path / "run.json"
    flags = ["--requests", "2", "3000", "--input-len", "8", "--output-len", "20", "--rounds", "1", "--out", str(out)]
    with Terminal([sys.executable, "-m", "quire.cli.main", "bench", "throughput", str(tiny), *flags]) as terminal:
        terminal.expect("fixed3000 round 1/1")
        terminal.type("\x03")
        assert terminal.wait() == 130
        assert "Traceback" not in terminal.output
        assert any(line.startswith("fixed2 ") for line in terminal.screen)
        assert terminal.screen[-2].startswith("stopped: the rows are those that were measured before")
    found = json.loads(out.read_text())
    jsonschema.validate(found, SCHEMA)
    assert found["stopped"] and [row["name"] for row in found["rows"]] == ["fixed2"]


def test_ctrl_c_while_a_process_starts(tiny: Path) -> None:
    """The process that is measured must not outlive the command."""
    line = [sys.executable, "-m", "quire.cli.main", "bench", "startup", str(tiny), "--rounds", "1000"]
    with Terminal(line) as terminal:
        terminal.expect("processes")
        terminal.type("\x03")
        assert terminal.wait() == 130
        assert "Traceback" not in terminal.output and "stopped" in terminal.rest
        assert session_of(terminal.process.pid) == []


def session_of(leader: int) -> list[int]:
    """The processes of a terminal."""
    found = []
    for process in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
        with suppress(ProcessLookupError):
            if os.getsid(process) == leader:
                found.append(process)
    return found


def test_workloads_are_the_same_everywhere() -> None:
    """Figures of other engines were taken with these prompts: one draw more or less, and they compare nothing."""
    draw = random.Random(7)
    expected = [
        ([draw.randrange(10, 100_000) for _ in range(draw.randint(100, 1024))], draw.randint(100, 1024))
        for _ in range(3)
    ]
    assert [tuple(job) for job in Workloads(128_256).mixed(3, Lengths(100, 1024), Lengths(100, 1024), 7)] == expected
    draw = random.Random(2)
    start = [draw.randrange(10, 100_000) for _ in range(64)]
    shared = [(start + [draw.randrange(10, 100_000) for _ in range(8)], 5) for _ in range(3)]
    assert [tuple(job) for job in Workloads(151_936).shared_prefix(3, 64, 8, 5, 2)] == shared


works = st.lists(st.builds(Job, st.lists(st.integers(10, 258), min_size=1, max_size=40), st.integers(1, 9)), min_size=1)


@given(works, st.integers(1, 200))
def test_shifted_work_has_its_shape_and_none_of_its_tokens(work: Work, by: int) -> None:
    """Rounds must do the same work, and none may find its prompts in the cache."""
    workloads = Workloads(259)
    shifted = workloads.shifted(work, by)
    assert longest(shifted) == longest(work) and workloads.shifted(work, 0) == work
    for before, after in zip(work, shifted, strict=True):
        assert (len(after.prompt), after.output_len) == (len(before.prompt), before.output_len)
        assert all(a != b and 10 <= b < 259 for a, b in zip(before.prompt, after.prompt, strict=True))
    # What is shared stays shared.
    alike = [[a.prompt == b.prompt for b in work] for a in work]
    assert alike == [[a.prompt == b.prompt for b in shifted] for a in shifted]


def test_a_run_takes_times_of_every_request(core: EngineCore) -> None:
    """More requests than slots: each has its first token's time, and the tokens are exactly those asked for."""
    work = Workloads(259).mixed(9, Lengths(3, 60), Lengths(1, 20), 0)
    run = Meter(core).run(work)
    assert run.requests == len(run.first_tokens) == 9 and sorted(run.first_tokens) == run.first_tokens
    assert run.output_tokens == sum(job.output_len for job in work) and run.first_tokens[-1] <= run.seconds
    assert 0 < sum(run.decode_steps) <= run.seconds - run.first_tokens[-1] + 1e-6
    again = Meter(core).run(work)
    assert again.cached_tokens > run.cached_tokens == 0
    assert Meter(core).run(work, salt="other").cached_tokens == 0


def test_an_interrupt_and_a_failure_leave_the_core_idle(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured next must not share the batch with what was given up."""
    work = Workloads(259).fixed(6, 20, 30, 1)

    with pytest.raises(KeyboardInterrupt):
        Meter(core, lambda: signal.raise_signal(signal.SIGINT)).run(work)
    assert not core.has_work and core.scheduler.pool.available == core.scheduler.pool.num_pages

    step = core.step
    error = InternalError("the model's logits are not finite")

    def failing() -> list[Update]:
        updates = step()
        return [update._replace(finished=Finished(FinishReason.ERROR, error)) for update in updates]

    monkeypatch.setattr(core, "step", failing)
    with pytest.raises(InternalError, match="not finite"):
        Meter(core).run(work)
    assert not core.has_work and core.scheduler.pool.available == core.scheduler.pool.num_pages


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (7, "7"), (12345, "12,345"), (0.1234, "0.123"), (5.678, "5.68"), (123.45, "123.5"), (9474.2, "9,474")],
)
def test_numbers_have_the_digits_that_matter(value: float, shown: str) -> None:
    """A table of 15 digits is not read."""
    assert number(value) == shown


def test_noise_is_shown() -> None:
    """A median alone hides that the rounds differ by more than what is compared."""
    assert str(Spread.of([3.0, 1.0, 2.0])) == "2.00 (1.00 to 3.00)"
    assert str(Spread.of([3.0])) == "3.00"
