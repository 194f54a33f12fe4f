"""What `kernel_speed.py` checks and times of sampling: draws, adjustments, reports, on logits of real vocabularies.

The bytes of a draw are those of its logits, read once; those of adjustments none: rows without any must cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kernel_cases import DTYPE, Case, Shape, error_ratio, turns
from torch import Tensor

from quire.kernels.adjust import Adjust, Adjustments, adjust_logits_triton, new_scratch
from quire.kernels.logprobs import new_logprobs, report_triton
from quire.kernels.sample import SamplingParameters, sample_triton

HISTORY = 1024
# Name → temperature, top_p, top_k, min_p, spread of the logits: 6 is as peaked as a trained model's, 1 is flat.
DRAWS = {
    "greedy": (0.0, 1.0, 0, 0.0, 6.0),
    "temperature": (1.0, 1.0, 0, 0.0, 6.0),
    "top_k 50": (1.0, 1.0, 50, 0.0, 6.0),
    "top_p 0.95": (1.0, 0.95, 0, 0.0, 6.0),
    "top_k 50, top_p 0.9, min_p 0.02": (0.8, 0.9, 50, 0.02, 6.0),
    "top_p 0.9, flat": (1.0, 0.9, 0, 0.0, 1.0),
}


def inputs_of(rows: int, vocab: int, spread: float, dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.randn(rows, vocab, device="cuda").mul_(spread).to(dtype) for _ in turns(rows * vocab * dtype.itemsize)
    ]


def sample_cases(shape: Shape) -> Iterator[Case]:
    for rows in (1, 64, 256):
        slots = torch.arange(rows, device="cuda", dtype=torch.int32)
        positions = torch.full((rows,), 7, device="cuda", dtype=torch.int32)
        token_ids = torch.zeros(rows, 16, device="cuda", dtype=torch.int32)
        tokens = torch.empty(rows, device="cuda", dtype=torch.int32)
        for name, (temperature, top_p, top_k, min_p, spread) in DRAWS.items():
            parameters = SamplingParameters(
                *(torch.full((rows,), value, device="cuda") for value in (temperature, top_p)),
                torch.full((rows,), top_k, device="cuda", dtype=torch.int32),
                torch.full((rows,), min_p, device="cuda"),
                torch.arange(rows, device="cuda"),
            )
            inputs = inputs_of(rows, shape.vocab, spread, DTYPE)

            def launch(logits: Tensor, parameters: SamplingParameters = parameters) -> None:
                sample_triton(logits, slots, positions, parameters, token_ids, tokens)  # noqa: B023

            def check(logits: Tensor = inputs[0], greedy: bool = temperature == 0.0, launch=launch) -> float:
                launch(logits)
                best = logits.float().max(-1).values
                drawn = logits.float().gather(1, tokens.long().clamp_min(0)[:, None])[:, 0]  # noqa: B023
                right = (tokens >= 0).all() and (not greedy or torch.equal(drawn, best))  # noqa: B023
                return 0.0 if right else float("inf")

            launches = [lambda x=x, launch=launch: launch(x) for x in inputs]
            num_bytes = rows * shape.vocab * DTYPE.itemsize
            yield Case(shape.name, f"{rows} rows, {name}", num_bytes, launches, check)


def adjust_cases(shape: Shape) -> Iterator[Case]:
    for rows in (1, 256):
        for name, flags in (("none", 0), ("penalties", Adjust.PENALTIES), ("all", 15)):
            ints = {"device": "cuda", "dtype": torch.int32}
            values = Adjustments(
                torch.full((rows,), int(flags), **ints),
                torch.full((rows,), HISTORY // 2, **ints),
                *(torch.full((rows,), value, device="cuda") for value in (1.1, 0.5, 0.01)),
                torch.randint(shape.vocab, (rows, 8), **ints),
                torch.randn(rows, 8, device="cuda"),
                torch.full((rows, 4, 8), -1, **ints),
                torch.full((rows, 2), -1, **ints),
                torch.zeros(rows, **ints),
            )
            history = torch.randint(shape.vocab, (rows, HISTORY), **ints)
            slots, lengths = torch.arange(rows, **ints), torch.full((rows,), HISTORY, **ints)
            logits = torch.randn(rows, shape.vocab, device="cuda")
            scratch = new_scratch(64, shape.vocab, logits.device)

            def launch(
                x: Tensor = logits,
                slots: Tensor = slots,
                lengths: Tensor = lengths,
                history: Tensor = history,
                values: Adjustments = values,
                scratch: Tensor = scratch,
            ) -> None:
                adjust_logits_triton(x, slots, lengths, history, values, scratch)

            def check(scratch: Tensor = scratch) -> float:
                return float("inf") if scratch.any() else 0.0

            touched = rows * HISTORY * 12.0 if flags else 0.0
            yield Case(shape.name, f"{rows} rows, {name}", touched, [launch], check)


def logprobs_cases(shape: Shape) -> Iterator[Case]:
    for rows in (1, 64):
        for name, count in (("not asked", -1), ("top 20", 20)):
            slots = torch.arange(rows, device="cuda")
            num_top = torch.full((rows,), count, device="cuda", dtype=torch.int32)
            tokens = torch.zeros(rows, device="cuda", dtype=torch.int32)
            out = new_logprobs(rows, 20, slots.device)
            inputs = inputs_of(rows, shape.vocab, 4.0, DTYPE)

            def launch(
                x: Tensor, slots: Tensor = slots, num_top: Tensor = num_top, tokens: Tensor = tokens, out=out
            ) -> None:
                report_triton(x, slots, tokens, num_top, out)

            def check(x: Tensor = inputs[0], asked: bool = count > 0, out=out, launch=launch) -> float:
                launch(x)
                if not asked:
                    return 0.0
                exact, by_torch = (x.to(t).log_softmax(-1)[:, 0] for t in (torch.float64, torch.float32))
                return error_ratio(out.chosen, exact, by_torch)

            launches = [lambda x=x, launch=launch: launch(x) for x in inputs]
            num_bytes = rows * shape.vocab * DTYPE.itemsize if count > 0 else 0
            yield Case(shape.name, f"{rows} rows, {name}", num_bytes, launches, check)
