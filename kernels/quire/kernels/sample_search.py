"""Finds a token by its rank or by the mass before it, in descending order, without sorting a vocabulary.

Device functions of `quire.kernels.sample`. The order is by logit, and by token where logits are equal; a token's
*weight* is exp((logit - the row's greatest) / temperature), and what stands before it in that order is its count and
its mass. Two ways lead to these numbers:

- A few hundred candidates are compared pairwise (`collect`, `rank`).
- Where more matter, `narrow` first finds the values between which the wanted token lies, counting at eight values in
  each pass over the row, and the pairs are those of the tokens in between. (Idea: the pivots of FlashInfer's sampling,
  Ye et al., arXiv 2501.01005; but the result here is the inverse of the cumulative distribution, exactly.)
"""
# ruff: noqa: N803

from __future__ import annotations

from quire.kernels._triton import jit, tl


@jit
def collect(
    logits_ptr: tl.tensor,
    list_ptr: tl.tensor,
    values_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    maxima: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    vocab_size: tl.tensor,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
) -> tl.tensor:
    """Writes the logits in [low, high) and their tokens behind the pointers, and returns how many there are.

    Of more than CANDIDATES only so many are written. `list_ptr` has room for the row's blocks.
    """
    passing = maxima >= low
    entry = tl.cumsum(passing.to(tl.int32), 0) - 1
    tl.store(list_ptr + entry, tl.arange(0, PADDED), mask=passing)
    num_passing = tl.sum(passing.to(tl.int32), 0)
    tl.debug_barrier()
    count = 0
    for first in range(0, num_passing, TILE_BLOCKS):
        listed = first + tl.arange(0, TILE_BLOCKS)
        block = tl.load(list_ptr + listed, mask=listed < num_passing, other=0)
        token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (listed < num_passing)[:, None] & (token < vocab_size)
        x = tl.load(logits_ptr + token, mask=inside, other=float("-inf")).to(tl.float32)
        taken = tl.reshape(inside & (x >= low) & (x < high), (TILE_BLOCKS * BLOCK,))
        place = count + tl.cumsum(taken.to(tl.int32), 0) - 1
        written = taken & (place < CANDIDATES)
        tl.store(values_ptr + place, tl.reshape(x, (TILE_BLOCKS * BLOCK,)), mask=written)
        tl.store(tokens_ptr + place, tl.reshape(token, (TILE_BLOCKS * BLOCK,)), mask=written)
        count += tl.sum(taken.to(tl.int32), 0)
    tl.debug_barrier()
    return count


@jit
def rank(
    values_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    count: tl.tensor,
    best: tl.tensor,
    unit: tl.tensor,
    CANDIDATES: tl.constexpr,
) -> tl.tensor:
    """Tokens, weights, and the count and mass before each of `count` candidates; all [CANDIDATES].

    Past `count` the weights are 0 and the tokens -1.
    """
    at = tl.arange(0, CANDIDATES)
    x = tl.load(values_ptr + at, mask=at < count, other=float("-inf"))
    token = tl.load(tokens_ptr + at, mask=at < count, other=-1)
    before = tl.zeros((CANDIDATES,), tl.int32)
    mass = tl.zeros((CANDIDATES,), tl.float32)
    for first in range(0, count, 32):
        other = first + tl.arange(0, 32)
        y = tl.load(values_ptr + other, mask=other < count, other=float("-inf"))
        y_token = tl.load(tokens_ptr + other, mask=other < count, other=2147483647)
        same = (y[None, :] == x[:, None]) & (y_token[None, :] < token[:, None])
        earlier = (y[None, :] > x[:, None]) | same
        before += tl.sum(earlier.to(tl.int32), 1)
        mass += tl.sum(tl.where(earlier, tl.exp2((y - best) * unit)[None, :], 0.0), 1)
    return token, tl.exp2((x - best) * unit), before, mass


