"""Every command's flags: help that shows how, and errors that say what to type instead."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from quire.cli.bench import ACTIONS
from quire.cli.flags import Parser
from quire.cli.main import COMMANDS, main

Output = pytest.CaptureFixture[str]

WITH_FLAGS = [*COMMANDS, *(f"bench {action}" for action in ACTIONS if action != "serve")]


def help_of(command: str, output: Output) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([*command.split(), "--help"])
    assert exit_.value.code == 0
    return output.readouterr().out


def parser_of(command: str) -> Parser:
    path = "bench.serve" if command == "bench" else command.replace(" ", ".")
    module = importlib.import_module(f"quire.cli.{path}")
    parser: Parser = module.startup_parser() if command == "bench startup" else module._parser()
    return parser


@pytest.mark.parametrize("command", WITH_FLAGS)
def test_help_shows_examples_that_can_be_typed(command: str, capsys: Output) -> None:
    """People copy the first example; one that the parser refuses turns them away."""
    shown = help_of(command, capsys)
    examples = re.findall(rf"^  (quire {command}.*)$", shown.partition("examples:")[2], flags=re.MULTILINE)
    assert len(examples) >= (2 if " " in command else 3)
    parser = parser_of(command)
    for example in examples:
        arguments = shlex.split(example.partition("<")[0])
        parser.parse_args(arguments[1 + len(command.split()) :])


@pytest.mark.parametrize("command", WITH_FLAGS)
def test_help_fits_a_terminal_and_explains_every_flag(
    command: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flag without a word about it is guessed at; a line that wraps is hard to read."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = help_of(command, capsys)
    assert max(map(len, shown.splitlines())) <= 80
    assert all(action.help for action in parser_of(command)._actions)


def test_the_commands_are_listed(capsys: Output) -> None:
    """`quire` alone must lead to every command, and by its status tell a script that it did nothing."""
    assert main(["--help"]) == main(["help"]) == main(["-h"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {command}" in shown and what in shown for command, what in COMMANDS.items())
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "usage: quire COMMAND" in captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_command_is_help(command: str, capsys: Output) -> None:
    """`quire help serve` is what git has taught people to type."""
    with pytest.raises(SystemExit):
        main(["help", command])
    assert f"usage: quire {command}" in capsys.readouterr().out


def test_version(capsys: Output) -> None:
    """The first thing that a bug report has to say."""
    assert main(["--version"]) == 0
    assert re.fullmatch(r"quire \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sevre", "there is no command 'sevre': did you mean `quire serve`?"),
        ("frobnicate", "there is no command 'frobnicate': choose one of serve, chat, bench, top"),
        ("serve --prot 9000", "there is no --prot, did you mean --port: see `quire serve --help`"),
        ("serve --engine=2", "there is no --engine, did you mean --engines: see `quire serve --help`"),
        ("serve one two", "there is no two: see `quire serve --help`"),
        ("serve --port", "argument --port: expected one argument: see `quire serve --help`"),
        ("serve --port http", "argument --port: invalid int value: 'http': see `quire serve --help`"),
        ("serve --port 70000", "--port is 70000: it must lie in [0, 65535]"),
        ("serve --grpc-port=-1", "--grpc-port is -1: it must lie in [0, 65535]"),
        ("serve --port 9000 --grpc-port 9000", "--port and --grpc-port are both 9000: choose two ports"),
        ("serve --engines 0", "--engines is 0: it must lie in [1, 64]"),
        ("serve --engines 65", "--engines is 65: it must lie in [1, 64]"),
        ("serve --dtype int4", "argument --dtype: invalid choice: 'int4' (choose from"),
        ("serve --max-model-len 1", "--max-model-len is 1: it must be at least 2"),
        ("serve --max-num-seqs 0", "--max-num-seqs is 0: it must be at least 1"),
        ("serve --num-pages 0", "--num-pages is 0: it must be at least 1"),
        ("serve --kv-cache-bytes 0", "--kv-cache-bytes is 0: it must be at least 1"),
        ("serve --gpu-memory-utilization 2", "--gpu-memory-utilization is 2: give a share, like 0.9"),
        ("serve --device gpu", "argument --device: invalid choice: 'gpu' (choose from"),
        ("serve --threads 0", "--threads is 0: it must be at least 1"),
        ("serve --tls-cert a", "--tls-cert and --tls-key belong together: give both or neither"),
        ("serve --tls-cert /no/such --tls-key a", "--tls-cert: can't read /no/such: No such file or directory"),
        ("serve --tool-call-format xml", "argument --tool-call-format: invalid choice: 'xml' (choose from"),
        ("serve --host ''", "--host is empty: give an address of this machine, such as 127.0.0.1"),
        ("serve --host no.such.host.invalid --port 0", "--host is 'no.such.host.invalid', which is no address"),
        (
            "serve --host 192.0.2.1",
            "can't listen on 192.0.2.1 port 8000 (Cannot assign requested address): --host must",
        ),
        (
            "serve ./no-such-folder --port 0",
            "no model at ./no-such-folder: name a .gguf file, a folder with config.json",
        ),
        ("serve no-such.gguf --port 0", "no model at no-such.gguf: name a .gguf file, a folder with config.json"),
        ("serve tests --port 0", "the folder tests holds no config.json"),
        ("serve README.md --port 0", "README.md is not a .gguf file: name one, or the folder that holds config.json"),
        ("chat --url 127.0.0.1:8000", "--url is '127.0.0.1:8000': give one like http://127.0.0.1:8000"),
        ("chat --url ftp://x", "--url is 'ftp://x': give one like http://127.0.0.1:8000"),
        ("chat --temperature -0.1", "--temperature is -0.1: it must be at least 0"),
        ("chat --temperature nan", "--temperature is nan: it must be at least 0"),
        ("chat --max-tokens 0", "--max-tokens is 0: it must be at least 1"),
        ("chat hello", "there is no hello: see `quire chat --help`"),
        ("bench --requests 0", "--requests is 0: it must be at least 1"),
        ("bench --concurrency 0", "--concurrency is 0: it must be at least 1"),
        ("bench --rate 0", "--rate is 0: give requests per second, more than 0"),
        ("bench --rate inf", "--rate is inf: give requests per second, more than 0"),
        ("bench --input-len 0", "--input-len is 0: it must be at least 1"),
        ("bench --output-len=-5", "--output-len is -5: it must be at least 1"),
        ("bench trougput", "quire bench has no action 'trougput': did you mean `quire bench throughput`?"),
        ("bench throughput --requests 4 0", "--requests is 0: it must be at least 1"),
        ("bench throughput --rounds 0", "--rounds is 0: it must be at least 1"),
        ("bench throughput --input-len 9:8", "--input-len is '9:8': give a number of tokens, like 128, or a range"),
        ("bench throughput --output-len x", "--output-len is 'x': give a number of tokens, like 128, or a range"),
        ("bench throughput --out /no/such/file", "--out /no/such/file can't be written (No such file or directory)"),
        ("bench throughput --json x", "there is no --json: see `quire bench throughput --help`"),
        ("bench throughput ./no-such-folder", "no model at ./no-such-folder: name a .gguf file, a folder"),
        ("bench latency --batch 0", "--batch is 0: it must be at least 1"),
        ("bench prefix --no-prefix-caching", "--no-prefix-caching is set, and this measures prefix caching"),
        ("bench structured --schema nothing.json", "--schema nothing.json can't be read"),
        ("bench startup --max-model-len=-1", "--max-model-len is -1: 0 chooses it"),
        ("top --interval 0", "--interval is 0: it must be at least 0.1"),
        ("top --interval nan", "--interval is nan: it must be at least 0.1"),
        ("top --engine engine-0", "--engine is 'engine-0': give a host and a port, as in 127.0.0.1:9100, or unix: and"),
        ("top --engines 2", "there is no --engines, did you mean --engine: see `quire top --help`"),
        ("bench --seed x", "argument --seed: invalid int value: 'x': see `quire bench --help`"),
    ],
)
def test_a_wrong_line_says_what_to_correct(
    line: str, said: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag, its value and the fix in one line on standard error; nothing has been started."""
    monkeypatch.chdir(Path(__file__).parents[2])
    assert main(shlex.split(line)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("quire: ") and said in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_a_reader_that_has_enough_is_no_error() -> None:
    """`quire bench --help | head -1` must not end in a traceback."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "quire.cli.main", "help", "bench"]
    # Buffered, as it is for most people, the output meets its reader only at the end.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, check=False, timeout=60, env=buffered)
    os.close(write_end)
    assert done.stderr == b""
    assert done.returncode in (0, 141)
