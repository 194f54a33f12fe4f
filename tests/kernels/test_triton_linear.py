"""The Triton kernel of products of few rows against float64, interpreted on a CPU and compiled on a GPU."""

from __future__ import annotations

from itertools import product as product_of

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import triton_testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_testing import DEVICE, FLOAT_TYPES, assert_close, examples, poison

triton_testing.need_triton()

import triton  # noqa: E402

from quire.kernels._triton import next_power_of_2  # noqa: E402
from quire.kernels.linear import SplitSpace, linear, linear_silu_and_mul, linear_triton  # noqa: E402
from quire.kernels.linear_tiles import TUNED, LinearTile, ResidentTile, WideTile, tile_for  # noqa: E402
from quire.kernels.linear_wide import Cut, linear_wide  # noqa: E402

# The interpreter of older versions has no tensor descriptors.
WITH_DESCRIPTORS = pytest.mark.skipif(
    DEVICE == "cpu" and triton.__version__ < "3.7", reason="its interpreter has no tensor descriptors"
)
ON_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def product(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    out = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if gated:
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    return out


def check(
    rows: int,
    columns: int,
    size: int,
    tile: LinearTile | WideTile,
    dtype: torch.dtype,
    gated: bool,
    biased: bool,
    dependent: bool,
) -> None:
    run = linear_wide if isinstance(tile, WideTile) else linear_triton
    x = torch.randn(rows, size + 3, device=DEVICE)[:, :size].to(dtype)
    x = torch.cat((x, poison(rows, 8, dtype=dtype)), 1)[:, :size]  # strided rows
    weight = (torch.randn((2 if gated else 1) * columns, size, device=DEVICE) / size**0.5).to(dtype)
    bias = torch.randn(columns, device=DEVICE) if biased else None
    space = SplitSpace.new(x.device)
    space.partials.fill_(float("nan"))
    exact = product(x.double(), weight.double(), bias, gated)
    by_torch = product(x, weight, bias, gated)
    # Where there are few outputs all may be small beside their terms, whose sum is rounded.
    terms = product(x.double().abs(), weight.double().abs(), bias.abs() if biased else None, gated)
    slack = max(1e-6, 2e-7 * (terms.max() / exact.abs().max()).item())
    for _ in range(2):
        out = run(x, weight, tile, bias, space, gated, dependent)
        assert_close(out, exact, by_torch, slack)
        assert not space.arrivals.any()


@settings(max_examples=examples(30, 20), deadline=None)
@given(
    rows=st.sampled_from([1, 2, 7, 16, 33, 64]),
    columns=st.sampled_from([1, 16, 40, 64, 130]),
    size=st.sampled_from([16, 64, 100, 256, 328]),
    tile=st.builds(
        LinearTile,
        columns=st.sampled_from([16, 32, 64]),
        depth=st.sampled_from([16, 32, 128]),
        stages=st.sampled_from([2, 4]),
        splits=st.sampled_from([1, 1, 2, 4]),
        swap=st.booleans(),
    ),
    dtype=st.sampled_from(FLOAT_TYPES),
    kind=st.sampled_from(["plain", "bias", "gated"]),
    dependent=st.booleans() if DEVICE == "cuda" else st.just(False),
    seed=st.integers(0, 2**32),
)
def test_products_equal_their_definition(
    rows: int,
    columns: int,
    size: int,
    tile: LinearTile,
    dtype: torch.dtype,
    kind: str,
    dependent: bool,
    seed: int,
) -> None:
    """Without it some shape's layers are off on a GPU, at its edges or where programs share K."""
    torch.manual_seed(seed)
    check(rows, columns, size, tile, dtype, kind == "gated", kind == "bias", dependent)


@WITH_DESCRIPTORS
@settings(max_examples=examples(40, 20), deadline=None)
@given(
    rows=st.sampled_from([1, 31, 33, 70, 100]),
    columns=st.sampled_from([1, 40, 64, 130]),
    size=st.sampled_from([16, 96, 200, 328]),
    tile=st.builds(
        WideTile,
        rows=st.sampled_from([16, 32, 64] if DEVICE == "cpu" else [64, 128]),
        columns=st.sampled_from([16, 32, 64]),
        depth=st.sampled_from([16, 64]),
        stages=st.sampled_from([2, 3]),
        warps=st.sampled_from([4, 8]),
        programs=st.integers(1, 40),
    ),
    dtype=st.sampled_from(FLOAT_TYPES),
    kind=st.sampled_from(["plain", "bias", "gated"]),
    dependent=st.booleans() if DEVICE == "cuda" else st.just(False),
    seed=st.integers(0, 2**32),
)
def test_products_of_more_rows_than_a_tile_has(
    rows: int,
    columns: int,
    size: int,
    tile: WideTile,
    dtype: torch.dtype,
    kind: str,
    dependent: bool,
    seed: int,
) -> None:
    """Without it a step of many sequences is off where programs meet within a tile, or at an edge of the product."""
    torch.manual_seed(seed)
    check(rows, columns, size, tile, dtype, kind == "gated", kind == "bias", dependent)


@WITH_DESCRIPTORS
@pytest.mark.parametrize(("rows", "programs"), [(64, 6), (64, 12), (64, 24), (90, 9), (90, 100)])
def test_programs_share_blocks_evenly(rows: int, programs: int) -> None:
    """Without it a part of the GPU waits for programs that have more to do, or a block is left out."""
    tile = WideTile(32, 16, 16, 2, 4, programs)
    columns, size = 96, 64
    cut = Cut.of(tile, rows, columns, size)
    blocks = cut.tiles * (size // tile.depth)
    assert cut.row_tiles == -(-rows // 32) and cut.tiles == 6
    assert cut.row_tiles * cut.programs <= programs
    assert (cut.programs - 1) * cut.share < blocks <= cut.programs * cut.share
    assert cut.parts == (cut.share % 4 != 0)
    torch.manual_seed(0)
    check(rows, columns, size, tile, torch.float16, False, False, DEVICE == "cuda")


@WITH_DESCRIPTORS
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "tile", [LinearTile(16, 32, 2, bulk=True), LinearTile(32, 64, 3, splits=2, swap=True, bulk=True)]
)
@pytest.mark.parametrize(("columns", "size"), [(64, 256), (40, 200)])
def test_blocks_that_the_memory_accelerator_brings(columns: int, size: int, tile: LinearTile, gated: bool) -> None:
    """Without it a tile past the end of W, or of its gates, computes with what lies there."""
    torch.manual_seed(0)
    check(5, columns, size, tile, torch.float16, gated, False, DEVICE == "cuda")


@pytest.mark.parametrize("dtype", [dtype for dtype in FLOAT_TYPES if dtype is not torch.float32])
@pytest.mark.parametrize("splits", [1, 2])
def test_logits_may_be_more_exact_than_what_they_come_from(splits: int, dtype: torch.dtype) -> None:
    """Without it large logits are rounded to bfloat16 on their way, and other tokens win."""
    torch.manual_seed(0)
    x, weight = ((torch.randn(size, 200, device=DEVICE)).to(dtype) for size in (5, 300))
    bias = torch.randn(300, device=DEVICE)
    exact, by_torch = F.linear(x.double(), weight.double(), bias.double()), F.linear(x.float(), weight.float(), bias)
    space, tile = SplitSpace.new(x.device), LinearTile(32, 64, 2, splits=splits)
    assert_close(linear_triton(x, weight, tile, bias, space, dtype=torch.float32), exact, by_torch, 1e-5)
    assert_close(linear(x, weight, bias, dtype=torch.float32), exact, by_torch, 1e-5)


@ON_GPU
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 64, 65, 128, 200, 320])
@pytest.mark.parametrize(("columns", "size"), [(4096, 4096), (6144, 4096), (1024, 3072), (4096, 14336), (3072, 1024)])
def test_the_tiles_in_use(rows: int, columns: int, size: int) -> None:
    """Without it the tile that a real layer gets may not fit the GPU, or may be wrong where those of other tests are
    right; and a product may read its input before the launch ahead of it has written it."""
    torch.manual_seed(0)
    space = SplitSpace.new(torch.device(DEVICE))
    weight = (torch.randn(2 * columns, size, device=DEVICE) / size**0.5).bfloat16()
    for gated, function, w in ((False, linear, weight[:columns]), (True, linear_silu_and_mul, weight)):
        graph, x = torch.cuda.CUDAGraph(), torch.zeros(rows, size, device=DEVICE, dtype=torch.bfloat16)
        source = torch.randn(rows, size, device=DEVICE)
        function(x, w, space=space, dependent=True)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            x.copy_(source * 2)
            out = function(x, w, space=space, dependent=True)
        for seed in range(3):
            torch.manual_seed(seed)
            source.normal_()
            graph.replay()
            inputs = (source * 2).bfloat16()
            assert_close(out, product(inputs.double(), w.double(), None, gated), product(inputs, w, None, gated))


