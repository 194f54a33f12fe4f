"""Training data in the target's own words: it writes both sides of dialogues.

Xu et al., "Magpie: Alignment Data Synthesis from Scratch by Prompting Aligned LLMs with Nothing", 2024: after the
opening of a user's turn an aligned model invents the turn, and then answers it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from quire.llm import LLM, SamplingParams
from quire.llm.outputs import CompletionOutput
from quire.service.chat import ChatTemplate, Message
from quire.service.checkpoint import TextModel
from quire.service.codec import PromptCodec
from quire.service.errors import ConfigError
from quire.speculate.dialogues import Dialogue, DialogueFolder
from quire.speculate.openings import opening

# Half of the answers are the likeliest ones, as greedy requests get them.
_ANSWER_TEMPERATURES = (0.0, 0.7)
_USER_TOP_P = 0.95


@dataclass(frozen=True, slots=True)
class DataConfig:
    """How much to write. Lengths are in tokens; a part of `part_size` dialogues is written at a time."""

    dialogues: int = 10_000
    turns: int = 2
    user_tokens: int = 128
    answer_tokens: int = 384
    part_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("dialogues", "turns", "user_tokens", "answer_tokens", "part_size"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1", field=name
                )

    @property
    def num_parts(self) -> int:
        """How many parts make `dialogues`."""
        return -(-self.dialogues // self.part_size)


@dataclass(slots=True)
class _Draft:
    kind: str
    opening: str
    messages: list[Message] = field(default_factory=list)
    token_ids: tuple[int, ...] = ()
    spans: list[tuple[int, int]] = field(default_factory=list)
    alive: bool = True


class DialogueWriter:
    """Has `llm` write dialogues. Raises ConfigError for a model without a chat template."""

    def __init__(self, llm: LLM, text: TextModel, config: DataConfig) -> None:
        if text.chat_template is None:
            raise ConfigError("the model has no chat template, so it writes no dialogues", field="model")
        self._llm = llm
        self._codec = PromptCodec(text)
        self._template = ChatTemplate(text.chat_template, bos_token=text.bos_token, eos_token=text.eos_token)
        self._room = text.max_model_len
        self._config = config

    def part(self, number: int) -> list[Dialogue]:
        """Part `number`: the same for the same model and config, whatever parts were made before."""
        rng = random.Random(f"{self._config.seed} {number}")
        drafts = [_Draft(kind.value, begin) for kind, begin in (opening(rng) for _ in range(self._config.part_size))]
        for turn in range(self._config.turns):
            self._ask([draft for draft in drafts if draft.alive], rng, first=not turn)
            self._answer([draft for draft in drafts if draft.alive], rng)
        written = {draft.token_ids: draft for draft in drafts if draft.spans}
        return [Dialogue(draft.kind, draft.token_ids, draft.spans) for draft in written.values()]

    def _ask(self, drafts: Sequence[_Draft], rng: random.Random, *, first: bool) -> None:
        prompts = []
        for draft in drafts:
            draft.messages.append(Message("user", draft.opening if first else ""))
            text = self._template.render(draft.messages, add_generation_prompt=False, continue_final_message=True)
            prompts.append(self._codec.encode(text))
        params = [
            SamplingParams(
                max_tokens=self._config.user_tokens,
                top_p=_USER_TOP_P,
                seed=rng.getrandbits(32),
                # Left alone, the model goes on with the text of what it asks about.
                stop="\n" if draft.messages[-1].content else None,
            )
            for draft in drafts
        ]
        for draft, written in zip(drafts, self._generate(drafts, prompts, params), strict=True):
            content = (draft.messages[-1].content + written.text).strip() if written is not None else ""
            # A turn that did not come to its end is none.
            draft.alive = bool(content) and written is not None and written.finish_reason == "stop"
            draft.messages[-1] = Message("user", content)

    def _answer(self, drafts: Sequence[_Draft], rng: random.Random) -> None:
        prompts = [self._codec.encode(self._template.render(draft.messages)) for draft in drafts]
        params = [
            SamplingParams(
                max_tokens=self._config.answer_tokens,
                temperature=rng.choice(_ANSWER_TEMPERATURES),
                seed=rng.getrandbits(32),
            )
            for _ in drafts
        ]
        written = self._generate(drafts, prompts, params)
        for draft, prompt, answer in zip(drafts, prompts, written, strict=True):
            if answer is None or not answer.token_ids:
                draft.alive = False
                continue
            # What was written before counts only where the template shows the same tokens again.
            if prompt[: len(draft.token_ids)] != draft.token_ids:
                draft.spans.clear()
            draft.token_ids = (*prompt, *answer.token_ids)
            draft.spans.append((len(prompt), len(draft.token_ids)))
            draft.messages.append(Message("assistant", answer.text))
            draft.alive = answer.finish_reason == "stop"

    def _generate(
        self, drafts: Sequence[_Draft], prompts: Sequence[tuple[int, ...]], params: Sequence[SamplingParams]
    ) -> list[CompletionOutput | None]:
        """One output for each prompt; None where the context has no room for it, or it failed."""
        fits = [len(p) + (asked.max_tokens or 0) <= self._room for p, asked in zip(prompts, params, strict=True)]
        chosen = [index for index, fit in enumerate(fits) if fit]
        outputs = self._llm.generate(
            [list(prompts[index]) for index in chosen], [params[index] for index in chosen], use_tqdm=False
        )
        found: list[CompletionOutput | None] = [None] * len(drafts)
        for index, output in zip(chosen, outputs, strict=True):
            if output.outputs[0].error is None:
                found[index] = output.outputs[0]
        return found


def write_dialogues(
    writer: DialogueWriter,
    folder: DialogueFolder,
    config: DataConfig,
    wrote: Callable[[int, int], None],
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Writes the parts that `folder` lacks, in their order. `wrote` gets each one's number and how many tokens of it
    are the assistant's; no other is begun once `enough` says so."""
    for number in range(config.num_parts):
        if folder.has(number):
            continue
        if enough():
            return
        dialogues = writer.part(number)
        folder.write(number, dialogues)
        wrote(number, sum(end - begin for dialogue in dialogues for begin, end in dialogue.spans))
