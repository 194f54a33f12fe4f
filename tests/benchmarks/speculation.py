"""Answers with drafts beside the same without, in turn.

    python tests/benchmarks/speculation.py
    python tests/benchmarks/speculation.py --head FOLDER --rounds 5
    python tests/benchmarks/speculation.py --head FOLDER --requests 1 8 64 --max-num-seqs 64 \
        --kv-cache-bytes 20000000000

Kinds of text: code that is copied, as an editor asks for, JSON under a schema, talk, and the questions that heads are
evaluated on, for JSON among them. Two engines are in one process; each answers each prompt in each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from quire.llm import LLM, SamplingParams, StructuredOutputsParams
from quire.speculate.prompts import PROMPTS

MAX_TOKENS = 160
PERSON = {
    "type": "object",
    "properties": {
        "full_name": {"type": "string", "maxLength": 20},
        "age_in_years": {"type": "integer", "minimum": 0, "maximum": 150},
        "city_of_residence": {"type": "string", "maxLength": 20},
        "is_currently_employed": {"type": "boolean"},
    },
    "required": ["full_name", "age_in_years", "city_of_residence", "is_currently_employed"],
    "additionalProperties": False,
}
CODE = Path(__file__).read_text(encoding="utf-8")[1500:2700]


# What nobody put into the data that the shipped head was trained on.
QUESTIONS = [*PROMPTS["dialogue"], *PROMPTS["json"]]


@dataclass(frozen=True)
class Job:
    """One request: `prompt` goes on as text, or is a question to be answered."""

    kind: str
    prompt: str
    params: SamplingParams
    is_question: bool = False


def works(number: int) -> Iterator[Job]:
    free = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    copied = f"Version {number}:\n```python\n{CODE}\n```\nThe same once more:\n```python\n"
    yield Job("code, copied", copied, free)
    schema = StructuredOutputsParams(json=json.dumps(PERSON))
    person = f"Person {number}: Maria Lopez, {20 + number} years old, lives in Lima and works as a nurse. As JSON:\n"
    yield Job(
        "JSON by a schema", person, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, structured_outputs=schema)
    )
    yield Job("talk", f"Chapter {number}. The ship had been at sea for {number + 3} weeks when", free)
    question = QUESTIONS[number % len(QUESTIONS)]
    yield Job("questions, JSON", question, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS), is_question=True)


def answer(llm: LLM, jobs: Sequence[Job]) -> float:
    """Tokens per second of requests that come at once."""
    params, began = [job.params for job in jobs], time.perf_counter()
    if jobs[0].is_question:
        outputs = llm.chat([[{"role": "user", "content": job.prompt}] for job in jobs], params, use_tqdm=False)
    else:
        outputs = llm.generate([job.prompt for job in jobs], params, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - began)


def compare(plain: LLM, speculating: LLM, count: int, rounds: int) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Of each kind of text, without and with drafts in each round, for so many requests at once."""
    speeds: dict[str, list[tuple[float, float]]] = {}
    for number in track(range(rounds + 1), f"{count} at once"):
        by_kind = zip(*(works(number * count + index) for index in range(count)), strict=True)
        for jobs in by_kind:
            pair = answer(plain, jobs), answer(speculating, jobs)
            # The first round is for what is done once.
            if number:
                speeds.setdefault(jobs[0].kind, []).append(pair)
    yield from speeds.items()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="(default: the embedded one)")
    parser.add_argument("--head", type=Path, metavar="FOLDER", help="an EAGLE-3 head to draft with (default: suffixes)")
    parser.add_argument("--num-tokens", type=int, default=8, metavar="N", help="drafts a step, at most (default: 8)")
    parser.add_argument("--requests", type=int, nargs="+", default=[1], metavar="N", help="at once (default: 1)")
    parser.add_argument("--kv-cache-bytes", type=int, metavar="N", help="of each engine: on a GPU, which both share")
    parser.add_argument("--max-num-seqs", type=int, metavar="N", help="of each engine: graphs are captured for so many")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="(default: %(default)s)")
    arguments = parser.parse_args()
    drafts: dict[str, object] = {"method": "suffix", "num_speculative_tokens": arguments.num_tokens}
    if arguments.head is not None:
        drafts |= {"method": "eagle3", "model": arguments.head}
    table = Table()
    for name in ("tokens/s, median", "at once", "without drafts", "with", "ratio of each round, median"):
        table.add_column(name, justify="left" if name.startswith("tokens") else "right")
    options = {"kv_cache_bytes": arguments.kv_cache_bytes, "max_num_seqs": arguments.max_num_seqs}
    given = {name: value for name, value in options.items() if value is not None}
    with (
        LLM(arguments.model, **given) as plain,
        LLM(arguments.model, **given, speculative_config=drafts) as speculating,
    ):
        for llm in (plain, speculating):
            while llm._core.prepare():
                pass
        for at_once in arguments.requests:
            for kind, pairs in compare(plain, speculating, at_once, arguments.rounds):
                without, with_drafts = (statistics.median(column) for column in zip(*pairs, strict=True))
                ratio = statistics.median(after / before for before, after in pairs)
                table.add_row(kind, str(at_once), f"{without:.0f}", f"{with_drafts:.0f}", f"{ratio:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
