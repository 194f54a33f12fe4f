"""Several positions of one sequence in one step: drafts, those that are taken back, tokens that a grammar forces."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sidecar_process import Row, SidecarProcess, StepClient, json_schema, lark, regex

from quire.service.checkpoint import TextModel
from quire.service.request import Constraint, ConstraintKind

PERSON = json_schema(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "date_of_birth": {"type": "string", "format": "date"}},
        "required": ["name", "date_of_birth"],
        "additionalProperties": False,
    }
)
GRAMMARS = [
    PERSON,
    regex("[0-9]{3}"),
    regex("(?:ab|é)*"),
    Constraint(ConstraintKind.JSON_OBJECT),
    lark('start: "(" start ")" | "x" | start "+" start'),
]
MOST = 6

_sequences = itertools.count(1 << 33)


@pytest.fixture(scope="module")
def wide(sidecar: SidecarProcess, smollm: TextModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StepClient]:
    client = StepClient(sidecar.address, tmp_path_factory.mktemp("wide"), smollm.vocab_size, rows=2 * (MOST + 2))
    yield client
    client.close()


def test_a_row_for_each_draft(wide: StepClient, smollm: TextModel) -> None:
    """Drafts would be verified under the mask of another position."""
    ids = smollm.tokenizer.encode('{"name": "Zo').ids
    assert not wide.fill(Row(1, PERSON, drafts=ids))
    assert wide.results == {1: (len(ids), [])}
    rows = wide.masks[: 1 + len(ids)].copy()
    for count in range(len(ids) + 1):
        assert not wide.fill(Row(2, PERSON, ids[:count]))
        assert np.array_equal(wide.masks[0], rows[count])
    wide.fill(released=[1, 2])


def test_the_first_forbidden_draft_ends_them(wide: StepClient, smollm: TextModel) -> None:
    """The engine would take over what the grammar forbids, or lose what it allows."""
    one, two, letter = (smollm.tokenizer.token_to_id(token) for token in ("1", "2", "A"))
    wide.masks[:] = 0xABCD
    assert not wide.fill(Row(1, regex("[0-9]{3}"), drafts=[one, letter, two]), Row(2, regex("[0-9]{3}"), [one]))
    assert wide.results == {1: (1, [])}
    assert two in wide.allowed(1)
    assert (wide.masks[2:4] == 0xABCD).all()
    assert two in wide.allowed(4)
    # No token at all, as a broken drafter may send.
    assert not wide.fill(Row(1, drafts=[2**31]), Row(2, drafts=[smollm.vocab_size]), released=[])
    assert wide.results == {1: (0, []), 2: (0, [])}
    wide.fill(released=[1, 2])


@pytest.mark.parametrize("text", ["12", "123"])
def test_an_end_token_among_the_drafts(wide: StepClient, smollm: TextModel, text: str) -> None:
    """Output would go on after its end, or an answer that ended in a rejected draft could never go on."""
    ids, (end,) = smollm.tokenizer.encode(text).ids, smollm.eos_token_ids
    assert not wide.fill(Row(1, regex("[0-9]{2,3}"), drafts=[*ids, end, end]))
    assert wide.results == {1: (len(ids) + 1, [])}
    assert list(wide.allowed(len(ids) + 1)) == [end]
    assert not wide.fill(Row(1, accepted=ids[:1]))
    assert smollm.tokenizer.token_to_id("7") in wide.allowed()
    wide.fill(released=[1])


def test_forced_tokens_follow_the_drafts(wide: StepClient, smollm: TextModel) -> None:
    """The free drafts of a schema's names and punctuation would be lost, or be wrong."""
    start, name = smollm.tokenizer.encode('{"').ids, smollm.tokenizer.encode('{"name": "Zoë", "').ids
    assert not wide.fill(Row(1, PERSON, max_forced=1), Row(2, PERSON, name, max_forced=99))
    assert wide.results[1] == (0, start[:1])
    text = smollm.tokenizer.decode(wide.results[2][1])
    assert len(text) > 3
    assert 'date_of_birth": "'.startswith(text)
    # What is forced may be drafted, and what follows it is forced from there on.
    forced = wide.results[2][1]
    assert not wide.fill(Row(2, drafts=forced[:2], max_forced=2))
    assert wide.results == {2: (2, forced[2:4])}
    assert not wide.fill(Row(2))
    assert wide.results == {}
    wide.fill(released=[1, 2])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), constraint=st.sampled_from(GRAMMARS))
def test_rejected_drafts_leave_no_trace(
    wide: StepClient, smollm: TextModel, data: st.DataObject, constraint: Constraint
) -> None:
    """With speculation, output would differ from what it is without, or stop in the middle."""
    drafted, plain = next(_sequences), next(_sequences)
    accepted: list[int] = []
    first: Constraint | None = constraint
    for _ in range(data.draw(st.integers(1, 8), label="steps")):
        # What a sequence without drafts may draw, one token at a time, is what its drafts are made of; some are wrong.
        drafts = data.draw(st.lists(st.integers(0, smollm.vocab_size - 1), max_size=2), label="wrong drafts")
        assert not wide.fill(Row(plain, first, accepted), Row(drafted, first, accepted, max_forced=MOST))
        first, accepted = None, []
        assert np.array_equal(wide.masks[0], wide.masks[1])
        allowed, forced = wide.allowed(0), wide.results[drafted][1]
        if list(allowed) == list(smollm.eos_token_ids):
            break
        start = data.draw(st.sampled_from([int(token) for token in allowed[:: 1 + len(allowed) // 40]]), label="start")
        drafts = data.draw(st.sampled_from([[start, *drafts], [*forced, *drafts], drafts]), label="drafts")[:MOST]
        assert not wide.fill(Row(drafted, drafts=drafts, max_forced=3))
        num_drafts, _ = wide.results.get(drafted, (0, []))
        if drafts[: len(forced)] == forced[: len(drafts)]:
            assert num_drafts >= min(len(forced), len(drafts))
        rows = wide.masks[: 1 + num_drafts].copy()
        kept = data.draw(st.integers(0, num_drafts), label="kept")
        # Each row is the mask after the drafts before it; the plain sequence goes there token by token.
        for count in range(kept):
            assert drafts[count] in np.flatnonzero(np.unpackbits(rows[count].view(np.uint8), bitorder="little"))
            if drafts[count] in smollm.eos_token_ids:
                wide.fill(released=[drafted, plain])
                return
            assert not wide.fill(Row(plain, accepted=[drafts[count]]))
            assert np.array_equal(wide.masks[0], rows[count + 1])
        assert not wide.fill(Row(drafted, accepted=drafts[:kept]), Row(plain))
        assert np.array_equal(wide.masks[0], wide.masks[1])
    wide.fill(released=[drafted, plain])
