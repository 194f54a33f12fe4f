"""The progress bar of a call: prompts done, and tokens per second."""

from __future__ import annotations

import time
from types import TracebackType

from tqdm.auto import tqdm

_REDRAW_SECONDS = 0.1


class Progress:
    """Shows nothing if not `enabled`."""

    def __init__(self, num_prompts: int, *, enabled: bool) -> None:
        self._bar: tqdm[None] = tqdm(
            total=num_prompts, desc="Prompts", unit="prompt", dynamic_ncols=True, disable=not enabled or not num_prompts
        )
        self._began = self._drawn = time.perf_counter()
        self._prompt_tokens = 0
        self._output_tokens = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._draw()
        self._bar.close()

    def started(self, prompt_tokens: int) -> None:
        """An output of a prompt of that many tokens was begun."""
        self._prompt_tokens += prompt_tokens

    def stepped(self, output_tokens: int) -> None:
        """A step drew that many tokens."""
        self._output_tokens += output_tokens
        if time.perf_counter() - self._drawn >= _REDRAW_SECONDS:
            self._draw()
            self._bar.refresh()

    def done(self) -> None:
        """All outputs of a prompt have ended."""
        self._bar.update()

    def _draw(self) -> None:
        self._drawn = time.perf_counter()
        seconds = self._drawn - self._began
        rates = f"in {self._prompt_tokens / seconds:.0f} tok/s, out {self._output_tokens / seconds:.0f} tok/s"
        self._bar.set_postfix_str(rates, refresh=False)
