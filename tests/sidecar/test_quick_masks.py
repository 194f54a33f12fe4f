"""Masks that are computed together: the same as alone, and whoever is slow among them is told apart."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from sidecar_process import DEADLINE, json_schema

from quire.service.checkpoint import TextModel
from quire.service.errors import ErrorCode, InternalError, OverloadedError
from quire.sidecar.config import MaskLimits
from quire.sidecar.grammar.batch import MaskRow
from quire.sidecar.grammar.compile import build_tokenizer
from quire.sidecar.grammar.compiled import CompiledGrammar
from quire.sidecar.grammar.fill import MaskFiller
from quire.sidecar.grammar.matcher import RowResult, SequenceMatcher

PATIENT = MaskLimits(row_seconds=DEADLINE, step_seconds=DEADLINE, token_seconds=DEADLINE)
ENTRY = json_schema(
    {
        "type": "object",
        "additionalProperties": False,
        "required": ["name", "tags", "number"],
        "properties": {
            "name": {"type": "string", "maxLength": 9},
            "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 1, "maxItems": 3},
            "number": {"type": "integer"},
        },
    }
)


@pytest.fixture(scope="module")
def grammars(smollm: TextModel) -> tuple[CompiledGrammar, CompiledGrammar]:
    tokenizer = build_tokenizer(smollm)
    return CompiledGrammar(tokenizer, ENTRY), CompiledGrammar(tokenizer, ENTRY)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many were filled in each call."""
    calls: list[int] = []
    fill = SequenceMatcher.fill_together

    def count(executor: object, matchers: Sequence[SequenceMatcher], *rest: object) -> list[RowResult]:
        calls.append(len(matchers))
        return fill(executor, matchers, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(SequenceMatcher, "fill_together", staticmethod(count))
    yield calls


def started(filler: MaskFiller, grammar: CompiledGrammar, count: int, limits: MaskLimits) -> list[SequenceMatcher]:
    """Matchers that have had their first masks."""
    matchers = [SequenceMatcher(grammar, limits) for _ in range(count)]
    rows = [MaskRow(index, index, matcher, []) for index, matcher in enumerate(matchers)]
    assert len(filler.fill(rows, masks_of(grammar, count)).results) == count
    for matcher in matchers:
        # However long the first ones took on this machine.
        matcher.seconds = 0.0
    return matchers


def masks_of(grammar: CompiledGrammar, count: int) -> npt.NDArray[np.int32]:
    return np.zeros((count, len(grammar.end_mask)), np.int32)


def one_of(mask: npt.NDArray[np.int32], rng: random.Random) -> int:
    """A token that it allows."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return int(rng.choice(np.flatnonzero(bits).tolist()))


@pytest.mark.parametrize("seed", range(4))
def test_masks_and_forced_tokens_are_those_of_each_alone(
    grammars: tuple[CompiledGrammar, CompiledGrammar], smollm: TextModel, together: list[int], seed: int
) -> None:
    """Sequences at different places, with one token since their last mask, with several, and with none."""
    rng, count = random.Random(seed), 12
    filler = MaskFiller(3, PATIENT)
    matchers = started(filler, grammars[0], count, PATIENT)
    alone = [SequenceMatcher(grammars[1], PATIENT) for _ in range(count)]
    expected, bitmask = masks_of(grammars[0], count), masks_of(grammars[0], count)
    ended: set[int] = set()
    for index, matcher in enumerate(alone):
        matcher.fill([], [], 0, expected[index : index + 1])
    for _ in range(30):
        rows, wanted = [], {}
        for index in set(range(count)) - ended:
            accepted = []
            for _ in range(rng.choice([0, 1, 1, 1, 2])):
                accepted.append(one_of(expected[index], rng))
                if accepted[-1] in smollm.eos_token_ids:
                    ended.add(index)
                    break
                alone[index].fill([accepted[-1]], [], 0, expected[index : index + 1])
            if index not in ended:
                forced = rng.choice([0, 3])
                wanted[index] = alone[index].fill([], [], forced, expected[index : index + 1])
                rows.append(MaskRow(index, index, matchers[index], accepted, (), forced))
        filled = filler.fill(rows, bitmask)
        assert filled.results == wanted and not filled.errors
        for index in wanted:
            assert (bitmask[index] == expected[index]).all()
            matchers[index].seconds = 0.0
        if len(rows) < 2:
            break
    assert together and max(together) > 2
    filler.close()


def test_a_token_that_is_not_allowed_ends_its_sequence_alone(
    grammars: tuple[CompiledGrammar, CompiledGrammar], smollm: TextModel, together: list[int]
) -> None:
    """All others of the step would end with it."""
    filler = MaskFiller(2, PATIENT)
    matchers, bitmask = started(filler, grammars[0], 5, PATIENT), masks_of(grammars[0], 5)
    brace, letter = (smollm.tokenizer.token_to_id(token) for token in ("{", "x"))
    rows = [MaskRow(n, n, matcher, [letter if n == 3 else brace]) for n, matcher in enumerate(matchers)]
    bitmask[3] = -1
    filled = filler.fill(rows, bitmask)
    assert together == [5]
    assert list(filled.errors) == [3] and sorted(filled.results) == [0, 1, 2, 4]
    assert isinstance(filled.errors[3], InternalError) and "left its constraint" in filled.errors[3].message
    # Whose row it was is told; it can be read all the same.
    assert (bitmask[3] == -1).all() and (bitmask[4] == bitmask[0]).all() and bitmask[0].any()
    filler.close()


def test_who_was_slow_is_looked_for_and_the_others_go_on_together(
    grammars: tuple[CompiledGrammar, CompiledGrammar], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slow request would slow down all others, step by step, and have no limit of its own."""
    filler = MaskFiller(2, PATIENT)
    matchers, bitmask = started(filler, grammars[0], 6, PATIENT), masks_of(grammars[0], 6)
    fill, sizes, pause = SequenceMatcher.fill_together, [], [0.5]

    def slowly(executor: object, given: Sequence[SequenceMatcher], *rest: object) -> list[RowResult]:
        sizes.append(len(given))
        time.sleep(pause[0])
        return fill(executor, given, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(SequenceMatcher, "fill_together", staticmethod(slowly))
    rows = [MaskRow(n, n, matcher, []) for n, matcher in enumerate(matchers)]
    assert len(filler.fill(rows, bitmask).results) == 6 and sizes == [6]
    # Each has been alone once, and what it took is its own again.
    assert not any(matcher.is_quick for matcher in matchers)
    assert len(filler.fill(rows, bitmask).results) == 6 and sizes == [6]
    assert all(0 < matcher.seconds < 0.5 for matcher in matchers)
    matchers[0].seconds, pause[0] = 1.0, 0.0
    for matcher in matchers[1:]:
        matcher.seconds = 0.0
    assert len(filler.fill(rows, bitmask).results) == 6 and sizes == [6, 5]
    filler.close()


def test_a_step_ends_even_if_its_quick_masks_do_not(
    grammars: tuple[CompiledGrammar, CompiledGrammar], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in the grammar engine would hold up all requests of a pod for good; what comes too late is not written."""
    limits = MaskLimits(row_seconds=0.2, step_seconds=0.4)
    filler, release = MaskFiller(1, limits), threading.Event()
    matchers, bitmask = started(filler, grammars[0], 3, limits), masks_of(grammars[0], 3)
    fill = SequenceMatcher.fill_together

    def stuck(*given: object) -> list[RowResult]:
        release.wait(DEADLINE)
        return fill(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(SequenceMatcher, "fill_together", staticmethod(stuck))
    filled = filler.fill([MaskRow(n, n, matcher, []) for n, matcher in enumerate(matchers)], bitmask)
    assert {type(error) for error in filled.errors.values()} == {OverloadedError} and len(filled.errors) == 3
    assert filled.num_late == 3
    # Another thread is there for others.
    one = MaskRow(7, 0, SequenceMatcher(grammars[1], limits), [])
    assert list(filler.fill([one], bitmask).results) == [7]
    bitmask[:] = 5
    release.set()
    assert list(filler.fill([one], bitmask[:1].copy()).results) == [7]
    filler.close()
    assert (bitmask == 5).all()


def test_a_bug_ends_what_was_filled_together_and_nothing_else(
    grammars: tuple[CompiledGrammar, CompiledGrammar], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread would die with it, and the step wait for its deadline."""
    filler = MaskFiller(1, PATIENT)
    matchers, bitmask = started(filler, grammars[0], 2, PATIENT), masks_of(grammars[0], 3)

    def broken(*_: object) -> list[RowResult]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(SequenceMatcher, "fill_together", staticmethod(broken))
    rows = [MaskRow(n, n, matcher, []) for n, matcher in enumerate(matchers)]
    filled = filler.fill([*rows, MaskRow(2, 2, SequenceMatcher(grammars[1], PATIENT), [])], bitmask)
    assert {error.code for error in filled.errors.values()} == {ErrorCode.INTERNAL} and sorted(filled.errors) == [0, 1]
    assert list(filled.results) == [2]
    filler.close()
