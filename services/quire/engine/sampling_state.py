"""What decides the next token of each slot, as it lives on a device beside the batch's tokens.

Belongs to `device_batch`: admissions fill it, a step reads rows of it. Flags on the host's side say which slots use
what, so that a batch in which nobody asks for penalties pays nothing for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from quire.engine.plan import Admission

# Fills tables of tokens where a slot has fewer entries than another.
NO_TOKEN = -1


class SlotTable:
    """A few entries per slot, int64 or float32 [slots, width, *inner]; the width grows with the longest."""

    def __init__(self, num_slots: int, fill: float, dtype: torch.dtype, *inner: int) -> None:
        self._fill = fill
        self.values = torch.full((num_slots, 0, *inner), fill, dtype=dtype)

    def set(self, slot: int, entries: Sequence[object]) -> None:
        """Replaces a slot's entries."""
        width = self.values.shape[1]
        if len(entries) > width:
            # Doubling keeps the number of copies small while widths creep up.
            more = max(len(entries), 2 * width) - width
            shape = (self.values.shape[0], more, *self.values.shape[2:])
            self.values = torch.cat([self.values, torch.full(shape, self._fill, dtype=self.values.dtype)], dim=1)
        self.values[slot] = self._fill
        if entries:
            self.values[slot, : len(entries)] = torch.tensor(entries, dtype=self.values.dtype)


class SamplingState:
    """The parameters of `max_num_seqs` slots."""

    def __init__(self, max_num_seqs: int, longest_bad_word: int) -> None:
        self.temperature = torch.zeros(max_num_seqs)
        self.top_p = torch.ones(max_num_seqs)
        self.top_k = torch.zeros(max_num_seqs, dtype=torch.int64)
        self.min_p = torch.zeros(max_num_seqs)
        self.seed: npt.NDArray[np.uint64] = np.zeros(max_num_seqs, dtype=np.uint64)
        self.presence_penalty = torch.zeros(max_num_seqs)
        self.frequency_penalty = torch.zeros(max_num_seqs)
        self.repetition_penalty = torch.ones(max_num_seqs)
        self.num_prompt_tokens = torch.zeros(max_num_seqs, dtype=torch.int64)
        self.min_tokens = torch.zeros(max_num_seqs, dtype=torch.int64)
        self.end_tokens = SlotTable(max_num_seqs, NO_TOKEN, torch.int64)
        self.bias_tokens = SlotTable(max_num_seqs, 0, torch.int64)
        self.bias_values = SlotTable(max_num_seqs, 0.0, torch.float32)
        # Each word ends in the last column; what is left of it is NO_TOKEN, which matches anything.
        self.bad_words = SlotTable(max_num_seqs, NO_TOKEN, torch.int64, longest_bad_word)
        self._longest_bad_word = longest_bad_word

        self.penalizes: npt.NDArray[np.bool_] = np.zeros(max_num_seqs, dtype=bool)
        self.biases: npt.NDArray[np.bool_] = np.zeros(max_num_seqs, dtype=bool)
        self.forbids_ends: npt.NDArray[np.bool_] = np.zeros(max_num_seqs, dtype=bool)
        self.forbids_words: npt.NDArray[np.bool_] = np.zeros(max_num_seqs, dtype=bool)
        # -1 where nothing is to be reported.
        self.num_logprobs: npt.NDArray[np.int64] = np.full(max_num_seqs, -1)
        self.num_prompt_logprobs: npt.NDArray[np.int64] = np.full(max_num_seqs, -1)

    def admit(self, admission: Admission) -> None:
        """A sequence takes over its slot."""
        slot, sampling = admission.slot, admission.sampling
        self.temperature[slot] = sampling.temperature
        self.top_p[slot] = sampling.top_p
        self.top_k[slot] = sampling.top_k
        self.min_p[slot] = sampling.min_p
        self.seed[slot] = sampling.seed
        self.num_prompt_tokens[slot] = admission.num_prompt_tokens
        self.num_logprobs[slot] = -1 if admission.logprobs is None else admission.logprobs
        self.num_prompt_logprobs[slot] = -1 if admission.prompt_logprobs is None else admission.prompt_logprobs
        self._admit_penalties(admission)
        self._admit_bans(admission)

    def _admit_penalties(self, admission: Admission) -> None:
        slot, sampling = admission.slot, admission.sampling
        self.presence_penalty[slot] = sampling.presence_penalty
        self.frequency_penalty[slot] = sampling.frequency_penalty
        self.repetition_penalty[slot] = sampling.repetition_penalty
        self.penalizes[slot] = (
            sampling.presence_penalty != 0 or sampling.frequency_penalty != 0 or sampling.repetition_penalty != 1
        )
        if sampling.logit_bias:
            self.bias_tokens.set(slot, [token for token, _ in sampling.logit_bias])
            self.bias_values.set(slot, [bias for _, bias in sampling.logit_bias])
        self.biases[slot] = bool(sampling.logit_bias)

    def _admit_bans(self, admission: Admission) -> None:
        slot, sampling = admission.slot, admission.sampling
        self.min_tokens[slot] = admission.min_tokens
        if admission.min_tokens:
            self.end_tokens.set(slot, admission.end_token_ids)
        self.forbids_ends[slot] = admission.min_tokens > 0
        if sampling.bad_words:
            padded = [[NO_TOKEN] * (self._longest_bad_word - len(word)) + list(word) for word in sampling.bad_words]
            self.bad_words.set(slot, padded)
        self.forbids_words[slot] = bool(sampling.bad_words)
