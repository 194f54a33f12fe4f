"""What `kernel_speed.py` checks and times: kernels on inputs of published models' shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quire.kernels.rms_norm import add_rms_norm, rms_norm
from quire.kernels.rotary import rotary_table
from quire.kernels.rotary_and_write import HeadNorm, rotary_and_write
from quire.kernels.silu_and_mul import silu_and_mul
from quire.kernels.token_mask import apply_token_mask

PAGE_SIZE = 16
DTYPE = torch.bfloat16
EPS = 1e-5
# Inputs of a kernel take turns until this much has been touched: several times any GPU's L2 cache.
ROTATED_BYTES = 400e6
TOKENS = (1, 16, 256, 2048, 8192)


@dataclass(frozen=True, slots=True)
class Shape:
    """A published model's sizes, in elements."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    qk_norm: bool = False


SHAPES = (
    Shape("llama-8b", 4096, 14336, 32, 8, 128, 128256),
    Shape("llama-1b", 2048, 8192, 32, 8, 64, 128256),
    Shape("qwen3-0.6b", 1024, 3072, 16, 8, 128, 151936, qk_norm=True),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel on one input: what must move, how to launch it on each of several inputs, and whether it is right."""

    model: str
    detail: str
    num_bytes: float
    launches: list[Callable[[], object]]
    check: Callable[[], float]  # its error over torch's in the same precision: at most 2, or it is wrong
    flops: float = 0.0
    peers: dict[str, Callable[[], list[Callable[[], object]]]] = field(default_factory=dict)  # make others' launches


def turns(num_bytes: float) -> range:
    """How many sets of inputs take turns."""
    return range(max(1, min(48, int(ROTATED_BYTES / num_bytes) + 1)))


def error_ratio(out: Tensor, exact: Tensor, by_torch: Tensor) -> float:
    """The greatest error of `out` over that of torch in the same type; NaN and unwritten elements make it infinite."""
    error = (out.double() - exact).abs().max().item()
    allowed = (by_torch.double() - exact).abs().max().item()
    slack = 1e-6 * exact.abs().max().item()
    return error / (allowed + slack) if error == error else float("inf")


def random(*size: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*size, device="cuda", dtype=dtype)


def rms_norm_cases(shape: Shape) -> Iterator[Case]:
    weight = random(shape.hidden)
    for tokens in TOKENS:
        num_bytes = tokens * shape.hidden * (4 + 2)
        inputs = [random(tokens, shape.hidden, dtype=torch.float32) for _ in turns(num_bytes)]

        def check(x: Tensor = inputs[0]) -> float:
            def norm(x: Tensor) -> Tensor:
                return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.to(x.dtype)

            return error_ratio(rms_norm(x, weight, EPS, DTYPE), norm(x.double()), norm(x).to(DTYPE))

        launches = [lambda x=x: rms_norm(x, weight, EPS, DTYPE) for x in inputs]
        yield Case(shape.name, f"{tokens} tokens", num_bytes, launches, check)


def add_rms_norm_cases(shape: Shape) -> Iterator[Case]:
    weight = random(shape.hidden)
    for residual_dtype in (torch.float32, DTYPE) if shape is SHAPES[0] else (torch.float32,):
        for tokens in TOKENS:
            num_bytes = tokens * shape.hidden * (2 * residual_dtype.itemsize + 2 + 2)
            inputs = [
                (random(tokens, shape.hidden, dtype=residual_dtype), random(tokens, shape.hidden))
                for _ in turns(num_bytes)
            ]

            def check(residual: Tensor = inputs[0][0], x: Tensor = inputs[0][1]) -> float:
                def norm(x: Tensor) -> Tensor:
                    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.to(x.dtype)

                total = (residual.float() + x.float()).to(residual.dtype)
                kept = residual.clone()
                out = add_rms_norm(kept, x, weight, EPS, DTYPE)
                ratio = error_ratio(out, norm(total.double()), norm(total.float()).to(DTYPE))
                return ratio if torch.equal(kept, total) else float("inf")

            launches = [lambda r=r, x=x: add_rms_norm(r, x, weight, EPS, DTYPE) for r, x in inputs]
            residual_name = "f32" if residual_dtype is torch.float32 else "bf16"
            yield Case(shape.name, f"{tokens} tokens, {residual_name} residual", num_bytes, launches, check)


def silu_and_mul_cases(shape: Shape) -> Iterator[Case]:
    for tokens in TOKENS:
        num_bytes = tokens * shape.intermediate * 3 * 2
        inputs = [random(tokens, 2 * shape.intermediate) for _ in turns(num_bytes)]

        def check(x: Tensor = inputs[0]) -> float:
            def activate(x: Tensor) -> Tensor:
                gate, up = x.chunk(2, -1)
                return torch.nn.functional.silu(gate) * up

            return error_ratio(silu_and_mul(x), activate(x.double()), activate(x.float()).to(DTYPE))

        launches = [lambda x=x: silu_and_mul(x) for x in inputs]
        yield Case(shape.name, f"{tokens} tokens", num_bytes, launches, check)


def rotary_and_write_cases(shape: Shape) -> Iterator[Case]:
    size, num_positions = shape.head_size, 8192
    table = rotary_table(num_positions, 1.0 / 5e5 ** (torch.arange(0, size, 2) / size)).cuda()
    norm = HeadNorm(random(size), random(size), EPS) if shape.qk_norm else None
    for tokens in TOKENS:
        num_bytes = tokens * 2 * (shape.heads + 2 * shape.kv_heads) * size * 2
        pages = torch.empty(2, tokens // PAGE_SIZE + 4, shape.kv_heads, PAGE_SIZE, size, device="cuda", dtype=DTYPE)
        inputs = [random(tokens, shape.heads + 2 * shape.kv_heads, size) for _ in turns(num_bytes)]
        positions = torch.randint(0, num_positions, (tokens,), device="cuda")
        slots = torch.randperm(pages.shape[1] * PAGE_SIZE, device="cuda")[:tokens]

        def launch(x: Tensor, pages: Tensor = pages, positions: Tensor = positions, slots: Tensor = slots) -> Tensor:
            return rotary_and_write(x, positions, table, slots, pages[0], pages[1], norm)

        def check(
            x: Tensor = inputs[0],
            pages: Tensor = pages,
            positions: Tensor = positions,
            slots: Tensor = slots,
            launch: Callable[[Tensor], Tensor] = launch,
        ) -> float:
            pages.fill_(float("nan"))
            queries = launch(x)
            keys, values = (part[slots // PAGE_SIZE, :, slots % PAGE_SIZE] for part in pages)
            out = torch.cat((queries, keys, values), 1)
            exact, by_torch = (turned(x.to(dtype), table[positions].to(dtype), norm, shape) for dtype in PRECISIONS)
            return error_ratio(out, exact, by_torch.to(DTYPE))

        launches = [lambda x=x, launch=launch: launch(x) for x in inputs]
        yield Case(shape.name, f"{tokens} tokens", num_bytes, launches, check)


PRECISIONS = (torch.float64, torch.float32)


def turned(x: Tensor, turn: Tensor, norm: HeadNorm | None, shape: Shape) -> Tensor:
    """Queries, keys and values [T, heads + 2 kv_heads, D] as attention wants them, in x's type."""
    rotated, values = x[:, : shape.heads + shape.kv_heads], x[:, shape.heads + shape.kv_heads :]
    if norm is not None:
        weights = (norm.query_weight, norm.key_weight)
        weight = torch.cat(
            [w.to(x.dtype).expand(n, -1) for w, n in zip(weights, (shape.heads, shape.kv_heads), strict=True)]
        )
        rotated = rotated * torch.rsqrt(rotated.square().mean(-1, keepdim=True) + norm.eps) * weight
    rotated = rotated * turn[:, 0] + rotated.roll(shape.head_size // 2, -1) * turn[:, 1]
    return torch.cat((rotated, values), 1)


def token_mask_cases(shape: Shape) -> Iterator[Case]:
    words = -(-shape.vocab // 32)
    for rows in (1, 16, 64, 256):
        # A grammar forbids nearly everything, so nearly all logits are written; none is read.
        num_bytes = rows * (words * 4 + shape.vocab * 4)
        masks = torch.randint(-(2**31), 2**31, (3, rows, words), device="cuda", dtype=torch.int32)
        masks = masks[0] & masks[1] & masks[2] & (torch.rand(rows, words, device="cuda") < 0.05)
        index = torch.arange(rows, device="cuda")
        inputs = [random(rows, shape.vocab, dtype=torch.float32) for _ in turns(num_bytes)]

        def check(logits: Tensor = inputs[0], masks: Tensor = masks, index: Tensor = index) -> float:
            expected = logits.cpu()
            apply_token_mask(expected, index.cpu(), masks.cpu())
            apply_token_mask(logits, index, masks)
            return 0.0 if torch.equal(logits.cpu(), expected) else float("inf")

        launches = [lambda x=x, masks=masks, index=index: apply_token_mask(x, index, masks) for x in inputs]
        yield Case(shape.name, f"{rows} rows", num_bytes, launches, check)
