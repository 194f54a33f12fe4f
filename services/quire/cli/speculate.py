"""`quire speculate data | train | eval`: an EAGLE-3 head for a model, from nothing to numbers."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from quire.cli.figures import bar, count, percent
from quire.cli.flags import Parser, at_least
from quire.service.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from quire.llm import LLM
    from quire.service.checkpoint import Checkpoint
    from quire.speculate.evaluate import Acceptance
    from quire.speculate.target import FrozenTarget

_DESCRIPTION = """\
Makes a head that drafts tokens for a model, which then verifies several in one
step: the model writes dialogues, the head learns to foresee them, and is
measured. Each action has flags of its own: `quire speculate train --help`."""

_EXAMPLES = """\
  quire speculate data "" -o dialogues
      the embedded model writes dialogues, JSON and code among them
  quire speculate train "" dialogues -o head
      trains a head on them; stopped with Ctrl-C, it goes on where it was
  quire speculate eval "" head --plot acceptance.svg
      tokens a step, and how often each draft is accepted"""

_STOPPED = 130


def main(argv: list[str]) -> int:
    """Runs one action; 130 after Ctrl-C. Raises QuireError."""
    arguments = _parser().parse_args(argv[:1])
    actions: dict[str, tuple[Callable[[], Parser], Callable[[Any], int]]] = {
        "data": (_data_parser, _data),
        "train": (_train_parser, _train),
        "eval": (_eval_parser, _eval),
    }
    make_parser, run = actions[arguments.action]
    return run(make_parser().parse_args(argv[1:]))


def _parser() -> Parser:
    parser = Parser("speculate", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("action", choices=["data", "train", "eval"], help="what to do")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the action's own")
    return parser


def _data_parser() -> Parser:
    from quire.speculate.data import DataConfig

    default = DataConfig()
    parser = Parser(
        "speculate data",
        "Has a model write both sides of dialogues. Goes on where an earlier call stopped.",
        '  quire speculate data "" -o dialogues\n'
        "      the embedded model; a path or a hub name is another\n"
        "  quire speculate data ./llama -o dialogues --dialogues 50000 --max-minutes 60\n"
        "      as many as come in an hour",
    )
    _add_target(parser)
    add = parser.add_argument
    add("-o", "--output", required=True, metavar="DIR", help="the folder to write to")
    add("--dialogues", type=int, default=default.dialogues, metavar="N", help="how many (default: %(default)s)")
    add("--turns", type=int, default=default.turns, metavar="N", help="questions in each (default: %(default)s)")
    add("--answer-tokens", type=int, default=default.answer_tokens, metavar="N", help="at most (default: %(default)s)")
    add("--user-tokens", type=int, default=default.user_tokens, metavar="N", help="at most (default: %(default)s)")
    add(
        "--part-size", type=int, default=default.part_size, metavar="N", help="dialogues at once (default: %(default)s)"
    )
    add("--max-num-seqs", type=int, metavar="N", help="sequences in the model's batch (default: the engine's)")
    add(
        "--kv-cache-bytes", type=int, metavar="N",
        help="for pages: what to say where several of these commands share a GPU (default: the engine's)",
    )  # fmt: skip
    add("--seed", type=int, default=default.seed, metavar="N", help="of all draws (default: %(default)s)")
    add("--max-minutes", type=float, metavar="M", help="begin no other part after that")
    return parser


def _train_parser() -> Parser:
    from quire.speculate.train import TrainConfig

    default = TrainConfig()
    parser = Parser(
        "speculate train",
        "Trains an EAGLE-3 head, on a GPU if there is one. Goes on where an earlier call stopped.",
        '  quire speculate train "" dialogues -o head\n'
        "      a head for the embedded model\n"
        "  quire speculate train ./llama dialogues -o head --draft-vocab-size 32000\n"
        "      with more of the vocabulary, for a larger model",
    )
    _add_target(parser)
    add = parser.add_argument
    add("data", nargs="+", metavar="DATA", help="a folder that `quire speculate data` wrote; there may be several")
    add("-o", "--output", required=True, metavar="HEAD", help="the folder to write to")
    add("--start", default="", metavar="HEAD", help="a head to go on from, with its draft tokens")
    add("--epochs", type=int, default=default.epochs, metavar="N", help="times over the data (default: %(default)s)")
    add(
        "--draft-vocab-size", type=int, default=default.draft_vocab_size, metavar="N",
        help="tokens that can be drafted (default: %(default)s)",
    )  # fmt: skip
    add("--steps", type=int, default=default.steps, metavar="N", help="drafts in a row (default: %(default)s)")
    add(
        "--step-decay", type=float, default=default.step_decay, metavar="R",
        help="how much a draft counts, as a share of the one before (default: %(default)s)",
    )  # fmt: skip
    add("--batch-tokens", type=int, default=default.batch_tokens, metavar="N", help="in a batch (default: %(default)s)")
    add("--max-length", type=int, default=default.max_length, metavar="N", help="dialogues are cut to (%(default)s)")
    add(
        "--learning-rate", type=float, default=default.learning_rate, metavar="R", help="highest (default: %(default)s)"
    )
    add("--seed", type=int, default=default.seed, metavar="N", help="of weights and order (default: %(default)s)")
    add("--max-minutes", type=float, default=default.max_minutes, metavar="M", help="end earlier, after that")
    return parser


def _eval_parser() -> Parser:
    parser = Parser(
        "speculate eval",
        "Says how many tokens a step a head is good for, with greedy chains of drafts.",
        '  quire speculate eval "" head\n'
        "      on prompts that come with this command\n"
        '  quire speculate eval "" head --prompts mine.txt --json acceptance.json\n'
        "      on one's own, one a line, and the numbers as a file",
    )
    _add_target(parser)
    add = parser.add_argument
    add("head", metavar="HEAD", help="the head's folder, in either published layout of EAGLE-3")
    add("--drafts", type=int, default=4, metavar="K", help="in a chain (default: %(default)s)")
    add("--siblings", type=int, default=0, metavar="N", help="first drafts with a second choice (default: %(default)s)")
    add("--prompts", default="", metavar="FILE", help='one a line: text, or {"kind": …, "prompt": …}')
    add("--output-len", type=int, default=192, metavar="TOKENS", help="of an answer at most (default: %(default)s)")
    add("--plot", default="", metavar="FILE", help="where to write a picture (.svg)")
    add("--json", default="", metavar="FILE", help="where to write the numbers as well")
    return parser


def _add_target(parser: Parser) -> None:
    parser.add_argument("target", metavar="TARGET", help='the model; "" is the embedded one')


def _data(arguments: Any) -> int:
    from quire.service.checkpoint import load_text
    from quire.speculate.data import DataConfig, DialogueWriter, write_dialogues
    from quire.speculate.dialogues import DialogueFolder

    names = ("dialogues", "turns", "user_tokens", "answer_tokens", "part_size", "seed")
    config = DataConfig(**{name: getattr(arguments, name) for name in names})
    checkpoint, folder = _locate(arguments.target), DialogueFolder(Path(arguments.output))
    settings = {name: getattr(config, name) for name in names if name != "dialogues"}
    folder.begin({"target": checkpoint.name, **settings})
    enough = _after(arguments.max_minutes)
    tokens = 0
    given = {name: getattr(arguments, name) for name in ("max_num_seqs", "kv_cache_bytes")}
    with _llm(checkpoint, **given) as llm, _progress("dialogues") as progress:
        task = progress.add_task("", total=config.num_parts, completed=sum(map(folder.has, range(config.num_parts))))

        def wrote(part: int, written: int) -> None:
            nonlocal tokens
            tokens += written
            progress.update(task, advance=1, description=f"{count(tokens)} tokens written")

        try:
            write_dialogues(DialogueWriter(llm, load_text(checkpoint), config), folder, config, wrote, enough)
        except KeyboardInterrupt:
            return _stopped(folder.path)
    have = sum(map(folder.has, range(config.num_parts)))
    print(f"{folder.path}: {have} of {config.num_parts} parts, {count(tokens)} tokens of answers by this call")
    return 0


def _train(arguments: Any) -> int:
    from quire.engine.speculation.eagle.checkpoint import config_file
    from quire.service.interrupts import DeferredInterrupt
    from quire.speculate.dialogues import DialogueFolder
    from quire.speculate.draft_model import load_draft_model
    from quire.speculate.train import TrainConfig, Trainer, TrainProgress

    names = (
        "epochs",
        "draft_vocab_size",
        "steps",
        "step_decay",
        "batch_tokens",
        "max_length",
        "learning_rate",
        "seed",
        "max_minutes",
    )
    config = TrainConfig(**{name: getattr(arguments, name) for name in names})
    checkpoint = _locate(arguments.target)
    dialogues = [dialogue for folder in arguments.data for dialogue in DialogueFolder(Path(folder)).read()]
    output = Path(arguments.output)
    if arguments.start:
        config_file(Path(arguments.start))
    target = _target(checkpoint)
    start = load_draft_model(Path(arguments.start), target) if arguments.start else None
    trainer = Trainer(target, dialogues, config, output, checkpoint.name, start)
    with DeferredInterrupt() as interrupt, _progress("training") as progress:
        print(f"{len(dialogues)} dialogues; draft tokens are {percent(trainer.coverage)} of what was written")
        task = progress.add_task("", total=1.0)

        def report(now: TrainProgress) -> None:
            rates = " ".join(percent(rate) for rate in now.accuracies)
            told = f"loss {now.loss:.3f}, right {rates}, {count(now.tokens_per_second)} tok/s"
            progress.update(task, completed=now.done, description=told)
            if not progress.console.is_terminal:
                progress.console.print(f"{percent(now.done)}: {told}")

        done = trainer.run(report, lambda: interrupt.requested)
    if not done:
        return _stopped(output)
    held_out = trainer.finish()
    print(f"{output}: right on dialogues kept apart, draft by draft: {' '.join(percent(rate) for rate in held_out)}")
    return 0


def _eval(arguments: Any) -> int:
    from quire.engine.speculation.eagle.checkpoint import config_file
    from quire.speculate.draft_model import load_draft_model
    from quire.speculate.evaluate import greedy_acceptance, total
    from quire.speculate.plot import acceptance_svg
    from quire.speculate.prompts import read_prompts

    at_least("--drafts", arguments.drafts, 1)
    at_least("--siblings", arguments.siblings, 0)
    at_least("--output-len", arguments.output_len, 2)
    checkpoint = _locate(arguments.target)
    prompts = read_prompts(Path(arguments.prompts) if arguments.prompts else None)
    # Before the model is loaded, which takes its time.
    config_file(Path(arguments.head))
    target = _target(checkpoint)
    model = load_draft_model(Path(arguments.head), target)
    dialogues = _answers(checkpoint, prompts, arguments.output_len)
    found = greedy_acceptance(model, target, dialogues, arguments.drafts, arguments.siblings)
    found["all"] = total(found.values(), arguments.drafts)
    Console().print(_table(found))
    if arguments.plot:
        title = f"Drafts accepted, {checkpoint.name}"
        _write("--plot", arguments.plot, acceptance_svg(title, {name: part.rates for name, part in found.items()}))
    if arguments.json:
        numbers = {
            name: {"length": part.length, "rates": part.rates, "steps": part.steps} for name, part in found.items()
        }
        _write("--json", arguments.json, json.dumps(numbers, indent=2) + "\n")
    return 0


def _answers(checkpoint: Checkpoint, prompts: Sequence[tuple[str, str]], max_tokens: int) -> list[Any]:
    """The target's greedy answers, as dialogues with one span each."""
    from quire.llm import SamplingParams
    from quire.speculate.dialogues import Dialogue

    with _llm(checkpoint) as llm:
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        outputs = llm.chat([[{"role": "user", "content": text}] for _, text in prompts], params, use_tqdm=False)
    found = []
    for (kind, _), output in zip(prompts, outputs, strict=True):
        begin = len(output.prompt_token_ids)
        token_ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        found.append(Dialogue(kind, token_ids, [(begin, len(token_ids))]))
    return found


