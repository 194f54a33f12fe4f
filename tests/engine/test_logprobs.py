"""Log-probabilities of outputs and prompts, against transformers'; and what else a request may ask of its output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import EOS, tiny_llama
from transformers import LlamaForCausalLM

from quire.engine.core import EngineCore
from quire.engine.cpu_runner import CpuRunner
from quire.engine.models.model import Model, ModelDtype
from quire.engine.models.registry import load_model
from quire.engine.page_pool import PagePool
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.service.checkpoint.locate import CheckpointFormat
from quire.service.errors import InvalidRequestError
from quire.service.request import (
    Constraint,
    ConstraintKind,
    FinishReason,
    Request,
    SamplingParams,
    StopConditions,
    TokenLogprobs,
)

VOCAB_SIZE = 259
GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    reason: FinishReason | None = None


@dataclass
class Models:
    theirs: LlamaForCausalLM
    ours: Model

    def core(self, *, num_pages: int = 24, max_num_seqs: int = 4, budget: int = 64) -> EngineCore:
        config = SchedulerConfig(max_num_seqs, budget, max_model_len=96)
        scheduler = Scheduler(config, PagePool(num_pages), frozenset({EOS}))
        return EngineCore(CpuRunner(self.ours, num_pages, max_num_seqs, 96, "float32"), scheduler, None, VOCAB_SIZE)

    @torch.inference_mode()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Row i is about token i + 1."""
        return torch.log_softmax(self.theirs(torch.tensor([tokens])).logits[0].float(), dim=-1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("model")
    theirs = tiny_llama(folder, seed=4, vocab_size=VOCAB_SIZE)
    return Models(theirs, load_model(folder, CheckpointFormat.FOLDER, ModelDtype.FLOAT32, lambda *_: None))


def run(core: EngineCore, requests: list[Request], steps_between: Iterator[int] | None = None) -> list[Answer]:
    answers = [Answer() for _ in requests]
    for key, request in enumerate(requests):
        core.submit(key, request)
        for _ in range(next(steps_between, 0) if steps_between is not None else 0):
            take(core, answers)
    while core.has_work:
        take(core, answers)
    return answers


def take(core: EngineCore, answers: list[Answer]) -> None:
    for update in core.step():
        answer = answers[update.key]
        answer.token_ids.extend(update.token_ids)
        answer.logprobs.extend(update.logprobs)
        if scores := update.prompt_logprobs:
            answer.prompt_logprobs.update(enumerate(scores.tokens, scores.first))
        if update.finished is not None:
            assert update.finished.error is None
            answer.reason = update.finished.reason


def check(logprobs: torch.Tensor, token: int, found: TokenLogprobs, num_top: int) -> None:
    assert abs(found.logprob - float(logprobs[token])) < 1e-3
    assert found.rank == int((logprobs > logprobs[token]).sum()) + 1
    assert [token for token, _ in found.top] == logprobs.topk(num_top).indices.tolist()
    assert all(abs(value - float(logprobs[token])) < 1e-3 for token, value in found.top)


@given(data=st.data())
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_they_are_the_models_own(models: Models, data: st.DataObject) -> None:
    """Evaluations are built on these numbers: no neighbour, chunk, cached page or preemption may change or lose one."""
    core = models.core(
        num_pages=data.draw(st.integers(6, 12)), max_num_seqs=3, budget=data.draw(st.sampled_from([3, 7, 20, 64]))
    )
    beginning = [3 + i * 7 % 250 for i in range(40)]
    requests = []
    for key in range(data.draw(st.integers(1, 4))):
        prompt = (*beginning[: data.draw(st.sampled_from([1, 2, 16, 33, 40]))], key + 5)
        requests.append(
            Request(
                str(key),
                "m",
                prompt,
                SamplingParams(temperature=data.draw(st.sampled_from([0.0, 1.0])), presence_penalty=1.0, seed=key),
                StopConditions(data.draw(st.integers(1, 20)), ignore_eos=True),
                logprobs=data.draw(st.sampled_from([None, 0, 1, 5])),
                prompt_logprobs=data.draw(st.sampled_from([None, None, 0, 3])),
            )
        )
    answers = run(core, requests, iter(lambda: data.draw(st.integers(0, 5)), -1))
    for request, answer in zip(requests, answers, strict=True):
        tokens = [*request.prompt_token_ids, *answer.token_ids]
        logprobs, num_prompt = models.logprobs(tokens), len(request.prompt_token_ids)
        assert len(answer.token_ids) == request.stop.max_tokens
        if request.logprobs is None:
            assert not answer.logprobs
        else:
            for index, found in enumerate(answer.logprobs):
                check(logprobs[num_prompt + index - 1], answer.token_ids[index], found, request.logprobs)
            assert len(answer.logprobs) == len(answer.token_ids)
        wanted = range(1, num_prompt) if request.prompt_logprobs is not None else range(0)
        assert sorted(answer.prompt_logprobs) == list(wanted)
        for position, found in answer.prompt_logprobs.items():
            check(logprobs[position - 1], tokens[position], found, request.prompt_logprobs or 0)


def test_min_tokens_and_ignore_eos(models: Models) -> None:
    """Benchmarks need outputs of a given length, and short answers can be refused."""
    prompt = (5, 6, 7)
    always_ends = SamplingParams(temperature=0.0, logit_bias=((EOS, 100.0),))
    ends, later, never = run(
        models.core(),
        [
            Request("ends", "m", prompt, always_ends, StopConditions(10)),
            Request("later", "m", prompt, always_ends, StopConditions(10, min_tokens=4)),
            Request("never", "m", prompt, always_ends, StopConditions(10, ignore_eos=True)),
        ],
    )
    assert ends.token_ids == [EOS] and ends.reason is FinishReason.STOP
    assert len(later.token_ids) == 5 and later.token_ids.index(EOS) == 4 and later.reason is FinishReason.STOP
    assert never.token_ids == [EOS] * 10 and never.reason is FinishReason.LENGTH


def test_bad_words_of_several_tokens(models: Models) -> None:
    """A word that is several tokens must be cut at its last one, not only where it begins."""
    (free,) = run(models.core(), [Request("free", "m", (5, 6), GREEDY, StopConditions(12, ignore_eos=True))])
    word = tuple(free.token_ids[3:6])
    sampling = SamplingParams(temperature=0.0, bad_words=(word,))
    (kept,) = run(models.core(), [Request("kept", "m", (5, 6), sampling, StopConditions(12, ignore_eos=True))])
    assert kept.token_ids[:5] == free.token_ids[:5] and kept.token_ids[5] != free.token_ids[5]
    assert all(tuple(kept.token_ids[i : i + 3]) != word for i in range(10))


@pytest.mark.parametrize(
    ("field", "sampling", "stop"),
    [
        ("sampling.logit_bias", SamplingParams(logit_bias=((VOCAB_SIZE, 1.0),)), StopConditions(4)),
        ("sampling.bad_words", SamplingParams(bad_words=((1, VOCAB_SIZE),)), StopConditions(4)),
        ("stop.stop_token_ids", GREEDY, StopConditions(4, stop_token_ids=(VOCAB_SIZE,))),
    ],
)
def test_tokens_beyond_the_vocabulary(
    models: Models, field: str, sampling: SamplingParams, stop: StopConditions
) -> None:
    """Unchecked they would index past the logits, which ends every request in the batch."""
    core = models.core()
    with pytest.raises(InvalidRequestError) as error:
        core.submit(0, Request("r", "m", (1,), sampling, stop))
    assert error.value.field == field and not core.has_work


def test_ignore_eos_with_a_grammar() -> None:
    """A grammar ends with an end token: told to ignore it, the request could never end by itself."""
    with pytest.raises(InvalidRequestError) as error:
        Request(
            "r", "m", (1,), GREEDY, StopConditions(4, ignore_eos=True), constraint=Constraint(ConstraintKind.REGEX, "a")
        )
    assert error.value.field == "stop.ignore_eos"


def test_prompts_that_arrive_together_are_computed_once(models: Models) -> None:
    """n answers to one prompt would otherwise cost n prefills, for none of them finds the others' pages yet."""
    core = models.core(num_pages=40, max_num_seqs=8, budget=64)
    prompt = tuple(range(10, 90))
    answers = run(core, [Request(str(i), "m", prompt, GREEDY, StopConditions(4)) for i in range(4)])
    assert len({tuple(answer.token_ids) for answer in answers}) == 1
    # The first computes all; each other its last page, where the token is whose logits it needs.
    assert core.stats.computed_tokens <= 80 + 3 * 16 + 4 * 3
