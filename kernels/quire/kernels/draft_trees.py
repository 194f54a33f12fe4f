"""Drafts as a tree: a trunk, and beside its first tokens other choices, each of them a leaf.

A sequence's rows are its last token, the trunk's k tokens and s leaves, s ≤ k, each at the next place of its pages.
Leaf i (from 1) is another choice for trunk token i: it has that token's position, and sees what is before that, and
itself (Miao et al., "SpecInfer", ASPLOS 2024; Cai et al., "Medusa", ICML 2024). The trunk is verified as if it were
alone (`quire.kernels.drafts`). If its first wrong token is i, and leaf i is what was drawn instead, the leaf is put
into the trunk: its keys and values go to token i's place, and what was drawn after it counts as drawn after token i. So
whoever comes later sees a trunk of which i tokens are right, and no tree.
"""
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels._triton import jit, next_power_of_2, tl

# Draws of a trunk.
_MOST = 128


@dataclass(frozen=True, slots=True)
class DraftTrees:
    """Those of a step's S sequences, most of which may have no leaves."""

    num_drafts: Tensor  # int32 [S], tokens of the trunk
    num_siblings: Tensor  # int32 [S], leaves
    siblings: Tensor  # int32 [slots, any], each slot's leaves; a row's numbers contiguous


@dataclass(frozen=True, slots=True)
class LeafMoves:
    """Rows of a step: row sources[i] is to be where row targets[i] is; where there is nothing to do they are equal.

    No source is another's target.
    """

    sources: Tensor  # int32 [S]
    targets: Tensor  # int32 [S]


