"""Changes a batch's logits before the draw: penalties, bias, bad words, min_tokens. Vectorised over the rows.

Called by runners. Everything is computed from the tokens of the slot, which the device has anyway: there are no counts
that a preemption or a move to another engine could lose.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.engine.sampling_state import SamplingState

# What a forbidden token's logit loses. Not -inf: where a grammar allows only forbidden tokens, one of them is taken.
_FORBIDDEN = -1e9


def adjust_logits(
    logits: Tensor, state: SamplingState, token_ids: Tensor, slots: npt.NDArray[np.int64], lengths: Tensor
) -> None:
    """Changes `logits`, float32 [N, V], in place.

    Row i continues the first `lengths[i]` tokens of `token_ids[slots[i]]`; token_ids: int [slots, max_model_len + 1] on
    the device of `logits`; lengths: int64 [N] on the host, as the state is.
    """
    for flags, change in (
        (state.penalizes, _penalize),
        (state.biases, _bias),
        (state.forbids_words, _forbid_words),
        (state.forbids_ends, _forbid_ends),
    ):
        chosen = np.flatnonzero(flags[slots])
        if chosen.size:
            rows = torch.from_numpy(chosen)
            there = rows.to(logits.device)
            changed = logits[there]
            change(changed, state, token_ids, torch.from_numpy(slots[chosen]), lengths[rows])
            logits[there] = changed


def _penalize(logits: Tensor, state: SamplingState, token_ids: Tensor, slots: Tensor, lengths: Tensor) -> None:
    """Repetition (Keskar et al., arXiv 1909.05858) over prompt and output; frequency and presence over the output."""
    device = logits.device
    position = torch.arange(int(lengths.max()), device=device)
    history = token_ids[slots.to(device), : len(position)].to(torch.int64)
    present = position < lengths.to(device).unsqueeze(-1)
    generated = present & (position >= state.num_prompt_tokens[slots].to(device).unsqueeze(-1))
    in_all = torch.zeros_like(logits).scatter_add_(1, history, present.to(logits.dtype))
    in_output = torch.zeros_like(logits).scatter_add_(1, history, generated.to(logits.dtype))
    repetition = state.repetition_penalty[slots].to(device).unsqueeze(-1)
    logits.copy_(torch.where(in_all > 0, torch.where(logits > 0, logits / repetition, logits * repetition), logits))
    logits -= state.frequency_penalty[slots].to(device).unsqueeze(-1) * in_output
    logits -= state.presence_penalty[slots].to(device).unsqueeze(-1) * (in_output > 0)


def _bias(logits: Tensor, state: SamplingState, token_ids: Tensor, slots: Tensor, lengths: Tensor) -> None:
    device = logits.device
    logits.scatter_add_(1, state.bias_tokens.values[slots].to(device), state.bias_values.values[slots].to(device))


def _forbid_words(logits: Tensor, state: SamplingState, token_ids: Tensor, slots: Tensor, lengths: Tensor) -> None:
    """A word's last token is forbidden where the output ends with its others."""
    device = logits.device
    words = state.bad_words.values[slots].to(device)  # [R, words, longest]
    before, last = words[..., :-1], words[..., -1]
    index = lengths.to(device).unsqueeze(-1) + torch.arange(-before.shape[-1], 0, device=device)
    tail = token_ids[slots.to(device)].gather(1, index.clamp_min(0))
    # Only the output counts; -2 equals no token, not even a word's NO_TOKEN.
    tail = tail.masked_fill(index < state.num_prompt_tokens[slots].to(device).unsqueeze(-1), -2)
    completes = ((before == tail.unsqueeze(1)) | (before < 0)).all(dim=-1) & (last >= 0)
    logits.scatter_add_(1, last.clamp_min(0), completes * _FORBIDDEN)


def _forbid_ends(logits: Tensor, state: SamplingState, token_ids: Tensor, slots: Tensor, lengths: Tensor) -> None:
    too_short = lengths - state.num_prompt_tokens[slots] < state.min_tokens[slots]
    ends, too_short = state.end_tokens.values[slots].to(logits.device), too_short.to(logits.device)
    logits.scatter_add_(1, ends.clamp_min(0), (too_short.unsqueeze(-1) & (ends >= 0)) * _FORBIDDEN)
