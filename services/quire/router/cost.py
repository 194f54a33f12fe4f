"""The routing decision in numbers: how long a request would wait for its first token on an engine.

Called by the core for every engine and request; pure functions of what is known. There are no thresholds and no
weights: each term is a time, and a long queue outweighs a cached prefix exactly when waiting takes longer than
computing.
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.service.pages import PAGE_SIZE

# Before any engine has measured anything, all are equal and the absolute numbers hardly matter.
FIRST_GUESS_PREFILL_TOKENS_PER_SECOND = 1000.0
FIRST_GUESS_OUTPUT_TOKENS = 128.0


@dataclass(frozen=True, slots=True)
class EngineView:
    """What an engine last reported, plus what it has been sent since and can't have reported yet.

    `prefill_tokens_per_second` and `decode_step_seconds` are 0 until the engine has measured them; `max_num_seqs` 0
    and `pages_total` 0 mean not known, hence not short. `decode_tokens_per_step` is how many tokens a sequence draws in
    a step, more than one where drafts are accepted; 0 is not known, hence one.
    """

    running: int = 0
    waiting: int = 0
    pending_prefill_tokens: int = 0
    pages_total: int = 0
    pages_available: int = 0
    max_num_seqs: int = 0
    prefill_tokens_per_second: float = 0.0
    decode_step_seconds: float = 0.0
    decode_tokens_per_step: float = 0.0


@dataclass(frozen=True, slots=True)
class Expectations:
    """What holds for all engines: the speed of one that has not measured its own, and how long outputs get."""

    prefill_tokens_per_second: float = FIRST_GUESS_PREFILL_TOKENS_PER_SECOND
    output_tokens: float = FIRST_GUESS_OUTPUT_TOKENS


def expected_ttft(view: EngineView, uncached_tokens: int, expectations: Expectations) -> float:
    """Seconds until the first token of a prompt of which the engine has to compute `uncached_tokens`.

    The sum of

    - prefill: the tokens that the engine has still to compute for others, and these, at the speed it has learned;
    - the step in progress, of which half is over on average, if anything is running;
    - queueing, if slots or pages are short: the number of running requests that must end before this one and those
      waiting before it fit, times the mean time between two ends. A request runs for as many steps as
      `expectations.output_tokens` take at `view.decode_tokens_per_step`, and `view.running` of them run side by side,
      so one ends every steps / running steps.
    """
    speed = view.prefill_tokens_per_second or expectations.prefill_tokens_per_second
    tokens = view.pending_prefill_tokens + uncached_tokens
    seconds = tokens / speed
    if view.running and view.decode_step_seconds:
        steps_between_ends = expectations.output_tokens / (view.decode_tokens_per_step or 1.0) / view.running
        ends = max(_ends_until_a_slot(view), _ends_until_pages(view, tokens))
        seconds += view.decode_step_seconds * (0.5 + ends * steps_between_ends)
    return seconds


def _ends_until_a_slot(view: EngineView) -> float:
    if not view.max_num_seqs:
        return 0.0
    return max(0, view.running + view.waiting + 1 - view.max_num_seqs)


def _ends_until_pages(view: EngineView, tokens: int) -> float:
    missing = -(-tokens // PAGE_SIZE) - view.pages_available
    if missing <= 0 or view.pages_available >= view.pages_total:
        return 0.0
    # Each request that ends gives back its share of the pages in use.
    return missing * view.running / (view.pages_total - view.pages_available)
