"""Answers with drafts beside the same without, one request at a time, in turn.

    python tests/benchmarks/speculation.py
    python tests/benchmarks/speculation.py --head FOLDER --rounds 5

Three kinds of text: code that is copied, as an editor asks for, JSON under a schema, and talk. Two engines are in one
process; each answers each prompt in each round, with new numbers in it, so that neither finds it in its cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from quire.llm import LLM, SamplingParams, StructuredOutputsParams

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


def works(number: int) -> Iterator[tuple[str, str, SamplingParams]]:
    """(kind, prompt, parameters)."""
    free = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    yield "code, copied", f"Version {number}:\n```python\n{CODE}\n```\nThe same once more:\n```python\n", free
    schema = StructuredOutputsParams(json=json.dumps(PERSON))
    person = f"Person {number}: Maria Lopez, {20 + number} years old, lives in Lima and works as a nurse. As JSON:\n"
    yield "JSON by a schema", person, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, structured_outputs=schema)
    yield "talk", f"Chapter {number}. The ship had been at sea for {number + 3} weeks when", free


def answer(llm: LLM, prompt: str, params: SamplingParams) -> float:
    """Tokens per second of one request."""
    began = time.perf_counter()
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    return len(output.outputs[0].token_ids) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="(default: the embedded one)")
    parser.add_argument("--head", type=Path, metavar="FOLDER", help="an EAGLE-3 head to draft with (default: suffixes)")
    parser.add_argument("--num-tokens", type=int, default=8, metavar="N", help="drafts a step, at most (default: 8)")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="(default: %(default)s)")
    arguments = parser.parse_args()
    drafts: dict[str, object] = {"method": "suffix", "num_speculative_tokens": arguments.num_tokens}
    if arguments.head is not None:
        drafts |= {"method": "eagle3", "model": arguments.head}
    speeds: dict[str, list[tuple[float, float]]] = {}
    with LLM(arguments.model) as plain, LLM(arguments.model, speculative_config=drafts) as speculating:
        for number in track(range(arguments.rounds + 1), "measuring"):
            for kind, prompt, params in works(number):
                pair = answer(plain, prompt, params), answer(speculating, prompt, params)
                # The first round is for what is done once.
                if number:
                    speeds.setdefault(kind, []).append(pair)
    table = Table()
    for name in ("tokens/s, median", "without drafts", "with", "ratio of each round, median"):
        table.add_column(name, justify="left" if name.startswith("tokens") else "right")
    for kind, pairs in speeds.items():
        without, with_drafts = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(after / before for before, after in pairs)
        table.add_row(kind, f"{without:.0f}", f"{with_drafts:.0f}", f"{ratio:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
