"""Penalties, bias, bad words and min_tokens against a reference that is written out token by token."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.adjust import adjust_logits
from quire.engine.device_batch import DeviceBatch
from quire.engine.plan import Admission, StepPlan
from quire.kernels.token_mask import apply_token_mask
from quire.service.request import SamplingParams

VOCAB_SIZE = 12
TOKEN = st.integers(0, VOCAB_SIZE - 1)

params = st.builds(
    SamplingParams,
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -2.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.5]),
    logit_bias=st.dictionaries(TOKEN, st.sampled_from([-100.0, -1.0, 2.5, 100.0]), max_size=3).map(
        lambda biases: tuple(biases.items())
    ),
    bad_words=st.lists(st.lists(TOKEN, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
)
sequence = st.fixed_dictionaries(
    {
        "prompt": st.lists(TOKEN, min_size=1, max_size=6),
        "output": st.lists(TOKEN, max_size=8),
        "sampling": params,
        "end_token_ids": st.lists(TOKEN, max_size=2, unique=True).map(tuple),
        "min_tokens": st.sampled_from([0, 0, 1, 5]),
    }
)


def expected(logits: list[float], spec: dict[str, Any]) -> tuple[list[float], set[int]]:
    """What is left of `logits`, and the tokens that are forbidden."""
    sampling, output = spec["sampling"], spec["output"]
    counts = Counter(output)
    for token in set(spec["prompt"] + output):
        penalty = sampling.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token, count in counts.items():
        logits[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    forbidden = {
        word[-1] for word in sampling.bad_words if len(word) == 1 or tuple(output[-len(word) + 1 :]) == word[:-1]
    }
    if len(output) < spec["min_tokens"]:
        forbidden |= set(spec["end_token_ids"])
    return logits, forbidden


@given(specs=st.lists(sequence, min_size=1, max_size=5), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=200)
def test_each_row_is_changed_as_its_own_request_asks(specs: list[dict[str, Any]], seed: int) -> None:
    """In a batch one request's penalties must neither miss it nor touch its neighbour, whoever held the slot before."""
    batch = DeviceBatch(max_num_seqs=3, max_model_len=20)
    held: dict[int, dict[str, Any]] = {}
    for index, spec in enumerate(specs):
        slot, tokens = index % 3, tuple(spec["prompt"] + spec["output"])
        held[slot] = spec
        admission = Admission(
            slot, tokens, len(spec["prompt"]), spec["sampling"], spec["end_token_ids"], spec["min_tokens"]
        )
        batch.apply(StepPlan((admission,), (), ()))
    slots = list(held)
    logits = torch.randn(len(slots), VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))
    before = logits.tolist()
    lengths = torch.tensor([len(held[slot]["prompt"] + held[slot]["output"]) for slot in slots])
    adjust_logits(logits, batch.sampling, batch.token_ids, np.array(slots), lengths)
    for row, slot in enumerate(slots):
        wanted, forbidden = expected(before[row], held[slot])
        for token in range(VOCAB_SIZE):
            if token in forbidden:
                assert logits[row, token] < -1e8
            else:
                assert abs(float(logits[row, token]) - wanted[token]) < 1e-4


def test_a_grammar_wins_over_what_is_forbidden() -> None:
    """A row without any token left would end a request with an error about broken weights."""
    batch = DeviceBatch(max_num_seqs=1, max_model_len=20)
    sampling = SamplingParams(bad_words=((3,),))
    batch.apply(StepPlan((Admission(0, (1, 2), 1, sampling, end_token_ids=(4,), min_tokens=9),), (), ()))
    for only in (3, 4):
        logits = torch.zeros(1, VOCAB_SIZE)
        adjust_logits(logits, batch.sampling, batch.token_ids, np.array([0]), torch.tensor([2]))
        apply_token_mask(logits, torch.tensor([0]), torch.tensor([[1 << only]], dtype=torch.int32))
        assert int(logits.argmax()) == only and bool(torch.isfinite(logits[0, only]))
