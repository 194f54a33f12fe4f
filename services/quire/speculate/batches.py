"""Dialogues as batches of tensors: of about the same length, and of about the same number of tokens."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quire.speculate.dialogues import Dialogue

# Lengths are multiples of it: matrix units of a GPU want that.
_PADDING = 16


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded at the end. `wanted[b, p]` is whether token p of b is one that the target wrote."""

    token_ids: Tensor  # int64 [batch, length]
    wanted: Tensor  # bool [batch, length]
    before: Tensor  # int64 [N], where in [batch × length] a token stands whose next one is wanted

    @classmethod
    def of(cls, dialogues: Sequence[Dialogue], max_length: int) -> Batch:
        """What is longer than `max_length` is cut."""
        length = min(max_length, max(len(dialogue.token_ids) for dialogue in dialogues))
        padded = -(-length // _PADDING) * _PADDING
        # Python's own buffers: a tensor made of each list takes ten times as long.
        ids, marks = array("q", bytes(8 * len(dialogues) * padded)), bytearray(len(dialogues) * padded)
        for row, dialogue in enumerate(dialogues):
            kept, start = array("q", dialogue.token_ids[:length]), row * padded
            ids[start : start + len(kept)] = kept
            for begin, end in dialogue.spans:
                size = max(0, min(end, length) - begin)
                marks[start + begin : start + begin + size] = b"\x01" * size
        token_ids = torch.frombuffer(ids, dtype=torch.int64).view(-1, padded)
        wanted = torch.frombuffer(marks, dtype=torch.bool).view(-1, padded)
        before = F.pad(wanted[:, 1:], (0, 1)).flatten().nonzero().squeeze(1)
        return cls(token_ids, wanted, before)

    def to(self, device: torch.device) -> Batch:
        """The same on `device`; a GPU is not waited for."""
        tensors = (self.token_ids, self.wanted, self.before)
        if device.type == "cuda":
            return Batch(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors))
        return Batch(*(tensor.to(device) for tensor in tensors))


def batches(
    dialogues: Sequence[Dialogue], max_tokens: int, max_length: int, rng: random.Random
) -> Iterator[list[Dialogue]]:
    """All dialogues once, in batches of at most `max_tokens` with padding, in random order."""
    # Sorted within a pool only, so that batches differ from one epoch to the next.
    order = rng.sample(list(dialogues), len(dialogues))
    found: list[list[Dialogue]] = []
    pool_size = 4096
    for start in range(0, len(order), pool_size):
        found.append([])
        for dialogue in sorted(order[start : start + pool_size], key=lambda d: len(d.token_ids)):
            length = min(len(dialogue.token_ids), max_length)
            if found[-1] and (len(found[-1]) + 1) * length > max_tokens:
                found.append([])
            found[-1].append(dialogue)
    rng.shuffle(found)
    yield from (batch for batch in found if batch)


def most_written(dialogues: Iterable[Dialogue], count: int, vocab_size: int) -> tuple[Tensor, float]:
    """The `count` tokens that the target wrote most often, int64, ascending, and their share of all that it wrote.

    Tokens that it never wrote make up the number, the first ones first.
    """
    written = _written(dialogues)
    chosen = [token for token, _ in written.most_common(count)]
    if len(chosen) < count:
        known = set(chosen)
        chosen += [token for token in range(vocab_size) if token not in known][: count - len(chosen)]
    return torch.tensor(sorted(chosen), dtype=torch.int64), _share(written, chosen)


def share_of(dialogues: Iterable[Dialogue], token_ids: Tensor) -> float:
    """How much of what the target wrote is among `token_ids`."""
    return _share(_written(dialogues), token_ids.tolist())


def _written(dialogues: Iterable[Dialogue]) -> Counter[int]:
    return Counter(chain.from_iterable(d.token_ids[begin:end] for d in dialogues for begin, end in d.spans))


def _share(written: Counter[int], chosen: Iterable[int]) -> float:
    return sum(written[token] for token in chosen) / max(1, written.total())
