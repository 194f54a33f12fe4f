"""The forward passes that a GPU's graphs are captured for, against the steps that they serve."""

from __future__ import annotations

import triton_testing
from hypothesis import given
from hypothesis import strategies as st

triton_testing.need_triton()

from quire.engine.device_batch import WorkColumns  # noqa: E402
from quire.engine.gpu.staged_step import Layout  # noqa: E402
from quire.engine.gpu.step_shapes import StepShape, StepShapes  # noqa: E402
from quire.engine.plan import Work  # noqa: E402
from quire.kernels.attention_worklist import AttentionLimits  # noqa: E402

NUM_SEQS, NUM_DRAFTS, NUM_TOKENS = 40, 60, 700


def laid_out(work: list[Work], grouped: bool) -> Layout:
    return Layout.of(WorkColumns.of(work), grouped=grouped)


@st.composite
def steps(draw: st.DrawFn) -> Layout:
    """Decodes, verifications and chunks within the limits of a batch."""
    work, drafts_left, tokens_left = [], NUM_DRAFTS, NUM_TOKENS
    kinds = draw(st.lists(st.sampled_from(["decode", "verification", "chunk"]), min_size=1, max_size=3, unique=True))
    for slot in range(draw(st.integers(1, NUM_SEQS))):
        kind = draw(st.sampled_from(kinds))
        num_drafts = min(draw(st.integers(1, 8)), drafts_left) if kind == "verification" else 0
        num_siblings = min(draw(st.integers(0, num_drafts)), drafts_left - num_drafts)
        count = 1 + num_drafts + num_siblings
        if kind == "chunk":
            count = draw(st.sampled_from([1, 2, 5, 9, 30, 200]))
        count = min(count, tokens_left - (NUM_SEQS - slot))
        if count < 1 + num_drafts + num_siblings:
            break
        sample = kind != "chunk" or draw(st.booleans())
        work.append(Work(slot, 10, count, sample, False, num_drafts, 0, 0, num_siblings))
        drafts_left -= num_drafts + num_siblings
        tokens_left -= count
    return laid_out(work, draw(st.booleans()))


def assert_serves(shape: StepShape, step: Layout) -> None:
    limits, counts = shape.limits, step.work.counts
    assert step.num_tokens <= limits.max_tokens
    assert len(counts) <= limits.max_seqs
    assert counts.max() <= limits.max_query_len
    num_chunks = int((counts > limits.decode_query_len).sum())
    assert num_chunks <= (limits.max_seqs if limits.max_chunks is None else limits.max_chunks)
    # Without logit rows each row of the step is drawn from, in its order.
    assert step.num_tokens == len(step.draws) if shape.num_logits is None else len(step.draws) <= shape.num_logits
    assert (shape.grouped, shape.trees) == (step.grouped, step.trees)


@given(step=steps(), verified=st.sampled_from([(1, 1), (4, 4), (8, 16)]), budget=st.sampled_from([48, 512, NUM_TOKENS]))
def test_each_step_is_served_by_a_graph_that_holds_it(step: Layout, verified: tuple[int, int], budget: int) -> None:
    """A step in a graph for fewer sequences, chunks or rows would leave tokens without attention, silently; one for
    which none is prepared stops all requests while it is captured."""
    shapes = StepShapes(NUM_SEQS, NUM_SEQS + NUM_DRAFTS, budget, verified, siblings=True)
    exact, captured = shapes.exact(step), shapes.captured(step)
    assert_serves(exact, step)
    assert exact.limits.max_tokens == step.num_tokens
    if captured is None:
        assert step.num_tokens > budget
        return
    assert_serves(captured, step)
    prepared = {shape for _, _, shape in shapes.all()}
    many = (captured.limits.max_chunks or 0) > 16
    assert captured in prepared or (step.work.any_drafts and (step.grouped or many))


def test_a_graph_for_few_prompts_has_no_room_for_many() -> None:
    """Each program that attention launches for a prompt that is not there waits for its turn, in each layer."""
    shapes = StepShapes(256, 256, 8192)
    few, many = ([Work(0, 0, 100, True)] + [Work(n, 0, size, True) for n in range(1, 101)] for size in (1, 3))
    assert shapes.captured(laid_out(few, False)) == StepShape(AttentionLimits(224, 224, 224, 1, 16), 224)
    assert shapes.captured(laid_out(many, False)) == StepShape(AttentionLimits(416, 256, 416, 1, 208), 256)
    assert shapes.captured(laid_out([Work(0, 0, 2100, True)], False)) is None
