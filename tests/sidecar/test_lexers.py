"""Sequences in one grammar: how they share its lexers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from sidecar_process import json_schema

from quire.service.checkpoint import TextModel
from quire.sidecar.config import MaskLimits
from quire.sidecar.grammar.batch import MaskRow
from quire.sidecar.grammar.compile import build_tokenizer
from quire.sidecar.grammar.compiled import CompiledGrammar, most_lexers
from quire.sidecar.grammar.fill import MaskFiller
from quire.sidecar.grammar.matcher import SequenceMatcher

LIMITS = MaskLimits(row_seconds=60.0, step_seconds=60.0)
PERSON = json_schema(
    {
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {"name": {"type": "string", "maxLength": 12}},
    }
)


@pytest.fixture
def grammar(smollm: TextModel, monkeypatch: pytest.MonkeyPatch) -> CompiledGrammar:
    monkeypatch.setattr("quire.sidecar.grammar.compiled.most_lexers", lambda num_cores: 3)
    monkeypatch.setattr("quire.sidecar.grammar.compiled._FIRST_S", 60.0)
    return CompiledGrammar(build_tokenizer(smollm), PERSON)


def shares(matchers: list[SequenceMatcher]) -> list[int]:
    return sorted(Counter(matcher.lexer for matcher in matchers).values())


def test_many_sequences_share_a_few_lexers(grammar: CompiledGrammar) -> None:
    """A schema that everybody asks for would be computed by one core alone, or each request would make its own."""
    few = [SequenceMatcher(grammar, LIMITS) for _ in range(2)]
    assert shares(few) == [1, 1]
    many = few + [SequenceMatcher(grammar, LIMITS) for _ in range(22)]
    assert shares(many) == [8, 8, 8]
    # Where some have ended, new ones find their place.
    ended = many[0].lexer
    many = [matcher for matcher in many if matcher.lexer is not ended]
    few.clear()
    new = [SequenceMatcher(grammar, LIMITS) for _ in range(8)]
    assert {matcher.lexer for matcher in new} == {ended}


def test_many_cores_have_more_lexers_each() -> None:
    """256 masks of a grammar would take half as long again on 16 cores, and twice as much memory on 2."""
    assert [most_lexers(cores) for cores in (1, 2, 4, 16)] == [4, 8, 16, 256]


def test_a_grammar_that_is_slow_to_compile_has_one_lexer(smollm: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests would wait for it once for each core."""
    monkeypatch.setattr("quire.sidecar.grammar.compiled._FIRST_S", 0.0)
    grammar = CompiledGrammar(build_tokenizer(smollm), PERSON)
    assert shares([SequenceMatcher(grammar, LIMITS) for _ in range(16)]) == [16]


def test_masks_are_the_same_with_each_lexer(grammar: CompiledGrammar, smollm: TextModel) -> None:
    filler = MaskFiller(3, LIMITS)
    matchers = [SequenceMatcher(grammar, LIMITS) for _ in range(24)]
    bitmask = np.zeros((24, len(grammar.end_mask)), np.int32)
    accepted: list[int] = []
    for text in ('{"', "name", '":"', "Li", "ma", '"}'):
        rows = [MaskRow(index, index, matcher, accepted) for index, matcher in enumerate(matchers)]
        assert len(filler.fill(rows, bitmask).results) == 24
        assert bitmask[0].any() and (bitmask == bitmask[0]).all()
        accepted = smollm.tokenizer.encode(text, add_special_tokens=False).ids
    filler.close()
