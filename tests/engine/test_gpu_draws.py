"""What admissions put on the device decides a draw there as the host's state does on a CPU: the kernels that a GPU's
graphs run, over the batch's own memory, against `quire.engine.adjust` and `quire.engine.logprobs`."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_testing import DEVICE, examples, need_triton

need_triton()

from quire.engine.adjust import adjust_logits  # noqa: E402
from quire.engine.gpu.batch import GpuBatch  # noqa: E402
from quire.engine.logprobs import find  # noqa: E402
from quire.engine.plan import Admission, Drafts, StepPlan, Work  # noqa: E402
from quire.kernels.adjust import adjust_logits_triton, new_scratch  # noqa: E402
from quire.kernels.logprobs import new_logprobs, report_triton  # noqa: E402
from quire.service.request import SamplingParams  # noqa: E402

VOCAB_SIZE, NUM_SLOTS, LENGTH, MOST_DRAFTS = 50, 3, 24, 3

tokens = st.integers(0, VOCAB_SIZE - 1)
samplings = st.builds(
    SamplingParams,
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.25]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.5]),
    logit_bias=st.lists(tokens, max_size=3, unique=True).map(lambda found: tuple((t, 1.0 + t) for t in found)),
    bad_words=st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=3, unique=True).map(tuple),
)


@st.composite
def admissions(draw: st.DrawFn, slot: int) -> Admission:
    history = tuple(draw(st.lists(tokens, min_size=2, max_size=LENGTH - 1 - MOST_DRAFTS)))
    return Admission(
        slot,
        history,
        draw(st.integers(1, len(history))),
        draw(samplings),
        tuple(draw(st.lists(tokens, min_size=1, max_size=3, unique=True))),
        draw(st.sampled_from([0, 0, 4])),
        draw(st.sampled_from([None, None, 0, 2])),
    )


def stage(batch: GpuBatch, admitted: list[Admission], drafted: list[tuple[int, ...]]) -> None:
    """Each sequence is computed whole, and so many drafts behind it."""
    work = tuple(
        Work(one.slot, 0, len(one.token_ids) + len(drafts), sample=True, num_drafts=len(drafts))
        for one, drafts in zip(admitted, drafted, strict=True)
    )
    plans = zip(admitted, drafted, strict=True)
    behind = tuple(Drafts(one.slot, len(one.token_ids), drafts) for one, drafts in plans if drafts)
    batch.stage(StepPlan(tuple(admitted), (), work, behind))


@settings(max_examples=examples(15, 60), deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_slots_on_the_device_say_what_the_host_says(data: st.DataObject, seed: int) -> None:
    """Without it a request on a GPU loses a penalty or a ban, or is under those of whoever had its slot before; and a
    draw in front of a draft is under what counts the drafts before it, and no other."""
    torch.manual_seed(seed)
    batch = GpuBatch(NUM_SLOTS, LENGTH, torch.device(DEVICE), NUM_SLOTS * MOST_DRAFTS)
    drafted = [tuple(data.draw(st.lists(tokens, max_size=MOST_DRAFTS))) for _ in range(NUM_SLOTS)]
    # Twice, so that slots change hands.
    for _ in range(2):
        admitted = [data.draw(admissions(slot)) for slot in data.draw(st.permutations(range(NUM_SLOTS)))]
        stage(batch, admitted, drafted)
    rows = [
        (one, drafts[:count]) for one, drafts in zip(admitted, drafted, strict=True) for count in range(len(drafts) + 1)
    ]
    logits = torch.randn(len(rows), VOCAB_SIZE) * 3
    slots, positions = batch.columns.drawing_slots[: len(rows)], batch.columns.positions[: len(rows)]
    expected = logits.clone()
    for row, (one, before) in enumerate(rows):
        history = [*one.token_ids, *before]
        # As if nothing but this row's own history had ever been in its slot.
        own = torch.zeros(NUM_SLOTS, LENGTH + 1, dtype=torch.int64)
        own[one.slot, : len(history)] = torch.tensor(history)
        slot, length = np.array([one.slot]), torch.tensor([len(history)])
        adjust_logits(expected[row : row + 1], batch.sampling, own, slot, length)
    adjusted = logits.clone().to(DEVICE)
    scratch = new_scratch(2, VOCAB_SIZE, adjusted.device)
    adjust_logits_triton(adjusted, slots, positions, batch.token_ids, batch.adjustments, scratch)
    # What is forbidden twice may lose as much as for once: all of it is out of reach.
    torch.testing.assert_close(adjusted.cpu().clamp_min(-1e8), expected.clamp_min(-1e8), rtol=1e-5, atol=1e-5)
    assert not scratch.any()

    chosen = torch.randint(0, VOCAB_SIZE, (len(rows),), device=DEVICE)
    out = new_logprobs(len(rows), 2, adjusted.device)
    report_triton(logits.to(DEVICE), slots, chosen, batch.num_logprobs, out)
    found = find(logits, chosen.cpu(), 2)
    for row, (one, _) in enumerate(rows):
        if one.logprobs is None:
            assert batch.num_logprobs[one.slot] == -1
            continue
        assert out.ranks[row] == found.ranks[row]
        assert out.top_tokens[row, : one.logprobs].tolist() == found.top_tokens[row, : one.logprobs].tolist()
        torch.testing.assert_close(out.chosen[row].cpu(), found.chosen[row], rtol=0, atol=1e-4)
