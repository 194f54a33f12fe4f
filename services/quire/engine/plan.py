"""What the host tells the device about one step, and what it hears back: all that crosses between the two.

The scheduler makes plans from the host's state, a runner applies them to the batch that lives on its device. Neither
reads the other's state. A plan therefore holds only what changed (a sequence joins a slot, gets pages) and how many
tokens each slot advances: a decode reads its input token where the last step's sampling wrote it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from quire.service.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence takes over a slot; whatever the slot held is void.

    None of `end_token_ids` may come before `min_tokens` output tokens. `logprobs` and `prompt_logprobs` as in Request.
    """

    slot: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    end_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class PageGrant:
    """`pages` become entries `first`, `first + 1`, … of the slot's block table."""

    slot: int
    first: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drafts:
    """`token_ids` may be what follows in a slot from `position` on: its work in this step computes them, too. So may
    each of `siblings` in the place of the draft beside it, if the drafts before are right.

    Drafts and siblings of a work that a plan does not name are those that the device made in the step before.
    """

    slot: int
    position: int
    token_ids: tuple[int, ...]
    siblings: tuple[int, ...] = ()


class Work(NamedTuple):
    """Compute `num_tokens` tokens of a slot from position `start`; if `sample`, draw the token after the last of them.

    Where the step before verifies drafts, and the host does not know yet how many of these are right, the tokens begin
    as many positions later: up to `num_open`.
    The last `num_drafts` of them are drafts: a token is drawn in front of each, too, as if those before it were right,
    and the first that differs from its draft is the last that counts.
    Behind the drafts come `num_siblings` more of the `num_tokens`, no more than there are drafts: sibling i is another
    choice in the place of draft i, a leaf of the tree whose trunk the drafts are. It has draft i's position and sees
    what is before that. If the token that differs from draft i is sibling i, it counts as a draft that is right, and
    what is drawn after it is the last that counts.
    Drafts are to be made of what follows: up to `num_wanted`, if there is a drafter on the device.
    If `score`, report the log-probabilities of the prompt's tokens from position `start + 1` to `start + num_tokens`.
    A tuple of numbers, so that a device makes one array of a step's work.
    """

    slot: int
    start: int
    num_tokens: int
    sample: bool
    score: bool = False
    num_drafts: int = 0
    num_wanted: int = 0
    num_open: int = 0
    num_siblings: int = 0

    @property
    def num_verified(self) -> int:
        """Drafts and siblings: rows that may turn out to be of no use."""
        return self.num_drafts + self.num_siblings


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, applied in this order: admissions, grants, drafts, work."""

    admissions: tuple[Admission, ...]
    grants: tuple[PageGrant, ...]
    work: tuple[Work, ...]
    drafts: tuple[Drafts, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """`token_ids[i]` is the last token that work i drew, -1 if it drew none or its logits were not finite. The first
    `accepted[i]` of its drafts come before it; works without drafts are not in there. `drafts[i]` may come after it; to
    make all of them, one place after another, took `draft_seconds`; `siblings[i]` are second choices beside them. Of
    works with siblings `kept[i]` are the `accepted[i]` tokens, the last of which may be a sibling. Not `repeatable`:
    the step took longer than its like will, because something was compiled or captured. The host stood still for
    `waited_seconds` until the device was done; None if they take turns.

    `logprobs[i]` reports on the tokens that were drawn and count, `prompt_logprobs[i]` on work i's prompt tokens, where
    that was asked for.
    """

    token_ids: tuple[int, ...]
    logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    accepted: dict[int, int] = field(default_factory=dict)
    drafts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    draft_seconds: float = 0.0
    repeatable: bool = True
    siblings: dict[int, tuple[int, ...]] = field(default_factory=dict)
    kept: dict[int, tuple[int, ...]] = field(default_factory=dict)
    waited_seconds: float | None = None
