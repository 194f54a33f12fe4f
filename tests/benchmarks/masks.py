"""What masks cost: a step through a sidecar process, beside the same round trip without masks.

    PYTHONPATH=tests/support python tests/benchmarks/masks.py
    PYTHONPATH=tests/support python tests/benchmarks/masks.py --steps 500 --threads 1

Sequences in four grammars draw at random through their masks, as an engine would: a step asks for all of them over the
stream and is done when they lie in shared memory. Two vocabularies: the embedded model's, and the same grown to 128,000
tokens by merges of its tokens. Steps with and without rows take turns.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sidecar_process import Row, SidecarProcess, StepClient, json_schema, regex

from quire.service.checkpoint import TextModel, load_text, locate
from quire.service.request import Constraint, ConstraintKind

LARGE_VOCABULARY = 128_000
BATCHES = (1, 16, 64, 256)
WARM_UP_STEPS = 20
GRAMMARS = (
    json_schema(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 60},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 3},
            },
            "required": ["name", "age", "tags"],
            "additionalProperties": False,
        }
    ),
    json_schema({"type": "array", "items": {"type": "object", "additionalProperties": {"type": "number"}}}),
    regex(r"([A-Z][a-z]{2,9} ){3,30}\d{4}-\d{2}-\d{2}"),
    Constraint(ConstraintKind.JSON_OBJECT),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="measured for each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="that fill masks; 0: one per core")
    arguments = parser.parse_args()
    print(f"{'vocabulary':>10} {'masks':>6} {'p50 ms':>8} {'p99 ms':>8} {'bare p50':>9} {'ratio':>6} {'µs a mask':>10}")
    for model, vocab_size in vocabularies():
        with tempfile.TemporaryDirectory() as folder:
            flags = ("--model", str(model), "--mask-threads", str(arguments.threads))
            with SidecarProcess(Path(folder), *flags) as sidecar:
                sidecar.wait_until_serving()
                for num_rows in BATCHES:
                    report(vocab_size, num_rows, *measure(sidecar, load_text(locate(model)), num_rows, arguments.steps))


def vocabularies() -> Iterator[tuple[str, int]]:
    """Two models for a sidecar and their sizes; the second is gone when the third is asked for."""
    embedded = load_text(locate())
    yield "", embedded.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        grown(embedded, Path(folder), LARGE_VOCABULARY)
        yield folder, LARGE_VOCABULARY


def grown(text: TextModel, folder: Path, vocab_size: int) -> None:
    """Writes a model's text side with so many tokens to `folder`."""
    tokenizer = json.loads(text.tokenizer.to_str())
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    # Common tokens have small numbers. The longer ones that are made of them are as long as a real vocabulary's: how
    # many nodes a trie of them has is what a mask's time depends on.
    tokens = [token for token in vocabulary if token not in special][:8_000]
    endings = [token for token in tokens if len(token) <= 3 and token.isalpha() and token.isascii()]
    rng = random.Random(0)
    while len(vocabulary) < vocab_size:
        first, second = rng.choice(tokens), rng.choice(endings)
        if first + second not in vocabulary:
            vocabulary[first + second] = len(vocabulary)
            merges.append([first, second])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {
        "vocab_size": vocab_size,
        "max_position_embeddings": text.max_model_len,
        "eos_token_id": text.eos_token_ids[0],
    }
    (folder / "config.json").write_text(json.dumps(config))


def measure(sidecar: SidecarProcess, text: TextModel, num_rows: int, num_steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each step with `num_rows` masks, and of each without any."""
    with tempfile.TemporaryDirectory() as folder:
        stream = StepClient(sidecar.address, Path(folder), text.vocab_size, num_rows)
        rng = np.random.default_rng(0)
        rows = [Row(number, GRAMMARS[number % len(GRAMMARS)]) for number in range(num_rows)]
        full, empty = [], []
        for step in range(WARM_UP_STEPS + num_steps):
            begin = time.perf_counter()
            errors = stream.fill(*rows)
            end = time.perf_counter()
            if errors:
                raise SystemExit(f"a mask failed: {next(iter(errors.values()))}")
            stream.fill()
            if step >= WARM_UP_STEPS:
                full.append(end - begin)
                empty.append(time.perf_counter() - end)
            rows = [drawn(text, row, stream.allowed(number), rng) for number, row in enumerate(rows)]
        stream.close()
    return full, empty


def drawn(text: TextModel, row: Row, allowed: npt.NDArray[np.int64], rng: np.random.Generator) -> Row:
    """A sequence's next row, when a token was drawn at random; one that has to end starts over."""
    choices = allowed[~np.isin(allowed, text.eos_token_ids)]
    if not len(choices):
        return Row(row.sequence, GRAMMARS[row.sequence % len(GRAMMARS)])
    return Row(row.sequence, accepted=[int(rng.choice(choices))])


def report(vocab_size: int, num_rows: int, full: list[float], empty: list[float]) -> None:
    """Prints one line of the table."""
    middle, bare = statistics.median(full), statistics.median(empty)
    last = sorted(full)[len(full) * 99 // 100]
    print(
        f"{vocab_size:>10,} {num_rows:>6} {middle * 1e3:>8.2f} {last * 1e3:>8.2f} {bare * 1e3:>9.2f} "
        f"{middle / bare:>6.1f} {(middle - bare) / num_rows * 1e6:>10.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
