"""Which part of a model a rank has (Shoeybi et al., "Megatron-LM", 2019).

Queries, keys, values, gate and up are cut by rows: by heads, and the feed-forward network's width. The products that
follow, output and down, are cut by columns, so their results are to be summed. The last product is cut by rows of the
vocabulary. Where there are fewer KV heads than ranks several ranks have the same one. All else is whole on each rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quire.engine.models.config import ModelConfig
from quire.engine.models.weights import LinearWeight, Weights
from quire.service.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of `rank`, 0 to `size` - 1."""

    rank: int
    size: int

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The model as this rank computes it; raises ConfigError if it can't be divided among so many."""
        if not _divides(self.size, whole):
            fits = ", ".join(str(size) for size in range(1, whole.num_heads + 1) if _divides(size, whole))
            raise ConfigError(
                f"--tensor-parallel-size is {self.size}, and the model has {whole.num_heads} heads, "
                f"{whole.num_kv_heads} of them for keys and values, and {whole.intermediate_size} rows in its "
                f"feed-forward network, which don't divide by it: choose one of {fits}",
                field="tensor_parallel_size",
            )
        return replace(
            whole,
            num_heads=whole.num_heads // self.size,
            num_kv_heads=max(1, whole.num_kv_heads // self.size),
            intermediate_size=whole.intermediate_size // self.size,
        )

    def vocabulary(self, vocab_size: int) -> range:
        """The tokens whose logits this rank computes: as many on each rank but for the last ones."""
        share = -(-vocab_size // self.size)
        return range(min(self.rank * share, vocab_size), min((self.rank + 1) * share, vocab_size))


def _divides(size: int, config: ModelConfig) -> bool:
    kv_heads = config.num_kv_heads
    heads = config.num_heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
    return heads and config.intermediate_size % size == 0


@dataclass(frozen=True, slots=True)
class _Span:
    """Of one dimension of a tensor in the checkpoint."""

    whole: int
    part: range


class ShardedWeights:
    """`quire.engine.models.weights.Weights` of one rank: layers ask for the shapes that `Shard.config` gives them.

    The last product's matrix is asked for whole, and comes as the rows of `Shard.vocabulary`.
    """

    def __init__(self, weights: Weights, whole: ModelConfig, shard: Shard) -> None:
        """`whole` is the model's configuration; raises ConfigError as `Shard.config` does."""
        self.settings = weights.settings
        self._weights = weights
        self._rank = shard.rank
        own = shard.config(whole)

        def span(all_of_it: int, first: int, count: int, width: int = 1) -> _Span:
            return _Span(all_of_it * width, range(first * width, (first + count) * width))

        heads = span(whole.num_heads, shard.rank * own.num_heads, own.num_heads, whole.head_size)
        first_kv_head = shard.rank * whole.num_kv_heads // shard.size
        kv_heads = span(whole.num_kv_heads, first_kv_head, own.num_kv_heads, whole.head_size)
        width = span(whole.intermediate_size, shard.rank * own.intermediate_size, own.intermediate_size)
        self._rows = {
            "q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads, "gate_proj": width, "up_proj": width,
            "lm_head": _Span(whole.vocab_size, shard.vocabulary(whole.vocab_size)),
        }  # fmt: skip
        self._columns = {"o_proj": heads, "down_proj": width}

    def vector(self, name: str, size: int) -> Tensor:
        """Float32 [size]. A bias that is added to what is summed over ranks is rank 0's, and nothing elsewhere."""
        part = _part(name)
        if part in self._columns:
            bias = self._weights.vector(name, size)
            return bias if self._rank == 0 else torch.zeros_like(bias)
        rows = self._rows.get(part, _Span(size, range(size)))
        return self._weights.vector(name, rows.whole)[rows.part.start : rows.part.stop]

    def matrix(self, name: str, rows: int, columns: int) -> LinearWeight:
        """[rows, columns], in the type it is stored in."""
        part = _part(name)
        row_span = self._rows.get(part, _Span(rows, range(rows)))
        column_span = self._columns.get(part, _Span(columns, range(columns)))
        return self._weights.part(name, (row_span.whole, column_span.whole), row_span.part, column_span.part)

    def part(self, name: str, shape: tuple[int, int], rows: range, columns: range) -> LinearWeight:
        """Of the checkpoint's matrix."""
        return self._weights.part(name, shape, rows, columns)

    def frequency_divisors(self, size: int) -> Tensor | None:
        """The checkpoint's."""
        return self._weights.frequency_divisors(size)

    def finish(self) -> None:
        """Raises ModelError if tensors are left that nobody asked for."""
        self._weights.finish()


def _part(name: str) -> str:
    """Of "model.layers.0.self_attn.q_proj.weight": q_proj."""
    return name.rsplit(".", 2)[-2]
