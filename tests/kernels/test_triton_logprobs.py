"""The Triton kernel that reports log-probabilities against float64, interpreted on a CPU and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
import triton_testing
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_testing import DEVICE, FLOAT_TYPES, assert_close, examples

triton_testing.need_triton()

from quire.kernels.logprobs import new_logprobs, report_triton  # noqa: E402

MOST = 7


@settings(max_examples=examples(20, 200), deadline=None)
@given(
    wanted=st.lists(st.sampled_from([-1, 0, 1, 3, MOST]), min_size=1, max_size=4),
    vocab_size=st.sampled_from([1, 5, 256, 300, 1000, 5000]),
    levels=st.sampled_from([0, 1, 3]),
    dtype=st.sampled_from(FLOAT_TYPES),
    seed=st.integers(0, 2**32),
)
def test_reports_are_those_of_float64(
    wanted: list[int], vocab_size: int, levels: int, dtype: torch.dtype, seed: int
) -> None:
    """Without it a user reads other probabilities, or other tokens beside them, than the model gave."""
    torch.manual_seed(seed)
    logits = torch.randn(len(wanted), vocab_size) * 4
    if levels:  # many equal ones
        logits = logits.clamp(-levels, levels).round()
    logits = logits.to(dtype)
    tokens = torch.randint(0, vocab_size, (len(wanted),))
    slots = torch.randperm(len(wanted) + 2)[: len(wanted)]
    num_top = torch.full((len(wanted) + 2,), 5)
    num_top[slots] = torch.tensor(wanted)
    out = new_logprobs(len(wanted), MOST, torch.device(DEVICE))
    for part in (out.chosen, out.ranks, out.top_tokens, out.top_logprobs):
        part.fill_(-77)
    report_triton(logits.to(DEVICE), slots.to(DEVICE), tokens.to(DEVICE), num_top.to(DEVICE), out)
    exact, by_torch = logits.double().log_softmax(-1), logits.float().log_softmax(-1)
    order = logits.float().sort(dim=-1, descending=True, stable=True).indices
    for row, count in enumerate(wanted):
        if count < 0:
            assert out.chosen[row] == -77 and out.ranks[row] == -77 and (out.top_tokens[row] == -77).all()
            continue
        token, count = int(tokens[row]), min(count, vocab_size)
        assert int(out.ranks[row]) == 1 + int((logits[row] > logits[row, token]).sum())
        assert out.top_tokens[row, :count].tolist() == order[row, :count].tolist()
        assert (out.top_tokens[row, count:] == -77).all() and (out.top_logprobs[row, count:] == -77).all()
        named = torch.cat((tokens[row : row + 1], order[row, :count]))
        found = torch.cat((out.chosen[row : row + 1], out.top_logprobs[row, :count])).cpu()
        # Where the chosen token is all but certain its own value is tiny: judge by the scale of the logits.
        scale = logits[row].double().abs().max().item() / max(exact[row][named].abs().max().item(), 1e-9)
        assert_close(found, exact[row][named], by_torch[row][named], slack=1e-6 * (1 + scale))


def test_rows_that_pad_the_batch_are_left_alone() -> None:
    """Without it a padding row reads some slot's wishes and a token that is none."""
    out = new_logprobs(2, MOST, torch.device(DEVICE))
    out.ranks.fill_(-77)
    slots = torch.tensor([-1, 0], device=DEVICE)
    tokens = torch.tensor([-77, -1], device=DEVICE)
    report_triton(torch.tensor([[1.0, 2.0]] * 2, device=DEVICE), slots, tokens, torch.tensor([1], device=DEVICE), out)
    assert out.ranks.tolist() == [-77, 2]
    assert out.top_tokens[1, 0] == 1


def test_logits_in_another_layout_are_refused() -> None:
    """Without it transposed logits give other probabilities and no error."""
    ints = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous along V"):
        report_triton(torch.zeros(9, 3, device=DEVICE).t(), ints, ints, ints, new_logprobs(3, 1, ints.device))
