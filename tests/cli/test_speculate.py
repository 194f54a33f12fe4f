"""`quire speculate`: what it refuses, that each action goes on where it stopped, and all three in a row."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from families import one_thread
from tiny_checkpoint import tiny_checkpoint

from quire.cli import speculate
from quire.cli.main import main
from quire.llm import LLM, SamplingParams
from quire.service.checkpoint import load_text, locate
from quire.speculate.data import DataConfig, DialogueWriter, write_dialogues
from quire.speculate.dialogues import Dialogue, DialogueFolder

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def dialogues(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a tiny model goes on with: it never ends a turn, so that `quire speculate data` would drop it all."""
    folder = DialogueFolder(tmp_path_factory.mktemp("data"))
    folder.begin({"target": "tiny"})
    prompts = [[3 + (7 * p + i) % 250 for i in range(10)] for p in range(8)]
    with LLM(tiny, dtype="float32", max_model_len=256) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    for part in range(2):
        written = [(o.prompt_token_ids, o.outputs[0].token_ids) for o in outputs[4 * part : 4 * part + 4]]
        folder.write(part, [Dialogue("greedy", [*p, *t], [(len(p), len(p) + len(t))]) for p, t in written])
    return folder.path


@pytest.mark.parametrize("action", ["data", "train", "eval"])
def test_each_actions_help_shows_examples_that_can_be_typed(action: str, capsys: Output) -> None:
    """The flags are the actions', so that the command's own help is not enough."""
    with pytest.raises(SystemExit):
        main(["speculate", action, "--help"])
    shown = capsys.readouterr().out
    make: Callable[[], speculate.Parser] = getattr(speculate, f"_{action}_parser")
    assert all(each.help for each in make()._actions)
    examples = re.findall(rf"^  quire speculate {action} (.*)$", shown, flags=re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        make().parse_args(shlex.split(example))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("speculate", "the following arguments are required: action"),
        ("speculate brew", "argument action: invalid choice: 'brew'"),
        ("speculate data ''", "the following arguments are required: -o/--output: see `quire speculate data --help`"),
        ("speculate data '' -o d --dialogues 0", "--dialogues is 0: it must be at least 1"),
        ("speculate data '' -o d --turn 2", "there is no --turn, did you mean --turns"),
        ("speculate data ./no-such-model -o d", "no model at ./no-such-model"),
        ("speculate train '' d -o h --epochs 0", "--epochs is 0: it must be at least 1"),
        ("speculate train '' d -o h --learning-rate 2", "--learning-rate is 2: give more than 0, less than 1"),
        (
            "speculate train '' no-such-folder -o h",
            "no-such-folder holds no dialogues: make some with `quire speculate",
        ),
        ("speculate eval '' h --drafts 0", "--drafts is 0: it must be at least 1"),
        ("speculate eval '' h --prompts no-such-file", "--prompts no-such-file can't be read"),
        ("speculate eval '' no-such-head", "no-such-head holds no config.json: name the folder of an EAGLE head"),
    ],
)
def test_a_wrong_line_says_what_to_correct(
    line: str, said: str, capsys: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names the flag, its value and the fix, before anything is made."""
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("quire: ") and said in captured.err
    assert not list(tmp_path.iterdir())


def test_from_dialogues_to_numbers(tiny: Path, dialogues: Path, tmp_path: Path, capsys: Output) -> None:
    """Training, on what several commands wrote, and evaluation as they are typed; the head is one that the engine and
    vLLM read."""
    head, plot, numbers = tmp_path / "head", tmp_path / "plot.svg", tmp_path / "numbers.json"
    train = ["speculate", "train", str(tiny), *[str(dialogues)] * 2, "-o", str(head), "--epochs", "2", "--steps", "2"]
    assert main([*train, "--draft-vocab-size", "200"]) == 0
    shown = capsys.readouterr().out
    assert "16 dialogues; draft tokens are 100% of what was written" in shown
    assert json.loads((head / "config.json").read_text())["speculators_model_type"] == "eagle3"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('one\n{"kind": "json", "prompt": "two"}\n')
    files = ["--prompts", str(prompts), "--plot", str(plot), "--json", str(numbers)]
    assert main(["speculate", "eval", str(tiny), str(head), "--drafts", "3", "--output-len", "8", *files]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("tokens a step", "draft 3", "prompts", "json", "all"))
    read = json.loads(numbers.read_text())
    assert set(read) == {"prompts", "json", "all"}
    assert 1 <= read["all"]["length"] <= 4 and len(read["all"]["rates"]) == 3
    assert ElementTree.fromstring(plot.read_text()).tag.endswith("svg")


def test_ctrl_c_loses_nothing(tiny: Path, dialogues: Path, tmp_path: Path) -> None:
    """Whoever stops a training wants to go on later, or to use what there is."""
    head = tmp_path / "head"
    command = [sys.executable, "-m", "quire.cli.main", "speculate", "train", str(tiny), str(dialogues), "-o", str(head)]
    command += ["--epochs", "1000000", "--draft-vocab-size", "200"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as process:
        assert process.stdout is not None
        assert "8 dialogues" in process.stdout.readline()
        # It says so before its first step: from then on Ctrl-C is heeded between two of them.
        process.send_signal(signal.SIGINT)
        assert f"stopped; the same command goes on with what is in {head}" in process.stdout.read()
        assert process.wait(60) == 130
    assert (head / "training.pt").is_file() and not (head / "config.json").exists()
    assert main([*command[3:], "--max-minutes", "0.0001"]) == 0
    assert (head / "config.json").is_file() and not (head / "training.pt").exists()
    assert main(command[3:]) == 2
    more = [*command[3:8], str(tmp_path / "more"), "--start", str(head), "--epochs", "1", "--steps", "2"]
    assert main(more) == 0
    assert json.loads((tmp_path / "more" / "config.json").read_text())["draft_vocab_size"] == 200


def test_prompts_that_are_wrong(tiny: Path, tmp_path: Path, capsys: Output) -> None:
    """The line at fault is named: a file has hundreds."""
    prompts = tmp_path / "prompts.txt"
    for text, said in (("", "is empty: write one prompt a line"), ('a\n{"kind": "x"}\n', "line 2 must be text or")):
        prompts.write_text(text)
        assert main(["speculate", "eval", str(tiny), "h", "--prompts", str(prompts)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_dialogues_of_a_trained_model(tmp_path: Path) -> None:
    """The model writes both sides; a part that is missing is written again as it was, and no other is touched."""
    config = DataConfig(dialogues=6, turns=1, user_tokens=32, answer_tokens=8, part_size=3, seed=3)
    folder, text = DialogueFolder(tmp_path), load_text(locate())
    folder.begin({"seed": 3})
    told: list[int] = []
    with one_thread(), LLM(dtype="float32", max_model_len=512) as llm:
        writer = DialogueWriter(llm, text, config)
        write_dialogues(writer, folder, config, lambda part, _: told.append(part))
        files = sorted(tmp_path.glob("part-*.jsonl"))
        before = [file.read_text() for file in files]
        files[0].unlink()
        write_dialogues(writer, folder, config, lambda part, _: told.append(part))
        write_dialogues(writer, folder, config, lambda part, _: told.append(part), lambda: True)
    assert told == [0, 1, 0]
    assert [file.read_text() for file in files] == before
    found = list(folder.read())
    assert found
    for dialogue in found:
        ((begin, end),) = dialogue.spans
        assert end == len(dialogue.token_ids) and 0 < end - begin <= 8
        asked = text.tokenizer.decode(dialogue.token_ids[:begin], skip_special_tokens=False)
        assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert len(asked.split("<|im_start|>user\n")[1]) > len("<|im_end|>\n<|im_start|>assistant\n")


def test_a_folder_of_other_dialogues_is_not_gone_on_with(tiny: Path, dialogues: Path, capsys: Output) -> None:
    """Dialogues of two models in one folder would train a head for neither."""
    assert main(["speculate", "data", str(tiny), "-o", str(dialogues), "--seed", "1"]) == 2
    assert "was begun with" in capsys.readouterr().err


def test_a_broken_part_is_named(tmp_path: Path, tiny: Path, capsys: Output) -> None:
    """A disk that was full leaves a file that can't be read; what to do about it must be said."""
    (tmp_path / "part-00000.jsonl").write_text('{"kind": "a"')
    assert main(["speculate", "train", str(tiny), str(tmp_path), "-o", str(tmp_path / "h")]) == 2
    assert "part-00000.jsonl is broken" in capsys.readouterr().err
