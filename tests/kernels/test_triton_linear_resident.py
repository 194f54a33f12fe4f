"""The Triton kernel of products whose weights are in registers against float64, interpreted on a CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import triton_testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_testing import DEVICE, FLOAT_TYPES, assert_close, examples, poison

triton_testing.need_triton()

from quire.kernels.linear import SplitSpace, linear, normed_linear  # noqa: E402
from quire.kernels.linear_resident import NormInput, linear_resident  # noqa: E402
from quire.kernels.linear_tiles import ResidentTile, tile_for  # noqa: E402
from quire.kernels.rms_norm import add_rms_norm  # noqa: E402

ON_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
EPS = 1e-5


def product(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    out = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if gated:
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    return out


def most_moved(x: Tensor, weight: Tensor, gated: bool) -> float:
    """By how much an output moves at most if each of x does by its own size, to first order."""
    terms = F.linear(x.abs(), weight.abs())
    if gated:
        (gate, up), (gate_terms, up_terms) = F.linear(x, weight).chunk(2, -1), terms.chunk(2, -1)
        terms = 1.1 * up.abs() * gate_terms + F.silu(gate).abs() * up_terms
    return terms.max().item()


@settings(max_examples=examples(40, 30), deadline=None)
@given(
    rows=st.integers(1, 11),
    columns=st.sampled_from([1, 3, 16, 40]),
    size=st.sampled_from([1, 16, 64, 100, 200]),
    tile=st.one_of(
        st.builds(ResidentTile, st.sampled_from([1, 4, 16]), st.sampled_from([1, 4])),
        st.builds(ResidentTile, st.sampled_from([16, 32]), st.sampled_from([1, 4]), st.just(True)),
    ),
    dtype=st.sampled_from(FLOAT_TYPES),
    kind=st.sampled_from(["plain", "bias", "gated"]),
    normed=st.booleans(),
    dependent=st.booleans() if DEVICE == "cuda" else st.just(False),
    seed=st.integers(0, 2**32),
)
def test_products_equal_their_definition(
    rows: int,
    columns: int,
    size: int,
    tile: ResidentTile,
    dtype: torch.dtype,
    kind: str,
    normed: bool,
    dependent: bool,
    seed: int,
) -> None:
    """Without it some small model's layers are off at one request, at their edges or behind their norm."""
    torch.manual_seed(seed)
    gated = kind == "gated"
    x = torch.cat((torch.randn(rows, size, device=DEVICE).to(dtype), poison(rows, 8, dtype=dtype)), 1)[:, :size]
    weight = (torch.randn((2 if gated else 1) * columns, size, device=DEVICE) / size**0.5).to(dtype)
    bias = torch.randn(columns, device=DEVICE) if kind == "bias" else None
    inputs, norm = x, None
    if normed:
        stream = torch.randn(rows, size, device=DEVICE).to(dtype)
        kept = poison(rows, 2 * size, dtype=dtype)[:, size:]
        norm = NormInput(stream.clone(), torch.rand(size, device=DEVICE) + 0.5, EPS, kept)
        expected = stream.clone()
        inputs = add_rms_norm(expected, x, norm.weight, EPS, dtype)
    out, summed = linear_resident(x, weight, tile, bias, norm, gated, dependent)
    exact = product(inputs.double(), weight.double(), bias, gated)
    # Where the norm is the kernel's own, its roundings may fall on the other side of those in `inputs`.
    moves = max(2e-7, torch.finfo(dtype).eps if normed else 0.0) * most_moved(inputs.double(), weight.double(), gated)
    slack = max(1e-6, moves / exact.abs().max().item())
    assert_close(out, exact, product(inputs, weight, bias, gated), slack)
    assert (summed is None) == (norm is None)
    if norm is not None and summed is not None:
        assert norm.kept is not None
        assert torch.equal(summed, expected) and torch.equal(norm.kept, expected)
        assert torch.equal(norm.residual, stream)


@ON_GPU
@pytest.mark.parametrize("rows", [1, 2, 5, 16])
def test_a_chain_of_layers(rows: int) -> None:
    """Without it a product may read its input, or the residual stream, before the launch ahead of it has written it:
    launches overlap in a graph."""
    torch.manual_seed(0)
    size, wide = 576, 1536
    space = SplitSpace.new(torch.device(DEVICE))
    gate_ups = [(torch.randn(2 * wide, size, device=DEVICE) / size**0.5).bfloat16() for _ in range(8)]
    downs = [(torch.randn(size, wide, device=DEVICE) / wide**0.5).bfloat16() for _ in range(8)]
    weight = torch.rand(size, device=DEVICE) + 0.5
    assert isinstance(tile_for(rows, wide, size, True), ResidentTile)
    source = torch.randn(2, rows, size, device=DEVICE)

    def layers(space: SplitSpace | None) -> tuple[Tensor, Tensor]:
        residual, hidden = source.bfloat16().unbind()
        residual = residual.contiguous()
        for gate_up, down in zip(gate_ups, downs, strict=True):
            gated, residual = normed_linear(
                hidden, NormInput(residual, weight, EPS), gate_up, space=space, gated=True, dependent=True
            )
            hidden = linear(gated, down, space=space, dependent=True)
        return hidden, residual

    layers(space)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, stream = layers(space)
    for seed in range(3):
        torch.manual_seed(seed)
        source.normal_()
        graph.replay()
        expected, expected_stream = layers(None)
        # Roundings to bfloat16 add up over the layers.
        assert (out - expected).abs().max() <= 0.05 * expected.abs().max()
        assert (stream - expected_stream).abs().max() <= 0.05 * expected_stream.abs().max()


def test_what_a_product_cannot_have_is_refused() -> None:
    """Without it a wrong layout becomes wrong numbers instead of an error that names it."""
    x, weight = torch.zeros(2, 64, device=DEVICE), torch.zeros(32, 64, device=DEVICE)
    with pytest.raises(ValueError, match=r"residual must be contiguous, \[2, 64\]"):
        linear_resident(x, weight, ResidentTile(4), norm=NormInput(x[:1], weight[0], EPS))
    with pytest.raises(ValueError, match=r"what is kept must be \[2, 64\]"):
        linear_resident(x, weight, ResidentTile(4), norm=NormInput(x, weight[0], EPS, x[:1]))
    with pytest.raises(ValueError, match=r"\[N, 60\]"):
        linear_resident(x[:, :60], weight, ResidentTile(4))
    with pytest.raises(ValueError, match="power of two"):
        ResidentTile(6)
    assert linear_resident(x[:0], weight, ResidentTile(4))[0].shape == (0, 32)
