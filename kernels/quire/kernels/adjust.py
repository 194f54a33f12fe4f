"""Changes a batch's logits before the draw on a GPU: penalties, bias, bad words, min_tokens.

What `quire.engine.adjust`, the reference, does on a CPU. Rows whose slot has no flag set cost one load. Others cost
what their history is long, never what the vocabulary is: a program counts the tokens of its row's history in a scratch
row of zeros, and takes each count back as it applies it, which leaves zeros for the next.
"""
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

import torch
from torch import Tensor

from quire.kernels._triton import jit, next_power_of_2, tl
from quire.kernels.vocab_blocks import check_logits

# What a forbidden token's logit loses. Not -inf: where a grammar allows only forbidden tokens, one of them is taken.
_FORBIDDEN = -1e9
_BLOCK = 1024


class Adjust(IntFlag):
    """What a slot's logits undergo; the entry of `flags` is the sum."""

    PENALTIES = 1
    BIAS = 2
    BAD_WORDS = 4
    MIN_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Adjustments:
    """By slot, as `quire.engine.sampling_state` has them; what a slot's flags leave out need not be set."""

    flags: Tensor  # int32, of `Adjust`
    num_prompt_tokens: Tensor  # int
    repetition_penalty: Tensor  # float32, 1 is off
    presence_penalty: Tensor  # float32
    frequency_penalty: Tensor  # float32
    bias_tokens: Tensor  # int [slots, B], no token twice
    bias_values: Tensor  # float32 [slots, B], 0 fills
    bad_words: Tensor  # int [slots, W, longest], a word ends in the last column; -1 fills and matches anything
    end_tokens: Tensor  # int [slots, E], -1 fills
    min_tokens: Tensor  # int


def new_scratch(num_rows: int, vocab_size: int, device: torch.device) -> Tensor:
    """Where histories are counted: int32 [R, V], zeros between launches. So many rows are adjusted at a time."""
    return torch.zeros((num_rows, vocab_size), dtype=torch.int32, device=device)


def adjust_logits_triton(
    logits: Tensor, slots: Tensor, lengths: Tensor, token_ids: Tensor, adjustments: Adjustments, scratch: Tensor
) -> None:
    """Changes `logits` [N, V], of any float type, in place.

    Row i continues the first lengths[i] tokens of token_ids[slots[i]]; slots int [N], negative for padding; lengths
    int [N]; token_ids int [slots, length]; scratch from `new_scratch`. A token that is forbidden twice, by two words or
    by a word and min_tokens, may lose as much as for one.
    """
    check_logits(logits)
    tables = (adjustments.bias_tokens, adjustments.bias_values, adjustments.bad_words, adjustments.end_tokens)
    if not all(table.is_contiguous() for table in (*tables, scratch)) or token_ids.stride(1) != 1:
        raise ValueError("tables of the adjustments, scratch and each slot's token_ids must be contiguous")
    if scratch.shape[1] != logits.shape[1]:
        raise ValueError(f"scratch must be [rows, {logits.shape[1]}], and it is {list(scratch.shape)}")
    num_words, longest = adjustments.bad_words.shape[1:]
    _adjust_kernel[(min(logits.shape[0], scratch.shape[0]),)](
        logits,
        slots,
        lengths,
        token_ids,
        scratch,
        adjustments.flags,
        adjustments.num_prompt_tokens,
        adjustments.repetition_penalty,
        adjustments.presence_penalty,
        adjustments.frequency_penalty,
        *tables,
        adjustments.min_tokens,
        logits.shape[0],
        logits.shape[1],
        logits.stride(0),
        token_ids.stride(0),
        NUM_BIASES=adjustments.bias_tokens.shape[1],
        NUM_WORDS=num_words,
        LONGEST=longest,
        NUM_ENDS=adjustments.end_tokens.shape[1],
        BLOCK_BIASES=next_power_of_2(max(1, adjustments.bias_tokens.shape[1])),
        BLOCK_WORDS=next_power_of_2(max(1, num_words)),
        BLOCK_ENDS=next_power_of_2(max(1, adjustments.end_tokens.shape[1])),
        BLOCK=_BLOCK,
        FORBIDDEN=_FORBIDDEN,
        num_warps=8,
    )