def test_shapes_without_an_entry_get_a_tile_that_exists() -> None:
    """Without it an unusual model's layer asks for a tile that no kernel can have, or for more shared memory than a
    program gets, and the engine ends when that many requests run."""
    shapes = product_of((1, 100, 1024, 5000, 6144, 200000), (512, 1000, 16384), (1, 16, 17, 64), (False, True), (2, 4))
    for columns, size, rows, gated, element_size in shapes:
        tile = tile_for(rows, columns, size, gated, element_size)
        if tile is None:
            assert rows > 4 and columns * size < 8 << 20
            continue
        if isinstance(tile, ResidentTile):
            assert rows <= (16 if tile.dots else 2)
            assert tile.columns * next_power_of_2(size) * (2 if gated else 1) * element_size <= 512 * 32 * tile.warps
            continue
        assert isinstance(tile, LinearTile) and tile.stages >= 2
        lines = max(16, next_power_of_2(rows)) + tile.columns * (2 if gated else 1)
        assert lines * tile.depth * tile.stages * element_size <= 220 * 1024
    assert tile_for(65, 5000, 4096, False) is None
    assert tile_for(17, 4096, 64, False) is None


def test_what_the_table_has_fits() -> None:
    """Without it a step of some number of rows has no room for the parts of a product, and the engine ends."""
    space = SplitSpace.new(torch.device("cpu"))
    for (columns, size, gated), entries in TUNED.items():
        least = 1
        for most, tile in entries:
            assert most >= least
            if isinstance(tile, WideTile):
                halves = 2 if gated and tile.gated else 1
                lines = tile.rows + halves * tile.columns
                assert lines * tile.depth * tile.stages * 2 <= 227 * 1024
                cut_columns = columns * 2 if gated and not tile.gated else columns
                for rows in range(least, most + 1):
                    cut = Cut.of(tile, rows, cut_columns, size)
                    assert not cut.parts or cut.partials(tile, halves == 2) <= space.partials.numel()
                    assert cut.row_tiles * cut.tiles <= space.arrivals.numel()
            least = most + 1


