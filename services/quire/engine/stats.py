"""What the engine learns of itself: speeds for the router's cost model, counts for metrics."""

from __future__ import annotations

from dataclasses import dataclass

from quire.engine.plan import StepPlan

# Weight of the newest step in the moving averages: about the last ten steps count.
_NEWEST = 0.1


@dataclass(slots=True)
class EngineStats:
    """Updated by the core after each step; times are in seconds."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0
    prefill_tokens_per_second: float = 0.0
    decode_step_seconds: float = 0.0
    last_step_seconds: float = 0.0
    last_step_tokens: int = 0

    def record_start(self, num_prompt_tokens: int, cached_tokens: int) -> None:
        """A request was scheduled for the first time."""
        self.prompt_tokens += num_prompt_tokens
        self.cached_prompt_tokens += cached_tokens

    def record_step(self, plan: StepPlan, seconds: float) -> None:
        """A step ran. Its speed counts as prefill if most of its tokens were, as decode if all were."""
        num_tokens = sum(work.count for work in plan.work)
        num_prefill = sum(work.count for work in plan.work if work.count > 1)
        self.steps += 1
        self.computed_tokens += num_tokens
        self.output_tokens += sum(work.sample for work in plan.work)
        self.last_step_seconds, self.last_step_tokens = seconds, num_tokens
        # Short prompts say more about a step's fixed cost than about the speed of a long one.
        if num_prefill >= 32 and num_prefill * 2 > num_tokens:
            self.prefill_tokens_per_second = _blend(self.prefill_tokens_per_second, num_prefill / seconds)
        elif num_prefill == 0:
            self.decode_step_seconds = _blend(self.decode_step_seconds, seconds)


def _blend(average: float, newest: float) -> float:
    return newest if average == 0.0 else average + _NEWEST * (newest - average)
