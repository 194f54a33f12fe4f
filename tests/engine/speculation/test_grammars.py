"""Constrained outputs with drafts are those without, and match: every kind of grammar, whoever drafts, however well."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jsonschema
import pytest
from draft_oracle import FreeSteps, Oracle
from families import one_thread
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tiny_checkpoint import tiny_checkpoint
from tiny_models import EOS

from quire.engine.core import EngineCore
from quire.engine.cpu_runner import CpuRunner
from quire.engine.models.model import Model, ModelDtype
from quire.engine.models.registry import load_model
from quire.engine.page_pool import PagePool
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.engine.speculation.drafts import DraftSource
from quire.engine.speculation.speculator import SpeculationConfig, Speculator
from quire.llm.grammar_masks import GrammarMasks
from quire.llm.suffix_drafts import SuffixDrafts
from quire.service.checkpoint import TextModel, load_text, locate
from quire.service.checkpoint.locate import CheckpointFormat
from quire.service.request import Constraint, ConstraintKind, Finished, FinishReason, Request, SamplingParams
from quire.service.request import StopConditions as Stop

MAX_MODEL_LEN = 96
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["circle", "circus"]}, "size": {"type": "integer"}, "open": {"type": "boolean"}},
    "required": ["kind", "open"],
    "additionalProperties": False,
}


def is_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)


def fits_schema(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


ANSWER = "(yes, of course|no, not today)[.!]?"
CODE = "[a-c]{3,9}(-[0-9]{2}){1,3}"
ITEMS = 'start: item ("; " item)*\nitem: "number " /[0-9]/ | "name " /[a-f]{2,4}/'

# The grammar, and whether a whole output matches it.
GRAMMARS: Mapping[Constraint, Callable[[str], object]] = {
    Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA)): fits_schema,
    Constraint(ConstraintKind.JSON_OBJECT): is_object,
    Constraint(ConstraintKind.REGEX, ANSWER): re.compile(ANSWER).fullmatch,
    Constraint(ConstraintKind.REGEX, CODE): re.compile(CODE).fullmatch,
    Constraint(ConstraintKind.LARK, ITEMS): re.compile(
        "(number [0-9]|name [a-f]{2,4})(; (number [0-9]|name [a-f]{2,4}))*"
    ).fullmatch,
}
# Prompts share pages, or don't.
PREFIXES = ("", "x" * 20, "The quick brown fox jumps over the lazy dog. ")

keys = itertools.count()


@dataclass(frozen=True)
class Target:
    """The tiny model, its tokenizer, and masks for it."""

    model: Model
    text: TextModel
    masks: GrammarMasks

    def core(self, limits: SchedulerConfig, num_pages: int, speculator: Speculator | None) -> EngineCore:
        runner = CpuRunner(self.model, num_pages, limits.max_num_seqs, MAX_MODEL_LEN, "float32")
        scheduler = Scheduler(limits, PagePool(num_pages), frozenset({EOS}))
        return EngineCore(runner, scheduler, self.masks, self.text.vocab_size, speculator=speculator)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with one_thread():
        folder = tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")
        text = load_text(locate(str(folder), text_only=True))
        masks = GrammarMasks(text)
        yield Target(load_model(folder, CheckpointFormat.FOLDER, ModelDtype.FLOAT32, lambda *_: None), text, masks)
        masks.close()


@dataclass(frozen=True)
class Case:
    """A request, and the step before which it arrives."""

    request: Request
    arrival: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    prompt = draw(st.sampled_from(PREFIXES)) + draw(st.text("abc .", min_size=1, max_size=8))
    request = Request(
        "r",
        "m",
        tuple(3 + byte for byte in prompt.encode()),
        SamplingParams(draw(st.sampled_from([0.0, 0.0, 0.0, 1.0])), seed=draw(st.integers(0, 2**32))),
        Stop(draw(st.integers(1, 24))),
        constraint=draw(st.sampled_from([None, *GRAMMARS])),
    )
    return Case(request, draw(st.integers(0, 10)))


def run(core: EngineCore, wanted: list[Case]) -> tuple[list[list[int]], list[Finished]]:
    """Each request's tokens and end."""
    mine = [next(keys) for _ in wanted]
    tokens: dict[int, list[int]] = {key: [] for key in mine}
    ends: dict[int, Finished] = {}
    for number in itertools.count():
        for key, case in zip(mine, wanted, strict=True):
            if case.arrival == number:
                core.submit(key, case.request)
        for update in core.step():
            tokens[update.key] += update.token_ids
            if update.finished is not None:
                ends[update.key] = update.finished
        if len(ends) == len(wanted):
            break
    assert core.scheduler.pool.available == core.scheduler.pool.num_pages
    return [tokens[key] for key in mine], [ends[key] for key in mine]


# Five of six cases are constrained: of 160 lists of 16 cases that makes 2,100.
@given(data=st.data())
@settings(deadline=None, max_examples=160, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_drafts_change_no_constrained_output(target: Target, data: st.DataObject) -> None:
    """A draft that a grammar forbids and that is kept, a mask of the wrong place, a state that went on with a draft
    that was not kept: each would change the output, or break it."""
    wanted = data.draw(st.lists(cases(), min_size=16, max_size=16), label="requests")
    num_pages = data.draw(st.integers(6, 32), label="pages")
    limits = SchedulerConfig(
        data.draw(st.integers(2, 16), label="sequences"),
        data.draw(st.integers(16, 96), label="budget"),
        MAX_MODEL_LEN,
        enable_prefix_caching=data.draw(st.booleans(), label="prefix caching"),
    )
    num_drafts = data.draw(st.integers(1, 8), label="drafts")
    drafter = data.draw(st.sampled_from(["grammar", "suffix", 0.0, 0.5, 0.9, 1.0]), label="drafter")
    expected, expected_ends = run(target.core(limits, num_pages, None), wanted)

    first = next(keys) + 1

    def whole(key: int) -> list[int]:
        return [*wanted[key - first].request.prompt_token_ids, *expected[key - first]]

    source: DraftSource | None = None
    if drafter == "suffix":
        source = SuffixDrafts()
    elif isinstance(drafter, float):
        source = Oracle(whole, drafter, target.text.vocab_size)
    speculator = Speculator(source, SpeculationConfig(num_drafts), cost=FreeSteps())
    core = target.core(limits, num_pages, speculator)
    found, ends = run(core, wanted)
    event(f"{drafter}: drafts kept: {sum(speculator.stats.accepted.values()) > 0}")
    event(f"preempted: {core.scheduler.num_preemptions > 0}")
    assert [end.reason for end in ends] == [end.reason for end in expected_ends]
    assert found == expected
    for case, tokens, end in zip(wanted, found, ends, strict=True):
        if case.request.constraint is not None and end.reason is FinishReason.STOP:
            assert GRAMMARS[case.request.constraint](target.text.tokenizer.decode(tokens))