def test_what_a_product_cannot_have_is_refused() -> None:
    """Without it a wrong layout becomes wrong numbers instead of an error that names it."""
    x, weight = torch.zeros(2, 64, device=DEVICE), torch.zeros(32, 64, device=DEVICE)
    with pytest.raises(ValueError, match=r"weight must be contiguous, \[N, 64\]"):
        linear_triton(x, weight.t().contiguous().t(), LinearTile(16, 16, 2))
    with pytest.raises(ValueError, match=r"\[N, 60\]"):
        linear_triton(x[:, :60], weight, LinearTile(16, 16, 2))
    with pytest.raises(ValueError, match="needs a SplitSpace of 2048 elements"):
        linear_triton(x, weight, LinearTile(16, 16, 2, splits=4))
    with pytest.raises(ValueError, match="power of two"):
        LinearTile(48, 64, 2)
    with pytest.raises(ValueError, match="at least 16"):
        LinearTile(8, 64, 2)
    with pytest.raises(ValueError, match="at most 256"):
        LinearTile(16, 512, 2, bulk=True)
    with pytest.raises(ValueError, match="needs a SplitSpace of"):
        linear_wide(x, weight, WideTile(16, 16, 16, 2, 4, 3))
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        linear_wide(x.new_zeros(2, 65)[:, :64], weight, WideTile(16, 16, 16, 2, 4, 1))
    with pytest.raises(ValueError, match="power of two from 16 to 256"):
        WideTile(16, 512, 16, 2, 4, 1)
    with pytest.raises(ValueError, match="must be programs"):
        WideTile(16, 16, 16, 2, 4, 0)
    assert linear_wide(x[:0], weight, WideTile(16, 16, 16, 2, 4, 1)).shape == (0, 32)
    assert linear(x, weight).shape == (2, 32)
    assert linear_silu_and_mul(x, weight).shape == (2, 16)
    assert linear_triton(x[:0], weight, LinearTile(16, 16, 2)).shape == (0, 32)
