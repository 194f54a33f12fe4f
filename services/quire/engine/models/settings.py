"""A model's settings as a checkpoint states them; what is missing or unusable is named with its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quire.service.errors import ModelError


class Settings:
    """Values by the names that Hugging Face's config.json has for them; nested ones as "rope_parameters.factor".

    `spelling` has the file's own names where they differ: errors use those. A null is a value that is not there.
    `eos_token_ids` end a turn.
    """

    def __init__(
        self,
        path: Path,
        values: Mapping[str, Any],
        spelling: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.eos_token_ids = tuple(eos_token_ids)
        self._path = path
        self._values = {name: value for name, value in values.items() if value is not None}
        self._spelling = spelling or {}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def text(self, name: str, default: str | None = None) -> str:
        """A string; raises ModelError if it is another kind of value, or missing and has no default."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.error(name, "must be a string")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer; raises ModelError as `text` does."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.error(name, "must be a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; raises ModelError as `text` does."""
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.error(name, "must be a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; raises ModelError as `text` does."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; raises ModelError as `text` does."""
        value = self._get(name, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, "must be a list of strings")
        return tuple(value)

    def require(self, name: str, supported: Any, fix: str = "") -> None:
        """Raises ModelError unless the value is `supported` or missing."""
        if self._values.get(name, supported) != supported:
            raise self.error(name, f"only {supported} is supported{fix}")

    def error(self, name: str, problem: str) -> ModelError:
        """An error about a value that is there."""
        return ModelError(
            f"{self._path} has {self._spelling.get(name, name)} = {self._values[name]!r}: {problem}", field="model"
        )

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name, default)
        if value is None:
            raise ModelError(
                f"{self._path} lacks {self._spelling.get(name, name)}: the model's export is incomplete, "
                "download or convert it again",
                field="model",
            )
        return value
