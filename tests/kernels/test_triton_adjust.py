"""The Triton kernel of penalties, bias, bad words and min_tokens against its definition, interpreted and compiled."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import triton_testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_testing import DEVICE, FLOAT_TYPES, assert_close, examples, poison

triton_testing.need_triton()

from quire.kernels.adjust import Adjust, Adjustments, adjust_logits_triton, new_scratch  # noqa: E402

VOCAB_SIZE = 90
LONGEST = 4


@dataclass(frozen=True, slots=True)
class Asked:
    """What one row's request asks for, and its tokens."""

    prompt: list[int]
    output: list[int]
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)
    bad_words: list[list[int]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    min_tokens: int = 0

    @property
    def flags(self) -> int:
        chosen = (
            (Adjust.PENALTIES, (self.repetition, self.presence, self.frequency) != (1.0, 0.0, 0.0)),
            (Adjust.BIAS, self.bias),
            (Adjust.BAD_WORDS, self.bad_words),
            (Adjust.MIN_TOKENS, self.min_tokens),
        )
        return sum(int(flag) for flag, wanted in chosen if wanted)

    def forbidden(self) -> set[int]:
        found = set(self.ends) if len(self.output) < self.min_tokens else set()
        for word in self.bad_words:
            head = word[:-1]
            if len(head) <= len(self.output) and self.output[len(self.output) - len(head) :] == head:
                found.add(word[-1])
        return found


def definition(logits: Tensor, asked: Asked) -> Tensor:
    """One row, as its users know it, in the precision of `logits`."""
    out = logits.clone()
    for token in {*asked.prompt, *asked.output}:
        out[token] = out[token] / asked.repetition if out[token] > 0 else out[token] * asked.repetition
    for token in set(asked.output):
        out[token] -= asked.frequency * asked.output.count(token) + asked.presence
    for token, bias in asked.bias.items():
        out[token] += bias
    return out


def run(logits: Tensor, rows: list[Asked | None], scratch_rows: int) -> Tensor:
    """None pads the batch. What the slots of others hold is poison."""
    num_slots = len(rows) + 2
    slots = [-1 if row is None else len(rows) + 1 - index for index, row in enumerate(rows)]
    ints, floats = ({"dtype": dtype} for dtype in (torch.int32, torch.float32))
    most = max([1, *(len(row.prompt + row.output) for row in rows if row)])
    token_ids = poison(num_slots, most + 3, **ints)
    values = Adjustments(
        *(poison(num_slots, **ints) for _ in range(2)),
        *(poison(num_slots, **floats) for _ in range(3)),
        poison(num_slots, 3, **ints),
        poison(num_slots, 3, **floats),
        poison(num_slots, 5, LONGEST, **ints),
        poison(num_slots, 2, **ints),
        poison(num_slots, **ints),
    )
    for slot, row in zip(slots, rows, strict=True):
        if row is None:
            continue
        history = torch.tensor(row.prompt + row.output, **ints)
        token_ids[slot, : len(history)] = history.to(DEVICE)
        values.flags[slot] = row.flags
        values.num_prompt_tokens[slot] = len(row.prompt)
        values.repetition_penalty[slot] = row.repetition
        values.presence_penalty[slot] = row.presence
        values.frequency_penalty[slot] = row.frequency
        values.min_tokens[slot] = row.min_tokens
        for table, fill in ((values.bias_tokens, 0), (values.bias_values, 0), (values.bad_words, -1)):
            table[slot] = fill
        values.end_tokens[slot] = -1
        for index, (token, bias) in enumerate(row.bias.items()):
            values.bias_tokens[slot, index], values.bias_values[slot, index] = token, bias
        for index, word in enumerate(row.bad_words):
            values.bad_words[slot, index, LONGEST - len(word) :] = torch.tensor(word, device=DEVICE)
        for index, token in enumerate(row.ends):
            values.end_tokens[slot, index] = token
    out = logits.to(DEVICE, copy=True)
    lengths = [0 if row is None else len(row.prompt + row.output) for row in rows]
    scratch = new_scratch(scratch_rows, logits.shape[1], out.device)
    adjust_logits_triton(
        out, torch.tensor(slots, device=DEVICE), torch.tensor(lengths, device=DEVICE), token_ids, values, scratch
    )
    assert not scratch.any()
    return out


tokens = st.integers(0, 9)
asked = st.builds(
    Asked,
    prompt=st.lists(tokens, min_size=1, max_size=6),
    output=st.lists(tokens, max_size=8),
    repetition=st.sampled_from([1.0, 1.0, 1.3, 0.5]),
    presence=st.sampled_from([0.0, 0.0, 0.7, -1.0]),
    frequency=st.sampled_from([0.0, 0.0, 0.4]),
    bias=st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-50, 50, width=16), max_size=3),
    bad_words=st.lists(st.lists(tokens, min_size=1, max_size=LONGEST), max_size=5),
    ends=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2),
    min_tokens=st.integers(0, 4),
)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # float16 knows no -1e9
@settings(max_examples=examples(40, 300), deadline=None)
@given(
    rows=st.lists(st.none() | asked, min_size=1, max_size=4),
    dtype=st.sampled_from(FLOAT_TYPES),
    scratch_rows=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_each_row_is_adjusted_as_its_request_says(
    rows: list[Asked | None], dtype: torch.dtype, scratch_rows: int, seed: int
) -> None:
    """Without it penalties, biases and bans on a GPU may differ from a CPU's, or reach another request."""
    torch.manual_seed(seed)
    logits = (torch.randn(len(rows), VOCAB_SIZE) * 4).to(dtype)
    out = run(logits, rows, scratch_rows).cpu()
    for index, row in enumerate(rows):
        before = logits[index]
        if row is None:
            assert torch.equal(out[index], before)
            continue
        free = torch.ones(VOCAB_SIZE, dtype=torch.bool)
        free[list(row.forbidden())] = False
        assert (out[index][~free] < -60000).all() and (out[index][free] > -60000).all()
        exact, by_torch = definition(before.double(), row), definition(before.float(), row).to(dtype)
        assert_close(out[index][free], exact[free], by_torch[free])
        untouched = free.clone()
        untouched[[*row.prompt, *row.output, *row.bias]] = False
        assert torch.equal(out[index][untouched], before[untouched])


def test_long_histories() -> None:
    """Without it a token that recurs thousands of times in a history of several blocks may be penalized twice."""
    torch.manual_seed(0)
    prompt, output = torch.randint(0, 500, (1500,)).tolist(), torch.randint(200, 700, (2600,)).tolist()
    row = Asked(prompt, output, repetition=1.2, presence=0.3, frequency=0.01)
    logits = torch.randn(2, 1000)
    out = run(logits, [row, Asked(output, prompt, frequency=0.5)], 1).cpu()
    for index, each in enumerate((row, Asked(output, prompt, frequency=0.5))):
        exact = definition(logits[index].double(), each)
        assert_close(out[index], exact, definition(logits[index], each))


def test_what_does_not_fit_is_refused() -> None:
    """Without it another model's scratch is written past its end."""
    with pytest.raises(ValueError, match=r"scratch must be \[rows, 50\]"):
        ints = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
        values = Adjustments(*(ints[0] for _ in range(5)), ints, ints, ints.view(1, 1, 1), ints, ints[0])
        adjust_logits_triton(
            torch.zeros(1, 50, device=DEVICE), ints[0], ints[0], ints, values, new_scratch(1, 40, ints.device)
        )
