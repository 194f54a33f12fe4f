"""`LLM.metrics()`: after known work its numbers add up."""

from __future__ import annotations

from pathlib import Path

from quire.llm import LLM, SamplingParams


def test_numbers_add_up_after_known_work(checkpoint: Path) -> None:
    """Who tunes by these numbers must not be led astray: every token and every request is in them, once."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM(checkpoint, dtype="float32", max_model_len=128) as llm:
        before = llm.metrics()
        assert before.hit_rate == 0.0 and before.steps == 0 and before.first_token_seconds.mean == 0.0
        llm.generate([[5] * 40, [6] * 33], params, use_tqdm=False)
        llm.generate([[5] * 40], params, use_tqdm=False)
        metrics = llm.metrics()
    assert metrics.prompt_tokens == 113 and metrics.cached_prompt_tokens == 32
    assert metrics.hit_rate == 32 / 113
    assert metrics.output_tokens == 18 == metrics.first_token_seconds.count + metrics.inter_token_seconds.count
    assert metrics.first_token_seconds.count == metrics.queue_seconds.count == metrics.request_seconds.count == 3
    assert metrics.finished == {"stop": 0, "length": 3, "cancelled": 0, "error": 0}
    assert metrics.tokens_per_step.count == metrics.steps == metrics.step_seconds.count
    # Every output token but the last goes through the model, too.
    assert metrics.tokens_per_step.mean * metrics.steps == 113 - 32 + 15
    assert metrics.running == metrics.waiting == metrics.pages_used == metrics.preemptions == 0
    assert 0 < metrics.pages_cached < metrics.pages_total
    for times in (metrics.step_seconds, metrics.queue_seconds, metrics.first_token_seconds, metrics.request_seconds):
        assert times.count == sum(times.counts) and len(times.counts) == len(times.bounds) + 1 and times.mean > 0
    assert metrics.queue_seconds.mean < metrics.first_token_seconds.mean < metrics.request_seconds.mean
