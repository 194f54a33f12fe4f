"""The batch as it lives on a GPU, and what the host sends there: one copy a step.

Token ids, block tables and sampling parameters stay on the device: plans bring changes, sampling writes the next step's
input. Everything else that a step needs is a few numbers per sequence. They and the changes go into one pinned buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.engine.device_batch import WorkColumns, numbers_of
from quire.engine.gpu.staged_step import MAX_CHANGES, TURNS, Columns, HostInputs, Layout, StagedStep, put_changes
from quire.engine.models.gpu_decoder import MIN_SHARED_PAGES, MIN_SHARING
from quire.engine.plan import Admission, StepPlan, Work
from quire.engine.sampling_state import NO_TOKEN, SamplingState
from quire.engine.sequence import pages_for
from quire.kernels.adjust import Adjust, Adjustments
from quire.kernels.draft_trees import DraftTrees, LeafMoves, keep_siblings
from quire.kernels.drafts import count_accepted, follow_drafts
from quire.kernels.sample import SamplingParameters
from quire.service.errors import InternalError
from quire.service.request import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_TOKENS

# Tokens that end a sequence: what a request may name, and more than any model has of its own.
_MAX_ENDS = MAX_STOP_TOKENS + 128
# Second choices beside a sequence's drafts.
MAX_SIBLINGS = 64
# Layouts of steps that are remembered: how many drafts sequences verify goes up and down.
LAYOUTS = 64
_START = Work._fields.index("start")


class GpuBatch:
    """Slots for `max_num_seqs` sequences of up to `max_model_len` tokens; works on any device.

    A step draws up to `num_draws` tokens: one for each sequence and one for each of up to `max_draft_tokens` drafts.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, device: torch.device, max_draft_tokens: int = 0) -> None:
        self.num_seqs = max_num_seqs + max_num_seqs % 2
        self.num_draws = self.num_seqs + max_draft_tokens + max_draft_tokens % 2
        self.sampling = SamplingState(max_num_seqs, MAX_BAD_WORD_TOKENS)
        self._row, self._pages = max_model_len + 1, pages_for(max_model_len)
        # One block of memory, so that all kinds of changes are one scatter; what has 64 bits comes first.
        self._widths = {
            "seed": 2, "temperature": 1, "top_p": 1, "min_p": 1, "top_k": 1, "num_logprobs": 1, "flags": 1,
            "num_prompt_tokens": 1, "repetition_penalty": 1, "presence_penalty": 1, "frequency_penalty": 1,
            "min_tokens": 1, "end_tokens": _MAX_ENDS, "bias_tokens": MAX_LOGIT_BIAS, "bias_values": MAX_LOGIT_BIAS,
            "bad_words": MAX_BAD_WORDS * MAX_BAD_WORD_TOKENS, "siblings": MAX_SIBLINGS, "token_ids": self._row,
            "block_tables": self._pages,
        }  # fmt: skip
        sizes = [max_num_seqs * width for width in self._widths.values()]
        self.memory = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        parts = dict(zip(self._widths, torch.split(self.memory, sizes), strict=True))
        reals = {name: part.view(torch.float32) for name, part in parts.items()}
        self.parameters = SamplingParameters(
            seed=parts["seed"].view(torch.int64),
            temperature=reals["temperature"],
            top_p=reals["top_p"],
            min_p=reals["min_p"],
            top_k=parts["top_k"],
        )
        self.adjustments = Adjustments(
            flags=parts["flags"],
            num_prompt_tokens=parts["num_prompt_tokens"],
            repetition_penalty=reals["repetition_penalty"],
            presence_penalty=reals["presence_penalty"],
            frequency_penalty=reals["frequency_penalty"],
            bias_tokens=parts["bias_tokens"].view(max_num_seqs, MAX_LOGIT_BIAS),
            bias_values=reals["bias_values"].view(max_num_seqs, MAX_LOGIT_BIAS),
            bad_words=parts["bad_words"].view(max_num_seqs, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS),
            end_tokens=parts["end_tokens"].view(max_num_seqs, _MAX_ENDS),
            min_tokens=parts["min_tokens"],
        )
        # How many of the most likely tokens to report, -1 where nothing is to be reported.
        self.num_logprobs = parts["num_logprobs"]
        self.siblings = parts["siblings"].view(max_num_seqs, MAX_SIBLINGS)
        self.token_ids = parts["token_ids"].view(max_num_seqs, self._row)
        self.block_tables = parts["block_tables"].view(max_num_seqs, self._pages)
        # Each slot's last page of those that sequences must share to be a group.
        self._shared_pages = np.full(max_num_seqs, -1)
        self._starts = dict(zip(self._widths, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        # Of each slot: how many drafts the last step that verified any kept.
        self.accepted = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self.moves = LeafMoves(
            *(torch.zeros(self.num_seqs, dtype=torch.int32, device=device) for _ in ("sources", "targets"))
        )
        self._device = device
        self._words = Columns.words(self.num_seqs, self.num_draws)
        self._inputs = torch.zeros(self._words + 3 * MAX_CHANGES, dtype=torch.int32, device=device)
        self._numbers = self._inputs[: self._words]
        self.columns = Columns.of(self._inputs, self.num_seqs, self.num_draws)
        pinned = device.type == "cuda"
        self._hosts = [HostInputs(self.num_seqs, self.num_draws, pinned=pinned) for _ in range(TURNS)]
        self._turn = 0
        self._layouts = lru_cache(LAYOUTS)(partial(_layout, self._shared_pages))

    def clear_inputs(self) -> None:
        """Makes the next step one of padding only."""
        self.columns.query_start.zero_()
        self.columns.context_lens.zero_()
        self.columns.num_open.zero_()
        self.columns.num_drafts.zero_()
        self.columns.num_siblings.zero_()
        self.columns.drawing_slots.fill_(-1)

    def stage(self, plan: StepPlan) -> StagedStep:
        """Sends a plan to the device: its changes are made and `columns` filled in the order of launches.

        If some of its work has drafts `open`, `follow_drafts` is next.
        """
        self._turn = (self._turn + 1) % TURNS
        host, numbers = self._hosts[self._turn], numbers_of(plan.work)
        starts = numbers[:, _START].copy()
        numbers[:, _START] = 0
        if plan.admissions:
            # What is known of a layout says what its slots' sequences ask for.
            self._layouts.cache_clear()
        staged = self._layouts(numbers.tobytes()).at(starts)
        host.fill(staged)
        if not (plan.admissions or plan.grants or plan.drafts):
            self._numbers.copy_(host.numbers, non_blocking=True)
            return staged
        places, values = self._changes(plan)
        words, count = self._words, len(places)
        if count <= MAX_CHANGES:
            end = words + 3 * count
            put_changes(host.changes, places, values)
            self._inputs[:end].copy_(host.buffer[:end], non_blocking=True)
            arrived = self._inputs[words:end]
        else:
            self._numbers.copy_(host.numbers, non_blocking=True)
            changes = torch.empty(3 * count, dtype=torch.int32, pin_memory=self._device.type == "cuda")
            put_changes(changes.numpy(), places, values)
            arrived = changes.to(self._device, non_blocking=True)
        self.memory.index_copy_(0, arrived[: 2 * count].view(torch.int64), arrived[2 * count :])
        return staged

    def follow_drafts(self) -> None:
        """Moves the step's sequences behind the drafts that the step before kept."""
        here = self.columns
        follow_drafts(
            here.num_open, here.slots, self.accepted, here.starts, here.context_lens, here.draw_items, here.positions
        )

    def count_accepted(self, drawn: Tensor, token_ids: Tensor) -> None:
        """After the draws of a step: `accepted` of those whose drafts it verifies. drawn int64 [num_draws]; token_ids
        int32 [T] are the step's inputs."""
        here = self.columns
        count_accepted(here.slots, here.first_draws, here.num_drafts, here.logit_rows, drawn, token_ids, self.accepted)

    def trees(self, num_seqs: int) -> DraftTrees:
        """Of the step's first so many sequences."""
        here = self.columns
        return DraftTrees(here.num_drafts[:num_seqs], here.num_siblings[:num_seqs], self.siblings)

    def keep_siblings(self, drawn: Tensor, token_ids: Tensor) -> None:
        """After `count_accepted`: siblings that were drawn become drafts that are right, and `moves` says which rows
        are to be where. Arguments as there."""
        here = self.columns
        keep_siblings(
            self.trees(self.num_seqs), here.slots, here.first_draws, here.logit_rows, here.positions, token_ids, drawn,
            self.token_ids, self.accepted, self.moves,
        )  # fmt: skip

    def _changes(self, plan: StepPlan) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Where in `memory` the plan puts which numbers."""
        places: list[int] = []
        values: list[int] = []

        def put(name: str, slot: int, numbers: Sequence[int], first: int = 0) -> None:
            start = self._starts[name] + slot * self._widths[name] + first
            places.extend(range(start, start + len(numbers)))
            values.extend(numbers)

        for admission in plan.admissions:
            self.sampling.admit(admission)
            self._layouts.cache_clear()
            self._shared_pages[admission.slot] = -1
            for name, numbers in _numbers(admission).items():
                put(name, admission.slot, numbers)
        for grant in plan.grants:
            if grant.first < MIN_SHARED_PAGES <= grant.first + len(grant.pages):
                self._layouts.cache_clear()
                self._shared_pages[grant.slot] = grant.pages[MIN_SHARED_PAGES - 1 - grant.first]
            put("block_tables", grant.slot, grant.pages, grant.first)
        for drafts in plan.drafts:
            put("token_ids", drafts.slot, drafts.token_ids, drafts.position)
            put("siblings", drafts.slot, drafts.siblings)
        return np.array(places, dtype=np.int64), np.array(values, dtype=np.int32)


def _layout(shared_pages: npt.NDArray[np.int64], numbers: bytes) -> Layout:
    """Of what `numbers_of` made of a step's work, with 0 for the positions in which it begins."""
    work = WorkColumns.of_numbers(np.frombuffer(numbers, np.int64).reshape(-1, len(Work._fields)))
    return Layout.of(work, grouped=_share_prefixes(shared_pages[work.slots]))


def _share_prefixes(pages: npt.NDArray[np.int64]) -> bool:
    pages = pages[pages >= 0]
    if len(pages) < MIN_SHARING:
        return False
    pages.sort()
    return bool((pages[MIN_SHARING - 1 :] == pages[: 1 - MIN_SHARING]).any())


def _numbers(admission: Admission) -> dict[str, Sequence[int]]:
    """What a sequence brings to its slot, by field. Fields that its flags leave out keep what they had."""
    sampling, flags = admission.sampling, flags_of(admission)
    numbers: dict[str, Sequence[int]] = {
        "seed": np.array([sampling.seed], np.uint64).view(np.int32).tolist(),
        "temperature": _bits(sampling.temperature),
        "top_p": _bits(sampling.top_p),
        "min_p": _bits(sampling.min_p),
        "top_k": [sampling.top_k],
        "num_logprobs": [-1 if admission.logprobs is None else admission.logprobs],
        "flags": [int(flags)],
        "token_ids": admission.token_ids,
    }
    if flags:
        numbers["num_prompt_tokens"] = [admission.num_prompt_tokens]
    if flags & Adjust.PENALTIES:
        numbers["repetition_penalty"] = _bits(sampling.repetition_penalty)
        numbers["presence_penalty"] = _bits(sampling.presence_penalty)
        numbers["frequency_penalty"] = _bits(sampling.frequency_penalty)
    if flags & Adjust.BIAS:
        numbers["bias_tokens"] = _padded([token for token, _ in sampling.logit_bias], MAX_LOGIT_BIAS, 0)
        numbers["bias_values"] = _padded(_bits(*(bias for _, bias in sampling.logit_bias)), MAX_LOGIT_BIAS, 0)
    if flags & Adjust.BAD_WORDS:
        words: list[int] = []
        for word in sampling.bad_words:
            words += [NO_TOKEN] * (MAX_BAD_WORD_TOKENS - len(word)) + list(word)
        numbers["bad_words"] = _padded(words, MAX_BAD_WORDS * MAX_BAD_WORD_TOKENS, NO_TOKEN)
    if flags & Adjust.MIN_TOKENS:
        numbers["min_tokens"] = [admission.min_tokens]
        numbers["end_tokens"] = _padded(list(admission.end_token_ids), _MAX_ENDS, NO_TOKEN)
    return numbers


def flags_of(admission: Admission) -> Adjust:
    """What the logits of a sequence undergo before its draws."""
    sampling, flags = admission.sampling, Adjust(0)
    if (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) != (0, 0, 1):
        flags |= Adjust.PENALTIES
    if sampling.logit_bias:
        flags |= Adjust.BIAS
    if sampling.bad_words:
        flags |= Adjust.BAD_WORDS
    if admission.min_tokens:
        flags |= Adjust.MIN_TOKENS
    return flags


def _bits(*reals: float) -> list[int]:
    bits: list[int] = np.array(reals, dtype=np.float32).view(np.int32).tolist()
    return bits


def _padded(numbers: list[int], width: int, fill: int) -> list[int]:
    if len(numbers) > width:
        raise InternalError(f"a slot holds {width} numbers of a kind, and {len(numbers)} were admitted")
    return numbers + [fill] * (width - len(numbers))