def _table(found: dict[str, Acceptance]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("prompts")
    table.add_column("tokens a step", justify="right")
    for place in range(len(found["all"].accepted)):
        table.add_column(f"draft {place + 1}")
    for name, part in found.items():
        table.add_row(name, f"{part.length:.2f}", *(_share(rate) for rate in part.rates))
    return table


def _share(rate: float) -> Any:
    return bar(rate, 8).append(f" {percent(rate)}", style="default")


def _locate(target: str) -> Checkpoint:
    from quire.service.checkpoint import locate

    return locate(target)


def _llm(checkpoint: Checkpoint, **arguments: Any) -> LLM:
    from quire.llm import LLM

    given = {name: value for name, value in arguments.items() if value is not None}
    return LLM(checkpoint.path, **given)


def _target(checkpoint: Checkpoint) -> FrozenTarget:
    from quire.speculate.target import FrozenTarget

    device, dtype = _device()
    return FrozenTarget(checkpoint, device, dtype)


def _device() -> tuple[torch.device, torch.dtype]:
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def _progress(what: str) -> Progress:
    console = Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _after(minutes: float | None) -> Callable[[], bool]:
    if minutes is None:
        return lambda: False
    end = time.perf_counter() + 60 * minutes
    return lambda: time.perf_counter() >= end


def _stopped(folder: Path) -> int:
    print(f"stopped; the same command goes on with what is in {folder}")
    return _STOPPED


def _write(flag: str, path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{flag} {path} can't be written ({error.strerror}): name another file") from error
