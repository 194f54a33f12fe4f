"""The batch and the queue as a table: who runs, who waits, how far each is."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.text import Text

from quire.cli.figures import bar, elapsed, fit
from quire.v1 import engine_pb2

# A request's id may be its sender's; it must not move the cursor.
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")

_STATES = {
    engine_pb2.SEQUENCE_STATE_WAITING: ("waiting", "dim"),
    engine_pb2.SEQUENCE_STATE_PREEMPTED: ("preempted", "red"),
    engine_pb2.SEQUENCE_STATE_PREFILLING: ("prefill", "yellow"),
    engine_pb2.SEQUENCE_STATE_DECODING: ("decode", "green"),
}

_COLUMNS = f"{'state':<10}{'prompt':>11}{'output':>12}{'pages':>7}{'age':>8}  "
_LONGEST_ID = 40


def batch_lines(seen: engine_pb2.InspectResponse, width: int, rows: int | None) -> list[Text]:
    """A line of titles, and at most `rows` lines of sequences: those that run, then those that wait."""
    total = seen.status.load.running + seen.status.load.waiting
    free = width - len(_COLUMNS)
    notes = max(8, min(24, free // 3))
    name = min(_LONGEST_ID, max(8, free - notes))
    lines = [Text(f"{'request':<{name}}{_COLUMNS}"[:width], "dim")]
    if not total:
        return [*lines, Text("no requests", "dim")]
    shown = len(seen.sequences) if rows is None else min(len(seen.sequences), rows)
    # The last line says how many there are that have none.
    if shown < total and rows is not None and shown == rows:
        shown = max(0, shown - 1)
    lines += [_row(sequence, name, width) for sequence in seen.sequences[:shown]]
    if shown < total:
        lines.append(Text(f"and {total - shown:,} more", "dim"))
    return lines


def _row(sequence: engine_pb2.SequenceInfo, name: int, width: int) -> Text:
    state, style = _STATES.get(sequence.state, ("unknown", "red"))
    row = Text.assemble(
        fit(Text(_id(sequence.request_id, name - 1)), name),
        (f"{state:<10}", style),
        f"{_prompt(sequence):>11}{f'{sequence.output_tokens:,}/{sequence.max_output_tokens:,}':>12}",
        f"{sequence.pages or '':>7}{elapsed(sequence.age_ms / 1000):>8}  ",
    )
    rest = width - len(row)
    notes = ", ".join(_notes(sequence))
    if rest - len(notes) >= 9 and sequence.output_tokens:
        row.append_text(
            bar(sequence.output_tokens / max(1, sequence.max_output_tokens), min(24, rest - len(notes) - 1))
        )
        notes = f" {notes}"
    row.append(notes, "dim")
    row.truncate(width, overflow="ellipsis")
    return row


def _prompt(sequence: engine_pb2.SequenceInfo) -> str:
    if sequence.state == engine_pb2.SEQUENCE_STATE_PREFILLING:
        return f"{min(sequence.computed_tokens, sequence.prompt_tokens):,}/{sequence.prompt_tokens:,}"
    return f"{sequence.prompt_tokens:,}"


def _notes(sequence: engine_pb2.SequenceInfo) -> Iterable[str]:
    if sequence.constrained:
        yield "grammar"
    if sequence.priority:
        yield f"priority {sequence.priority}"
    if sequence.preemptions:
        yield f"preempted {sequence.preemptions}×"


def _id(request_id: str, width: int) -> str:
    request_id = _UNPRINTABLE.sub("?", request_id)
    if len(request_id) <= width:
        return request_id
    # Those of one call differ at their end only.
    return f"{request_id[: width - 5]}…{request_id[-4:]}"
