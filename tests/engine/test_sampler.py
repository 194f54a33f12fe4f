"""The sampler against a written-out reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.sampler import SamplingRows, sample, uniforms
from quire.kernels.token_mask import apply_token_mask


def rows(
    count: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    first_position: int = 0,
    seed: int = 1,
) -> SamplingRows:
    return SamplingRows(
        torch.full((count,), temperature),
        torch.full((count,), top_p),
        torch.full((count,), top_k, dtype=torch.int64),
        torch.full((count,), min_p),
        np.full(count, seed, dtype=np.uint64),
        np.arange(first_position, first_position + count, dtype=np.uint64),
    )


def reference(logits: list[float], temperature: float, top_p: float, top_k: int, min_p: float) -> list[float]:
    """The distribution that temperature, then min_p, top_k and top_p leave, step by step in Python floats."""
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    total = sum(weights)
    probabilities = [w / total for w in weights]
    order = sorted(range(len(logits)), key=lambda i: -probabilities[i])
    order = [i for i in order if probabilities[i] >= min_p * probabilities[order[0]]]
    if top_k:
        order = order[:top_k]
    mass = sum(probabilities[i] for i in order)
    kept, before = [], 0.0
    for i in order:
        if before >= top_p * mass:
            break
        kept.append(i)
        before += probabilities[i]
    total = sum(probabilities[i] for i in kept)
    return [probabilities[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [
        (1.0, 1.0, 0, 0.0),
        (0.7, 1.0, 0, 0.0),
        (1.5, 0.8, 0, 0.0),
        (1.0, 1.0, 3, 0.0),
        (1.3, 0.7, 5, 0.0),
        (1.0, 0.05, 0, 0.0),
        (2.0, 0.999, 0, 0.0),
        (1.0, 1.0, 0, 0.2),
        (1.5, 0.9, 0, 0.1),
        (2.0, 0.8, 6, 0.05),
        (1.0, 1.0, 0, 1.0),
    ],
)
def test_draws_follow_the_distribution(temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    """A wrong cut or a skewed draw changes what users get without any error: chi-square over 20,000 draws."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(7)) * 2
    draws = 20_000
    tokens = sample(logits.repeat(draws, 1), rows(draws, temperature, top_p, top_k, min_p))
    expected = reference(logits.tolist(), temperature, top_p, top_k, min_p)
    counts = torch.bincount(tokens, minlength=12).tolist()
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0.0)
    chi_square = sum((c - draws * p) ** 2 / (draws * p) for c, p in zip(counts, expected, strict=True) if p > 0.0)
    freedom = sum(p > 0.0 for p in expected) - 1
    # Beyond six standard deviations of the chi-square distribution.
    assert chi_square <= freedom + 6 * math.sqrt(2 * freedom) + 6


def test_a_wide_vocabulary_with_a_flat_distribution() -> None:
    """top_p over more tokens than are sorted at first must still cut at the right place."""
    logits = torch.zeros(1, 5000)
    tokens = sample(logits.repeat(4000, 1), rows(4000, top_p=0.5))
    assert len(set(tokens.tolist())) > 1200
    ranked = torch.zeros(5000).topk(5000).indices[:2501].tolist()
    assert set(tokens.tolist()) <= set(ranked)


def test_a_wide_vocabulary_and_a_low_bar() -> None:
    """min_p over more tokens than are sorted at first must leave out only what is below its bar."""
    logits = torch.zeros(5000)
    logits[:3000] = 1.0
    tokens = sample(logits.repeat(6000, 1), rows(6000, min_p=0.5, top_p=0.999))
    assert len(set(tokens.tolist())) > 2000
    assert int(tokens.max()) < 3000


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**31), others=st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_a_draw_depends_on_seed_and_position_alone(seed: int, position: int, others: int) -> None:
    """The same seed must give the same output whatever else is in the batch, and after a move."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, generator=generator)
    alone = sample(logits.unsqueeze(0).clone(), rows(1, 1.0, 0.9, 20, 0.05, position, seed))
    mixed = torch.cat([torch.randn(others, 40, generator=generator), logits.unsqueeze(0)])
    batch = rows(others + 1, 1.0, 0.9, 20, 0.05)
    batch.seed[-1], batch.position[-1] = seed, position
    batch.temperature[:others:2] = 0.0
    batch.top_k[:others] = 0
    assert sample(mixed, batch)[-1] == alone[0]


def test_uniforms_are_uniform() -> None:
    """Neighbouring seeds and positions must not give related numbers."""
    grid = np.arange(300, dtype=np.uint64)
    values = uniforms(np.repeat(grid, 300), np.tile(grid, 300))
    assert values.min() >= 0.0 and values.max() < 1.0
    counts, _ = np.histogram(values, bins=100)
    assert ((counts - 900) ** 2 / 900).sum() < 99 + 6 * math.sqrt(2 * 99)
    table = values.reshape(300, 300)
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.02


def test_greedy_rows_take_the_best_and_broken_rows_say_so() -> None:
    """NaN logits must end a request with an error, not with a token that looks right."""
    logits = torch.randn(4, 30)
    logits[1, 5] = float("nan")
    logits[2] = -torch.inf
    batch = rows(4, temperature=0.0)
    batch.temperature[3] = 1.0
    best = logits[0].argmax()
    tokens = sample(logits.clone(), batch)
    assert tokens[0] == best
    assert tokens[1] == -1 and tokens[2] == -1
    assert 0 <= tokens[3] < 30


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_only_allowed_tokens_are_drawn(data: st.DataObject) -> None:
    """A token that the grammar forbids must never be drawn, at any vocabulary width."""
    vocab_size = data.draw(st.integers(1, 100))
    count = data.draw(st.integers(1, 4))
    allowed = [data.draw(st.sets(st.integers(0, vocab_size - 1), min_size=1)) for _ in range(count)]
    masks = np.zeros((count, -(-vocab_size // 32)), dtype=np.uint32)
    for row, tokens in enumerate(allowed):
        for token in tokens:
            masks[row, token // 32] |= np.uint32(1 << (token % 32))
    logits = torch.randn(count + 1, vocab_size)
    free = logits[0].clone()
    apply_token_mask(logits, torch.arange(1, count + 1), torch.from_numpy(masks.view(np.int32)))
    assert torch.equal(logits[0], free)
    temperature = data.draw(st.sampled_from([0.0, 1.0]))
    drawn = sample(logits, rows(count + 1, temperature, top_k=data.draw(st.integers(0, 3)))).tolist()
    assert all(token in tokens for token, tokens in zip(drawn[1:], allowed, strict=True))
