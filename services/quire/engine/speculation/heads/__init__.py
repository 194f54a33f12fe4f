"""Heads that come with the package, one folder for each model that they draft for; its README.md is the head's card."""

from __future__ import annotations

from pathlib import Path

from quire.engine.speculation.eagle.checkpoint import CONFIG_FILE


def shipped_head(model: str) -> Path | None:
    """The folder of the head for the model that the API calls `model`; None if there is none.

    A name says little: whether the head fits is seen when it is loaded.
    """
    path = Path(__file__).parent / model
    return path if (path / CONFIG_FILE).is_file() else None