@dataclass(frozen=True, slots=True)
class PagedLayers:
    """The pages of all layers, keys and values, for a kernel that writes to all of them."""

    addresses: Tensor  # int64 [2 × layers], where each tensor of pages begins
    num_kv_heads: int
    page_size: int
    head_words: int  # 32-bit words of a head
    pages: tuple[Tensor, ...]  # they

    @classmethod
    def of(cls, keys: Sequence[Tensor], values: Sequence[Tensor]) -> PagedLayers:
        """Each [pages, kv_heads, page_size, D], contiguous, all alike."""
        pages = (*keys, *values)
        first = pages[0]
        head_bytes = first.shape[3] * first.element_size()
        if head_bytes % 4 or any(one.shape != first.shape or not one.is_contiguous() for one in pages):
            raise ValueError(f"pages must be contiguous, all alike and of whole words: they are {list(first.shape)}")
        addresses = torch.tensor([one.data_ptr() for one in pages], dtype=torch.int64, device=first.device)
        return cls(addresses, first.shape[1], first.shape[2], head_bytes // 4, pages)


def keep_siblings(
    trees: DraftTrees,
    slots: Tensor,
    first_draws: Tensor,
    logit_rows: Tensor,
    positions: Tensor,
    input_ids: Tensor,
    drawn: Tensor,
    token_ids: Tensor,
    accepted: Tensor,
    moves: LeafMoves,
) -> None:
    """After `quire.kernels.drafts.count_accepted`: puts leaves that were drawn into their trunks.

    Of each sequence with leaves: counts the leaf in `accepted`, puts what was drawn after it into `drawn`, and what was
    drawn for the trunk into `token_ids`, where leaves' draws have the same places. Fills `moves` for all.

    slots, first_draws int32 [S], accepted int32 [slots], logit_rows int32 [N], drawn int64 [N] as in `count_accepted`;
    input_ids int32 [T], the rows' tokens; positions int32 [N], of the tokens drawn, in token_ids int32 [slots, any].
    """
    if slots.is_cuda:
        keep_siblings_triton(
            trees, slots, first_draws, logit_rows, positions, input_ids, drawn, token_ids, accepted, moves
        )
        return
    moves.sources.zero_()
    moves.targets.zero_()
    for index in trees.num_siblings.nonzero().squeeze(-1).tolist():
        slot, first, count = int(slots[index]), int(first_draws[index]), int(trees.num_drafts[index])
        row, kept = int(logit_rows[first]), int(accepted[slot])
        leaf = count + 1 + kept
        hit = kept < int(trees.num_siblings[index]) and int(drawn[first + kept]) == int(input_ids[row + leaf])
        if hit:
            drawn[first + kept + 1] = drawn[first + leaf]
            accepted[slot] = kept + 1
        trunk = slice(first, first + count + 1)
        token_ids[slot, positions[trunk].to(torch.int64)] = drawn[trunk].clamp_min(0).to(torch.int32)
        moves.sources[index] = row + leaf if hit else row
        moves.targets[index] = row + kept + 1 if hit else row


def move_tokens(moves: LeafMoves, slot_mapping: Tensor, layers: PagedLayers) -> None:
    """Copies the keys and values of the sources to the targets; slot_mapping int64 [T]: each row's place."""
    if slot_mapping.is_cuda:
        move_tokens_triton(moves, slot_mapping, layers)
        return
    moving = moves.sources != moves.targets
    sources, targets = (slot_mapping[rows[moving].to(torch.int64)] for rows in (moves.sources, moves.targets))
    size = layers.page_size
    for pages in layers.pages:
        pages[targets // size, :, targets % size] = pages[sources // size, :, sources % size]


@jit
def _keep_kernel(
    num_drafts_ptr: tl.tensor,
    num_siblings_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    first_draws_ptr: tl.tensor,
    logit_rows_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    input_ids_ptr: tl.tensor,
    drawn_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    accepted_ptr: tl.tensor,
    sources_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    tokens_stride: tl.tensor,
    MOST: tl.constexpr,
) -> None:
    """A sequence a program."""
    sequence = tl.program_id(0)
    num_siblings = tl.load(num_siblings_ptr + sequence)
    if num_siblings == 0:
        tl.store(sources_ptr + sequence, 0)
        tl.store(targets_ptr + sequence, 0)
        return
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    first = tl.load(first_draws_ptr + sequence)
    count = tl.load(num_drafts_ptr + sequence)
    row = tl.load(logit_rows_ptr + first)
    kept = tl.load(accepted_ptr + slot)
    leaf = count + 1 + kept
    there = kept < num_siblings
    instead = tl.load(drawn_ptr + first + kept)
    hit = there & (instead == tl.load(input_ids_ptr + row + leaf, mask=there, other=-1))
    last = tl.load(drawn_ptr + first + leaf, mask=hit, other=0)
    place = tl.arange(0, MOST)
    trunk = place <= count
    moved = hit & (place == kept + 1)
    tokens = tl.load(drawn_ptr + first + place, mask=trunk, other=0)
    tokens = tl.where(moved, last, tokens)
    tl.store(drawn_ptr + first + place, tokens, mask=trunk & moved)
    position = tl.load(positions_ptr + first + place, mask=trunk, other=0)
    tl.store(token_ids_ptr + slot * tokens_stride + position, tl.maximum(tokens, 0).to(tl.int32), mask=trunk)
    tl.store(accepted_ptr + slot, kept + hit.to(tl.int32))
    tl.store(sources_ptr + sequence, row + tl.where(hit, leaf, 0))
    tl.store(targets_ptr + sequence, row + tl.where(hit, kept + 1, 0))


def keep_siblings_triton(
    trees: DraftTrees,
    slots: Tensor,
    first_draws: Tensor,
    logit_rows: Tensor,
    positions: Tensor,
    input_ids: Tensor,
    drawn: Tensor,
    token_ids: Tensor,
    accepted: Tensor,
    moves: LeafMoves,
) -> None:
    """`keep_siblings` in one launch."""
    _keep_kernel[(len(slots),)](
        trees.num_drafts,
        trees.num_siblings,
        slots,
        first_draws,
        logit_rows,
        positions,
        input_ids,
        drawn,
        token_ids,
        accepted,
        moves.sources,
        moves.targets,
        token_ids.stride(0),
        MOST=_MOST,
        num_warps=1,
    )


@jit
def _move_kernel(
    addresses_ptr: tl.tensor,
    sources_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
) -> None:
    """A token of one layer's keys or values a program."""
    sequence = tl.program_id(0)
    source = tl.load(sources_ptr + sequence)
    target = tl.load(targets_ptr + sequence)
    if source == target:
        return
    pages = tl.load(addresses_ptr + tl.program_id(1)).to(tl.pointer_type(tl.int32))
    start = tl.load(slots_ptr + source).to(tl.int64)
    end = tl.load(slots_ptr + target).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)
    word = tl.arange(0, BLOCK_WORDS)
    inside = (head < NUM_KV_HEADS)[:, None] & (word < WORDS)[None, :]
    within = (head * (PAGE_SIZE * WORDS))[:, None] + word[None, :]
    start = start // PAGE_SIZE * (NUM_KV_HEADS * PAGE_SIZE * WORDS) + start % PAGE_SIZE * WORDS
    end = end // PAGE_SIZE * (NUM_KV_HEADS * PAGE_SIZE * WORDS) + end % PAGE_SIZE * WORDS
    tl.store(pages + end + within, tl.load(pages + start + within, mask=inside, other=0), mask=inside)


def move_tokens_triton(moves: LeafMoves, slot_mapping: Tensor, layers: PagedLayers) -> None:
    """`move_tokens` in one launch."""
    _move_kernel[(len(moves.sources), len(layers.addresses))](
        layers.addresses,
        moves.sources,
        moves.targets,
        slot_mapping,
        NUM_KV_HEADS=layers.num_kv_heads,
        PAGE_SIZE=layers.page_size,
        WORDS=layers.head_words,
        BLOCK_HEADS=next_power_of_2(layers.num_kv_heads),
        BLOCK_WORDS=next_power_of_2(layers.head_words),
        num_warps=4,
    )