@jit
def _adjust_kernel(
    logits_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    flags_ptr: tl.tensor,
    num_prompt_ptr: tl.tensor,
    repetition_ptr: tl.tensor,
    presence_ptr: tl.tensor,
    frequency_ptr: tl.tensor,
    bias_tokens_ptr: tl.tensor,
    bias_values_ptr: tl.tensor,
    bad_words_ptr: tl.tensor,
    end_tokens_ptr: tl.tensor,
    min_tokens_ptr: tl.tensor,
    num_rows: tl.tensor,
    vocab_size: tl.tensor,
    logits_stride: tl.tensor,
    token_stride: tl.tensor,
    NUM_BIASES: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    LONGEST: tl.constexpr,
    NUM_ENDS: tl.constexpr,
    BLOCK_BIASES: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_ENDS: tl.constexpr,
    BLOCK: tl.constexpr,
    FORBIDDEN: tl.constexpr,
) -> None:
    """Every R-th row a program, one after another, all in one scratch row."""
    program = tl.program_id(0).to(tl.int64)
    for row in range(program, num_rows, tl.num_programs(0)):
        slot = tl.load(slots_ptr + row).to(tl.int64)
        flags = tl.load(flags_ptr + tl.maximum(slot, 0))
        if (slot >= 0) & (flags != 0):
            row_ptr = logits_ptr + row * logits_stride
            history_ptr = token_ids_ptr + slot * token_stride
            length = tl.load(lengths_ptr + row).to(tl.int32)
            num_prompt = tl.load(num_prompt_ptr + slot).to(tl.int32)
            if (flags & 1) != 0:
                _penalize(
                    row_ptr, history_ptr, scratch_ptr + program * vocab_size, length, num_prompt,
                    tl.load(repetition_ptr + slot), tl.load(presence_ptr + slot), tl.load(frequency_ptr + slot), BLOCK,
                )  # fmt: skip
            if (flags & 2) != 0:
                entry = tl.arange(0, BLOCK_BIASES)
                value = tl.load(bias_values_ptr + slot * NUM_BIASES + entry, mask=entry < NUM_BIASES, other=0.0)
                token = tl.load(bias_tokens_ptr + slot * NUM_BIASES + entry, mask=entry < NUM_BIASES, other=0)
                _add(row_ptr, token, value, value != 0.0)
            if (flags & 4) != 0:
                _forbid_words(
                    row_ptr, history_ptr, bad_words_ptr + slot * (NUM_WORDS * LONGEST), length, num_prompt,
                    NUM_WORDS, LONGEST, BLOCK_WORDS, FORBIDDEN,
                )  # fmt: skip
            if (flags & 8) != 0:
                too_short = length - num_prompt < tl.load(min_tokens_ptr + slot).to(tl.int32)
                entry = tl.arange(0, BLOCK_ENDS)
                token = tl.load(end_tokens_ptr + slot * NUM_ENDS + entry, mask=entry < NUM_ENDS, other=-1)
                _add(row_ptr, token, FORBIDDEN, (token >= 0) & too_short)


@jit
def _add(row_ptr: tl.tensor, token: tl.tensor, value: tl.tensor, there: tl.tensor) -> None:
    """Adds to the logits of some tokens; to one that is named twice, once."""
    logit = tl.load(row_ptr + token, mask=there, other=0.0).to(tl.float32)
    # All have read before one writes, and all have written before another change reads.
    tl.debug_barrier()
    tl.store(row_ptr + token, (logit + value).to(row_ptr.dtype.element_ty), mask=there)
    tl.debug_barrier()


@jit
def _penalize(
    row_ptr: tl.tensor,
    history_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    length: tl.tensor,
    num_prompt: tl.tensor,
    repetition: tl.tensor,
    presence: tl.tensor,
    frequency: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Repetition (Keskar et al., arXiv 1909.05858) over prompt and output; frequency and presence over the output.

    A count's bit 30 says that the token is in the prompt, the rest how often it is in the output.
    """
    for start in range(0, length, BLOCK):
        position = start + tl.arange(0, BLOCK)
        token = tl.load(history_ptr + position, mask=position < length, other=0)
        prompt = position < tl.minimum(num_prompt, length)
        output = (position >= num_prompt) & (position < length)
        tl.atomic_or(counts_ptr + token, 1 << 30, mask=prompt, sem="relaxed")
        tl.atomic_add(counts_ptr + token, 1, mask=output, sem="relaxed")
    tl.debug_barrier()
    for start in range(0, length, BLOCK):
        position = start + tl.arange(0, BLOCK)
        token = tl.load(history_ptr + position, mask=position < length, other=0)
        # One of a token's occurrences finds the count, the others nothing.
        count = tl.atomic_xchg(counts_ptr + token, 0, mask=position < length, sem="relaxed")
        first = (position < length) & (count != 0)
        logit = tl.load(row_ptr + token, mask=first, other=0.0).to(tl.float32)
        logit = tl.where(logit > 0.0, logit / repetition, logit * repetition)
        times = (count & ((1 << 30) - 1)).to(tl.float32)
        logit -= frequency * times + tl.where(times > 0.0, presence, 0.0)
        tl.store(row_ptr + token, logit.to(row_ptr.dtype.element_ty), mask=first)
    tl.debug_barrier()


@jit
def _forbid_words(
    row_ptr: tl.tensor,
    history_ptr: tl.tensor,
    words_ptr: tl.tensor,
    length: tl.tensor,
    num_prompt: tl.tensor,
    NUM_WORDS: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    FORBIDDEN: tl.constexpr,
) -> None:
    """A word's last token is forbidden where the output ends with its others."""
    word = tl.arange(0, BLOCK_WORDS)
    there = word < NUM_WORDS
    last = tl.load(words_ptr + word * LONGEST + LONGEST - 1, mask=there, other=-1)
    completes = there & (last >= 0)
    for column in range(LONGEST - 1):
        wanted = tl.load(words_ptr + word * LONGEST + column, mask=there, other=-1)
        index = length - (LONGEST - 1) + column
        inside = index >= num_prompt
        token = tl.load(history_ptr + tl.maximum(index, 0), mask=inside, other=-2)
        completes = completes & ((wanted < 0) | (wanted == token))
    _add(row_ptr, last, FORBIDDEN, completes)
