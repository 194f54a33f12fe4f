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
from quire.engine.plan import Admission, StepPlan, Work  # noqa: E402
from quire.kernels.adjust import adjust_logits_triton, new_scratch  # noqa: E402
from quire.kernels.logprobs import new_logprobs, report_triton  # noqa: E402
from quire.service.request import SamplingParams  # noqa: E402

VOCAB_SIZE, NUM_SLOTS, LENGTH = 50, 3, 24

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
    history = tuple(draw(st.lists(tokens, min_size=2, max_size=LENGTH - 2)))
    return Admission(
        slot,
        history,
        draw(st.integers(1, len(history))),
        draw(samplings),
        tuple(draw(st.lists(tokens, min_size=1, max_size=3, unique=True))),
        draw(st.sampled_from([0, 0, 4])),
        draw(st.sampled_from([None, None, 0, 2])),
    )


def stage(batch: GpuBatch, admitted: list[Admission]) -> None:
    work = tuple(Work(one.slot, 0, len(one.token_ids), sample=True) for one in admitted)
    batch.stage(StepPlan(tuple(admitted), (), work))


@settings(max_examples=examples(15, 60), deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_slots_on_the_device_say_what_the_host_says(data: st.DataObject, seed: int) -> None:
    """Without it a request on a GPU loses a penalty or a ban, or is under those of whoever had its slot before."""
    torch.manual_seed(seed)
    batch = GpuBatch(NUM_SLOTS, LENGTH, torch.device(DEVICE))
    # Twice, so that slots change hands.
    for _ in range(2):
        admitted = [data.draw(admissions(slot)) for slot in data.draw(st.permutations(range(NUM_SLOTS)))]
        stage(batch, admitted)
    logits = torch.randn(NUM_SLOTS, VOCAB_SIZE) * 3
    slots, positions = batch.columns.drawing_slots[:NUM_SLOTS], batch.columns.positions[:NUM_SLOTS]
    expected = logits.clone()
    order = np.array([one.slot for one in admitted])
    adjust_logits(expected, batch.sampling, batch.token_ids.cpu(), order, positions.cpu().to(torch.int64))
    adjusted = logits.clone().to(DEVICE)
    scratch = new_scratch(2, VOCAB_SIZE, adjusted.device)
    adjust_logits_triton(adjusted, slots, positions, batch.token_ids, batch.adjustments, scratch)
    # What is forbidden twice may lose as much as for once: all of it is out of reach.
    torch.testing.assert_close(adjusted.cpu().clamp_min(-1e8), expected.clamp_min(-1e8), rtol=1e-5, atol=1e-5)
    assert not scratch.any()

    chosen = torch.randint(0, VOCAB_SIZE, (NUM_SLOTS,), device=DEVICE)
    out = new_logprobs(NUM_SLOTS, 2, adjusted.device)
    report_triton(logits.to(DEVICE), slots, chosen, batch.num_logprobs, out)
    found = find(logits, chosen.cpu(), 2)
    for row, one in enumerate(admitted):
        if one.logprobs is None:
            assert batch.num_logprobs[one.slot] == -1
            continue
        assert out.ranks[row] == found.ranks[row]
        assert out.top_tokens[row, : one.logprobs].tolist() == found.top_tokens[row, : one.logprobs].tolist()
        torch.testing.assert_close(out.chosen[row].cpu(), found.chosen[row], rtol=0, atol=1e-4)
