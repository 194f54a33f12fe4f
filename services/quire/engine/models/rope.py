"""Rotary frequencies, and the ways to stretch them over contexts longer than a model was first trained for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.engine.models.settings import Settings


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every position is divided by `factor` (Chen et al., "Extending Context Window of LLMs via Positional
    Interpolation", 2023)."""

    factor: float

    def stretch(self, inv_freq: Tensor) -> Tensor:
        """The stretched frequencies."""
        return inv_freq / self.factor


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Long waves are stretched by `factor`, short ones are left, those between change smoothly (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def stretch(self, inv_freq: Tensor) -> Tensor:
        """The stretched frequencies."""
        turns = self.original_context * inv_freq / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return inv_freq * (kept + (1.0 - kept) / self.factor)


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """As Llama3Scaling with bounds in turns over the original context, and queries and keys made longer by
    `attention_factor` (Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023)."""

    theta: float
    factor: float
    original_context: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def stretch(self, inv_freq: Tensor) -> Tensor:
        """The stretched frequencies."""
        last = 2 * len(inv_freq) - 1
        low = max(math.floor(self._index(self.beta_fast, len(inv_freq))), 0)
        high = min(math.ceil(self._index(self.beta_slow, len(inv_freq))), last)
        # A width of nothing would divide by zero; any small one makes the same step.
        stretched = ((torch.arange(len(inv_freq)) - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
        return inv_freq * (1.0 - stretched + stretched / self.factor)

    def _index(self, turns: float, num_pairs: int) -> float:
        """Which pair of elements turns so often over the original context."""
        return num_pairs * math.log(self.original_context / (turns * 2 * math.pi)) / math.log(self.theta)


@dataclass(frozen=True, slots=True)
class Rope:
    """How fast the pairs of a head's elements turn."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    @property
    def attention_factor(self) -> float:
        """By what cosines and sines are multiplied."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling) else 1.0

    def inverse_frequencies(self, head_size: int) -> Tensor:
        """Radians a position, float32 [head_size / 2]."""
        inv_freq = 1.0 / self.theta ** (torch.arange(0, head_size, 2).float() / head_size)
        return inv_freq if self.scaling is None else self.scaling.stretch(inv_freq)


def read_rope(settings: Settings) -> Rope:
    """From `rope_parameters`; raises ModelError for a kind that is not supported."""
    of = "rope_parameters."
    settings.require(f"{of}partial_rotary_factor", 1.0)
    theta = settings.number(f"{of}rope_theta", 10000.0)
    kind = settings.text(f"{of}rope_type", "default")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, LinearScaling(settings.number(f"{of}factor")))
    if kind == "llama3":
        scaling = Llama3Scaling(
            settings.number(f"{of}factor"),
            settings.number(f"{of}low_freq_factor"),
            settings.number(f"{of}high_freq_factor"),
            _original_context(settings),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise settings.error(f"{of}high_freq_factor", "must be more than low_freq_factor")
        return Rope(theta, scaling)
    if kind == "yarn":
        return Rope(theta, _read_yarn(settings, theta))
    raise settings.error(f"{of}rope_type", "supported are default, linear, llama3 and yarn")


def _read_yarn(settings: Settings, theta: float) -> YarnScaling:
    of = "rope_parameters."
    for name, supported in (("truncate", True), ("mscale", 0), ("mscale_all_dim", 0)):
        settings.require(f"{of}{name}", supported)
    factor = settings.number(f"{of}factor")
    return YarnScaling(
        theta,
        factor,
        _original_context(settings),
        settings.number(f"{of}attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0),
        settings.number(f"{of}beta_fast", 32.0),
        settings.number(f"{of}beta_slow", 1.0),
    )


def _original_context(settings: Settings) -> int:
    return settings.integer(
        "rope_parameters.original_max_position_embeddings", settings.integer("max_position_embeddings")
    )
