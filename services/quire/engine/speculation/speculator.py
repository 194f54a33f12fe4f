"""Which drafts a step verifies. Called by the core around each step; knows nothing of devices.

A sequence has an offer: tokens that may follow, from its grammar or from a draft source. The budget decides how many of
them the next step verifies, and beside how many of the device's it verifies second choices. All of them are compared
with what is drawn, verified or not, so the rates of acceptance are known for drafts that nobody pays for, and
speculation comes back when drafts become good.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from quire.engine.scheduler import Scheduler
from quire.engine.sequence import UNKNOWN, Sequence
from quire.engine.speculation.acceptance import Rates, SecondRate
from quire.engine.speculation.budget import Base, Offer, choose
from quire.engine.speculation.cost import StepCost
from quire.engine.speculation.drafts import Drafter, DraftRequest, DraftSource
from quire.engine.speculation.forced_asks import ForcedAsks
from quire.engine.speculation.prospect import Prospect
from quire.engine.speculation.stats import SpeculationStats
from quire.engine.speculation.step_kinds import StepKinds
from quire.engine.speculation.step_watch import StepTime
from quire.service.errors import ConfigError
from quire.service.request import Request

# A device that runs ahead is held up when the host's next drafts are looked for: where they were not worth it, it runs
# so many steps before they are looked for again.
_LONGEST_LEAD = 11


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """At most `num_tokens` drafts a sequence and step; of a grammar's forced tokens, `num_forced`. At most
    `num_siblings` second choices beside them, if the runner makes these and verifies them."""

    num_tokens: int = 8
    num_forced: int = 16
    num_siblings: int = 0

    def __post_init__(self) -> None:
        for name in ("num_tokens", "num_forced", "num_siblings"):
            if not 0 <= getattr(self, name) <= 64:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must lie in [0, 64]", field=name)


class Speculator:
    """Decides on drafts for one engine. `on_device`: its runner has a drafter, too."""

    def __init__(
        self,
        source: DraftSource | None,
        config: SpeculationConfig,
        *,
        on_device: bool = False,
        cost: StepCost | None = None,
    ) -> None:
        self.stats = SpeculationStats()
        self._source = source
        self._on_device = on_device and config.num_tokens > 0
        self._config = config
        self._kinds = StepKinds(config.num_tokens if on_device else 0, cost)
        self._rates, self._second = Rates.of_all(), SecondRate()
        self._prospects: dict[int, Prospect] = {}
        # Keys of sequences of which tokens were offered that are not drawn yet, and of those whose grammar forces some;
        # steps before anything is decided again.
        self._offered: set[int] = set()
        self._forced: set[int] = set()
        self._forced_asks = ForcedAsks(config.num_forced)
        self._num_resting = 0
        self._released: list[int] = []
        # What is to be learned: whose drafts were how often right, and then wrong; what was verified of them.
        self._judged: list[tuple[Prospect, Drafter, int, bool]] = []
        self._seconds: list[bool] = []
        self._verified: Counter[tuple[Drafter, int, int]] = Counter()
        # Steps that the device may run ahead before the host's drafts are looked for, and those that it has.
        self._lead = self._num_ahead = 0

    def forced_to_ask(self) -> int:
        """How many forced tokens to ask grammars for with a step's masks; to be called once for each."""
        return self._forced_asks.next()

    @property
    def num_wanted(self) -> int:
        """How many drafts to ask the device for when a prompt is done."""
        return self._kinds.next.device.num_places

    @property
    def is_resting(self) -> bool:
        """Whether nothing is to be learned from the times of steps."""
        return self._num_resting > 0

    @property
    def awaits_tokens(self) -> bool:
        """Whether what is drawn is to be observed, even of steps without drafts."""
        return bool(self._offered)

    def wants_tokens(self, scheduler: Scheduler) -> bool:
        """Whether drafts of the host's are worth reading the step in flight before the next is planned."""
        if self._source is None and not self._forced:
            return False
        if self._num_ahead < self._lead:
            self._num_ahead += 1
            return False
        return any(
            self._needs_tokens(sequence)
            for sequence in scheduler.running
            if sequence.num_pending == 1 and not sequence.awaits_last_token
        )

    def _needs_tokens(self, sequence: Sequence) -> bool:
        prospect = self._prospects.get(sequence.key)
        if prospect is None:
            return self._source is not None
        best = prospect.best()
        return best not in (None, Drafter.EAGLE) or (self._source is not None and self._is_due(sequence, prospect))

    def propose(self, scheduler: Scheduler, promised: Mapping[Sequence, int]) -> None:
        """Sets `drafts`, `siblings` and `num_wanted` of the running sequences.

        Of those that a step in flight draws for, drafts are known to the device alone: it makes `promised` many.
        """
        if self._num_resting and not promised and not self._offered:
            # They are as they were, and newcomers have none.
            self._num_resting -= 1
            return
        self._num_resting = 0
        decodes, num_alone, num_prompt, context, masked = [], 0, 0, 0, False
        for sequence in scheduler.running:
            num_all = sequence.num_tokens
            num_pending = num_all - sequence.num_computed
            context += num_all
            if num_pending > 1:
                num_prompt += num_pending
                sequence.num_wanted = self.num_wanted
                continue
            num_alone += 1
            if num_pending == 1 and num_all + sequence.num_open < sequence.max_tokens:
                decodes.append(sequence)
                masked = masked or sequence.request.constraint is not None
        kind = self._kinds.expect(masked=masked)
        num_tokens = scheduler.size_without_drafts(num_alone, num_prompt)
        base = Base(num_tokens, len(decodes), max(0, num_tokens - num_alone), context)
        known = [sequence for sequence in decodes if not sequence.num_drawn]
        self._ask(known)
        offers, takers = [], []
        prospects = [self._prospect(sequence) for sequence in decodes]
        for sequence, prospect in zip(decodes, prospects, strict=True):
            if sequence.num_drawn:
                drafter, tokens = Drafter.EAGLE, (UNKNOWN,) * promised.get(sequence, 0)
                siblings = tokens
            else:
                drafter, tokens = prospect.best_offer()
                siblings = prospect.siblings if drafter is Drafter.EAGLE else ()
            sequence.drafts = sequence.siblings = ()
            sequence.drafter = drafter
            if tokens:
                limit = self._config.num_forced if drafter is Drafter.FORCED else self._config.num_tokens
                count, beside = min(limit, len(tokens)), 0
                if prospect.branches:
                    beside = min(self._config.num_siblings, count, len(siblings))
                offers.append(Offer(count, prospect.rates[drafter], beside, self._second.rate))
                takers.append((sequence, tokens, siblings))
        chosen = choose(offers, base, kind.cost)
        forced: list[bool] = []
        for (sequence, tokens, siblings), choice in zip(takers, chosen, strict=True):
            sequence.drafts = tokens[: choice.num_drafts]
            if sequence.drafter is Drafter.FORCED:
                forced.append(choice.num_drafts > 0)
            if choice.num_siblings:
                sequence.siblings = siblings[: choice.num_siblings]
        if forced:
            self._forced_asks.observe(used=any(forced))
        if self._on_device:
            self._want(decodes, prospects, base)
        if known and len(known) == len(decodes):
            found = any(sequence.drafts and sequence.drafter is not Drafter.EAGLE for sequence in known)
            self._lead = 0 if found else min(2 * self._lead + 1, _LONGEST_LEAD)
            self._num_ahead = 0
        if self._on_device and not (promised or self._offered) and kind.cost.knows(num_tokens):
            # The host's drafts are looked for when the device's lead is over.
            most = _LONGEST_LEAD if self._source is None else self._lead - self._num_ahead
            self._num_resting = kind.device.rest(most)

    def _want(self, decodes: list[Sequence], prospects: list[Prospect], base: Base) -> None:
        """Sets how many drafts the device is to make of what follows each sequence's next token."""
        takers, rates, second_rates = [], [], []
        for sequence, prospect in zip(decodes, prospects, strict=True):
            sequence.num_wanted = 0
            # Not where another drafter's are there and better.
            if sequence.drafter is Drafter.EAGLE or not sequence.drafts:
                takers.append(sequence)
                rates.append(prospect.rates[Drafter.EAGLE])
                second_rates.append(self._second.rate * prospect.branches)
        if not takers:
            return
        wanted = self._kinds.next.device.decide(rates, second_rates, base)
        for sequence in takers:
            sequence.num_wanted = wanted

    def observe_step(self, measured: StepTime | None) -> None:
        """A step was read; None: it compiled or captured something, which held up the one before it, too."""
        self._kinds.observe(measured)

    def observe_siblings(self, num_verified: int, kept: bool) -> None:
        """A step verified so many siblings of a sequence's drafts, and `kept` one of them or none."""
        self.stats.verified_siblings += num_verified
        self.stats.accepted_siblings += kept

    def observe(
        self,
        sequence: Sequence,
        drafter: Drafter | None,
        num_verified: int,
        token_ids: SequenceOf[int],
        forced: tuple[int, ...] | None,
        drafted: tuple[int, ...] | None,
        siblings: tuple[int, ...] = (),
    ) -> None:
        """A step drew `token_ids` for a sequence, after it had verified some drafts of `drafter`'s.

        `forced` is what the grammar forces after those, None without a grammar; `drafted` is what the device expects to
        follow the drawn tokens, None if it was not asked, and `siblings` are its second choices.
        """
        prospect = self._prospect(sequence)
        if drafter is not None and num_verified:
            self._verified[drafter, num_verified, len(token_ids) - 1] += 1
        offers = prospect.offers
        if offers:
            num_tokens = len(sequence.token_ids) + len(token_ids)
            for one, offer in tuple(offers.items()):
                self._judge(prospect, one, offer, token_ids, num_tokens)
        # Forced tokens follow the drafts: they are of use if all of those were kept and the next token is the first.
        if forced and len(token_ids) == num_verified + 1 and forced[0] == token_ids[-1] and len(forced) > 1:
            self._offer(prospect, Drafter.FORCED, forced[1:])
        if drafted:
            self._offer(prospect, Drafter.EAGLE, drafted)
            prospect.siblings = siblings
        if offers:
            self._offered.add(sequence.key)
        else:
            self._offered.discard(sequence.key)
        if Drafter.FORCED in offers:
            self._forced.add(sequence.key)
        elif self._forced:
            self._forced.discard(sequence.key)

    def _offer(self, prospect: Prospect, drafter: Drafter, token_ids: tuple[int, ...]) -> None:
        prospect.offers[drafter] = token_ids
        self.stats.drafted[drafter.value] += len(token_ids)

    def _judge(
        self,
        prospect: Prospect,
        drafter: Drafter,
        offer: tuple[int, ...],
        token_ids: SequenceOf[int],
        num_tokens: int,
    ) -> None:
        """Compares what a drafter offered with what was drawn, whether or not it was verified; with that the sequence
        has `num_tokens`."""
        right, wrong = 0, False
        for offered, token in zip(offer, token_ids, strict=False):
            if offered != token:
                wrong = True
                break
            right += 1
        self._judged.append((prospect, drafter, right, wrong))
        if drafter is Drafter.EAGLE and prospect.siblings:
            if wrong and right < len(prospect.siblings):
                self._seconds.append(prospect.siblings[right] == token_ids[right])
            prospect.siblings = () if wrong else prospect.siblings[right:]
        if not wrong and right < len(offer):
            prospect.offers[drafter] = offer[right:]
        else:
            del prospect.offers[drafter]
        if drafter is Drafter.SUFFIX:
            if right:
                prospect.last_pause = 0
            elif wrong:
                prospect.leave_alone(num_tokens)

    def learn(self) -> None:
        """Takes what was observed into account; to be called when the device has its next step: it takes a while."""
        if not (self._judged or self._verified):
            return
        for prospect, drafter, right, wrong in self._judged:
            prospect.rates.record(drafter, right, wrong)
            self._rates.record(drafter, right, wrong)
        self._judged.clear()
        for second in self._seconds:
            self._second.record(second)
        self._seconds.clear()
        for (drafter, verified, accepted), times in self._verified.items():
            self.stats.record(drafter, verified, accepted, times)
        self._verified.clear()

    def forget(self, key: int) -> None:
        """A sequence has ended."""
        self._offered.discard(key)
        self._forced.discard(key)
        if self._prospects.pop(key, None) is not None and self._source is not None:
            self._released.append(key)

    def close(self) -> None:
        """Lets go of the source."""
        if self._source is not None:
            self._source.close()

    def _ask(self, decodes: list[Sequence]) -> None:
        if self._source is None or not self._config.num_tokens:
            return
        due = [sequence for sequence in decodes if self._is_due(sequence, self._prospect(sequence))]
        if not due:
            return
        requests = [
            DraftRequest(
                sequence.key,
                sequence.token_ids,
                self._config.num_tokens,
                sequence.request.cache_key.salt,
                sequence.num_prompt_tokens,
            )
            for sequence in due
        ]
        found = self._source.begin(requests, self._released).wait()
        self._released = []
        for sequence in due:
            prospect = self._prospect(sequence)
            if offer := found.get(sequence.key):
                self._offer(prospect, Drafter.SUFFIX, offer)
                self._offered.add(sequence.key)
            else:
                prospect.leave_alone(len(sequence.token_ids))

    def _is_due(self, sequence: Sequence, prospect: Prospect) -> bool:
        return Drafter.SUFFIX not in prospect.offers and len(sequence.token_ids) >= prospect.paused_to

    def _prospect(self, sequence: Sequence) -> Prospect:
        prospect = self._prospects.get(sequence.key)
        if prospect is None:
            branches = self._config.num_siblings > 0 and may_branch(sequence.request)
            prospect = self._prospects[sequence.key] = Prospect(Rates(start=self._rates), branches)
        return prospect


def may_branch(request: Request) -> bool:
    """Whether siblings of its drafts may be verified: not where a draw depends on all tokens before it in another way
    than through the model, or log-probabilities of each are wanted."""
    sampling = request.sampling
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    if penalties != (0, 0, 1) or sampling.logit_bias or sampling.bad_words or request.stop.min_tokens:
        return False
    return request.constraint is None and request.logprobs is None