@jit
def narrow(
    logits_ptr: tl.tensor,
    best: tl.tensor,
    unit: tl.tensor,
    low: tl.tensor,
    target: tl.tensor,
    by_count: tl.tensor,
    strict: tl.tensor,
    vocab_size: tl.tensor,
    CANDIDATES: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Values [low, high) between which the last token lies that has less than `target` before it.

    `by_count`: the target is a number of tokens, else a mass. `strict`: the token may have just as much before it.
    Nothing below `low` counts, and a target past all that does is brought back to the last token of weight. Returns
    also the target, the count and mass of what is at least `high`, and how many lie between: at most CANDIDATES, or
    more that are all equal to `low`.
    """
    pivot = tl.arange(0, PIVOTS).to(tl.float32) / PIVOTS
    high = best + tl.maximum(tl.abs(best) * 2.384185791015625e-07, 1e-30)
    above_count = 0
    above_mass = best * 0.0
    inside = vocab_size + 0
    going = 1
    while going > 0:
        at = low + (high - low) * pivot
        counts = tl.zeros((PIVOTS, TILE), tl.int32)
        masses = tl.zeros((PIVOTS, TILE), tl.float32)
        for start in range(0, vocab_size, TILE):
            token = start + tl.arange(0, TILE)
            x = tl.load(logits_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
            reached = x[None, :] >= at[:, None]
            counts += reached.to(tl.int32)
            masses += tl.where(reached, tl.exp2((x - best) * unit)[None, :], 0.0)
        count = tl.sum(counts, 1)
        mass = tl.sum(masses, 1)
        reach = tl.where(by_count > 0, count.to(tl.float32), mass)
        most = tl.max(reach, 0)
        target = tl.minimum(target, tl.where(by_count > 0, most, most * (1.0 - 2.384185791015625e-07)))
        enough = (reach > target) | ((reach == target) & (strict == 0))
        low = tl.max(tl.where(enough, at, low), 0)
        high = tl.min(tl.where(enough, high, at), 0)
        above_count = tl.maximum(above_count, tl.max(tl.where(enough, 0, count), 0))
        above_mass = tl.maximum(above_mass, tl.max(tl.where(enough, 0.0, mass), 0))
        inside = tl.min(tl.where(enough, count, vocab_size), 0) - above_count
        # Until few are left, or no other value lies between.
        middle = low + (high - low) * 0.5
        going = ((inside > CANDIDATES) & (middle > low) & (middle < high)).to(tl.int32)
    return low, high, target, above_count, above_mass, inside


@jit
def nth_equal(
    logits_ptr: tl.tensor, value: tl.tensor, n: tl.tensor, vocab_size: tl.tensor, TILE: tl.constexpr
) -> tl.tensor:
    """The token that has n tokens with the same logit, `value`, before it."""
    found = -1
    seen = 0
    for start in range(0, vocab_size, TILE):
        token = start + tl.arange(0, TILE)
        x = tl.load(logits_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        equal = (x == value).to(tl.int32)
        here = seen + tl.cumsum(equal, 0) - 1
        found = tl.maximum(found, tl.max(tl.where((equal > 0) & (here == n), token, -1), 0))
        seen += tl.sum(equal, 0)
    return found


@jit
def draw_from_many(
    logits_ptr: tl.tensor,
    list_ptr: tl.tensor,
    values_ptr: tl.tensor,
    candidates_ptr: tl.tensor,
    maxima: tl.tensor,
    total: tl.tensor,
    best: tl.tensor,
    unit: tl.tensor,
    number: tl.tensor,
    lowest: tl.tensor,
    top_p: tl.tensor,
    top_k: tl.tensor,
    min_p: tl.tensor,
    vocab_size: tl.tensor,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> tl.tensor:
    """The draw in descending order where more than CANDIDATES matter: the ends of top_k and top_p, then the token."""
    mass = total
    if min_p > 0.0:
        mass = _mass_of_likely(logits_ptr, best, unit, min_p, vocab_size, 4096)
    token = -1
    stage = vocab_size * 0
    while stage < 3:
        wanted = (stage == 2) | ((stage == 0) & (top_k > 0)) | ((stage == 1) & (top_p < 1.0))
        if wanted:
            by_count = (stage == 0).to(tl.int32)
            strict = (stage == 2).to(tl.int32)
            # Short of all the mass, so that rounding draws nothing past its end.
            drawn = tl.minimum((number * mass.to(tl.float64)).to(tl.float32), mass * (1.0 - 2.384185791015625e-07))
            target = tl.where(stage == 0, top_k.to(tl.float32), tl.where(stage == 1, top_p * mass, drawn))
            low, high, target, above_count, above_mass, inside = narrow(
                logits_ptr, best, unit, lowest, target, by_count, strict, vocab_size, CANDIDATES, 8, 1024
            )
            if inside <= CANDIDATES:
                count = collect(
                    logits_ptr, list_ptr, values_ptr, candidates_ptr, maxima, low, high, vocab_size, BLOCK, PADDED,
                    CANDIDATES, 8,
                )  # fmt: skip
                tokens, weights, before, before_mass = rank(values_ptr, candidates_ptr, count, best, unit, CANDIDATES)
                before_mass += above_mass
                reach = tl.where(by_count > 0, (before + above_count).to(tl.float32), before_mass)
                eligible = (weights > 0.0) & ((reach < target) | ((reach == target) & (strict > 0)))
                last = tl.max(tl.where(eligible, before, 0), 0)
                is_last = (before == last) & (tokens >= 0)
                token = tl.max(tl.where(is_last, tokens, -1), 0)
                through = tl.max(tl.where(is_last, before_mass + weights, 0.0), 0)
            else:
                # All are equal.
                weight = tl.exp2((low - best) * unit)
                n = tl.where(by_count > 0, target - above_count - 1.0, (target - above_mass) / weight)
                n = tl.where((by_count > 0) | (strict > 0), tl.floor(n), tl.ceil(n) - 1.0)
                n = tl.minimum(tl.maximum(n, 0.0), inside - 1.0)
                token = nth_equal(logits_ptr, low, n.to(tl.int32), vocab_size, 4096)
                through = above_mass + (n + 1.0) * weight
            mass = tl.where(stage == 0, tl.minimum(mass, through), through)
        stage += 1
    return token


@jit
def _mass_of_likely(
    logits_ptr: tl.tensor, best: tl.tensor, unit: tl.tensor, min_p: tl.tensor, vocab_size: tl.tensor, TILE: tl.constexpr
) -> tl.tensor:
    """The mass of the tokens whose weight is at least min_p."""
    masses = tl.zeros((TILE,), tl.float32)
    for start in range(0, vocab_size, TILE):
        token = start + tl.arange(0, TILE)
        x = tl.load(logits_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        weights = tl.exp2((x - best) * unit)
        masses += tl.where(weights >= min_p, weights, 0.0)
    return tl.sum(masses, 0)
