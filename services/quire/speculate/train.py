"""Trains an EAGLE-3 head on what its target wrote. Stopped at any time, the same call goes on where it was."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quire.engine.models.config import ModelConfig
from quire.engine.models.rope import Rope
from quire.engine.speculation.eagle.checkpoint import CONFIG_FILE, write_eagle3
from quire.engine.speculation.eagle.config import EagleConfig, EagleKind, default_taps
from quire.service.errors import ConfigError
from quire.speculate.batches import Batch, batches, most_written, share_of
from quire.speculate.compiled import as_written
from quire.speculate.dialogues import Dialogue
from quire.speculate.draft_model import DraftModel
from quire.speculate.loss import unrolled_losses
from quire.speculate.target import FrozenTarget

STATE_FILE = "training.pt"
REPORT_FILE = "training.json"

_HELD_OUT = 50  # one dialogue in so many is kept for the report
_WARM_UP = 0.02
_LAST_RATE = 0.02
_SAVE_SECONDS = 60.0
_REPORT_STEPS = 50


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """`steps` drafts in a row are trained, each `step_decay` times as important as the one before. A batch has up to
    `batch_tokens` tokens with its padding. Training ends after `epochs`, or `max_minutes` if that comes first."""

    epochs: int = 4
    draft_vocab_size: int = 8192
    steps: int = 6
    batch_tokens: int = 16384
    max_length: int = 1024
    learning_rate: float = 1e-3
    step_decay: float = 0.9
    seed: int = 0
    max_minutes: float = math.inf

    def __post_init__(self) -> None:
        for name in ("epochs", "draft_vocab_size", "steps", "batch_tokens", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1", field=name
                )
        if not 0 < self.learning_rate < 1:
            raise ConfigError(f"--learning-rate is {self.learning_rate:g}: give more than 0, less than 1")
        if not 0 < self.step_decay <= 1:
            raise ConfigError(f"--step-decay is {self.step_decay:g}: give more than 0, at most 1", field="step_decay")
        if not self.max_minutes > 0:
            raise ConfigError(f"--max-minutes is {self.max_minutes:g}: give more than 0")


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """How far it is: `done` is a share of 1; `accuracies` has one entry for each draft in the row."""

    done: float
    loss: float
    accuracies: tuple[float, ...]
    tokens_per_second: float


def head_config(target: ModelConfig, draft_vocab_size: int) -> EagleConfig:
    """A head whose layer has the target's sizes, without what a family adds to it."""
    layer = replace(
        target, architecture="llama", num_layers=1, windows=(0,), attention_bias=False, rope=Rope(target.rope.theta)
    )
    taps = default_taps(target.num_layers)
    return EagleConfig(EagleKind.EAGLE3, layer, target.hidden_size, taps, min(draft_vocab_size, target.vocab_size))


class Trainer:
    """Trains a head for `target` into the folder `output`; `start` is one to go on from, with its draft tokens.

    Raises ConfigError if the folder holds another training, or a head.
    """

    def __init__(
        self,
        target: FrozenTarget,
        dialogues: Sequence[Dialogue],
        config: TrainConfig,
        output: Path,
        name: str,
        start: DraftModel | None = None,
    ) -> None:
        self._target, self._config, self._output, self._name = target, config, output, name
        self._held_out = dialogues[::_HELD_OUT]
        self._dialogues = [d for index, d in enumerate(dialogues) if index % _HELD_OUT] or list(dialogues)
        head = head_config(target.config, config.draft_vocab_size)
        ids, self.coverage = most_written(self._dialogues, head.draft_vocab_size, target.config.vocab_size)
        torch.manual_seed(config.seed)
        if start is None:
            self.model = DraftModel(head, target.embedding, ids).to(target.device)
            self._begin_like_target()
        else:
            self.model, self.coverage = start, share_of(self._dialogues, start.target_ids)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01,
            fused=target.device.type == "cuda",
        )  # fmt: skip
        self._batches_per_epoch = len(self._epoch(0))
        self._step, self._seconds, self._tokens = 0, 0.0, 0
        self._history: list[dict[str, Any]] = []
        self._load()

    def run(self, report: Callable[[TrainProgress], None], stop: Callable[[], bool]) -> bool:
        """Trains until it is done, which it returns, or `stop` says so; what is learned is saved either way."""
        began, saved = time.perf_counter() - self._seconds, time.perf_counter()
        tokens, since = 0, time.perf_counter()
        while self._done() < 1.0 and not stop():
            # The order of an epoch is the same after a break.
            for dialogues in self._rest_of_epoch():
                batch = Batch.of(dialogues, self._config.max_length).to(self._target.device)
                loss, accuracies = self.learn(batch)
                tokens += batch.token_ids.numel()
                self._step += 1
                self._seconds = time.perf_counter() - began
                if self._step % _REPORT_STEPS == 0 or self._done() >= 1.0:
                    now = time.perf_counter()
                    progress = TrainProgress(
                        self._done(), loss.item(), tuple(accuracies.tolist()), tokens / (now - since)
                    )
                    self._tokens, tokens, since = self._tokens + tokens, 0, now
                    self._history.append({"step": self._step, "tokens": self._tokens, **asdict(progress)})
                    report(progress)
                if time.perf_counter() - saved > _SAVE_SECONDS:
                    self._save()
                    saved = time.perf_counter()
                if self._done() >= 1.0 or stop():
                    break
        self._save()
        return self._done() >= 1.0

    def finish(self) -> tuple[float, ...]:
        """Writes the head and how it came about; returns each draft's accuracy on dialogues that were kept apart."""
        held_out = self.evaluate()
        model = self.model
        tensors = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()}
        write_eagle3(self._output, model.config, tensors, model.target_ids.cpu(), self._name)
        told = {
            "target": self._name,
            "dialogues": len(self._dialogues),
            "written_tokens": sum(end - begin for d in self._dialogues for begin, end in d.spans),
            "draft_vocabulary_coverage": self.coverage,
            "seconds": self._seconds,
            "held_out_accuracies": held_out,
            "config": {name: value for name, value in asdict(self._config).items() if value != math.inf},
            "history": self._history,
        }
        (self._output / REPORT_FILE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        (self._output / STATE_FILE).unlink(missing_ok=True)
        return held_out

    @torch.no_grad()
    @as_written()
    def evaluate(self) -> tuple[float, ...]:
        """Each draft's accuracy on dialogues that were kept apart."""
        total = torch.zeros(self._config.steps, device=self._target.device)
        parts = list(batches(self._held_out, self._config.batch_tokens, self._config.max_length, random.Random(0)))
        for dialogues in parts:
            batch = Batch.of(dialogues, self._config.max_length).to(self._target.device)
            with self._autocast():
                losses = unrolled_losses(self.model, self._target, batch, self._config.steps)
            total += torch.stack([step.accuracy for step in losses])
        return tuple((total / max(1, len(parts))).tolist())

    def learn(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One step; the first draft's loss, and each draft's accuracy. A GPU is not waited for."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.learning_rate * _rate(self._done())
        with self._autocast():
            losses = unrolled_losses(self.model, self._target, batch, self._config.steps)
        weights = [self._config.step_decay**index for index in range(len(losses))]
        loss = sum(
            (weight * step.loss for weight, step in zip(weights, losses, strict=True)),
            torch.zeros(()).to(losses[0].loss),
        )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        return losses[0].loss.detach(), torch.stack([step.accuracy for step in losses])

    def _autocast(self) -> AbstractContextManager[Any]:
        on_gpu = self._target.device.type == "cuda"
        return torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()

    def _done(self) -> float:
        by_steps = self._step / (self._batches_per_epoch * self._config.epochs)
        return min(1.0, max(by_steps, self._seconds / (60 * self._config.max_minutes)))

    def _rest_of_epoch(self) -> list[list[Dialogue]]:
        """What is left of the epoch of the next step; epochs differ in how many batches they have."""
        index, number = self._step, 0
        while index >= len(epoch := self._epoch(number)):
            index, number = index - len(epoch), number + 1
        return epoch[index:]

    def _epoch(self, number: int) -> list[list[Dialogue]]:
        rng = random.Random(f"{self._config.seed} {number}")
        return list(batches(self._dialogues, self._config.batch_tokens, self._config.max_length, rng))

    @torch.no_grad()
    def _begin_like_target(self) -> None:
        """The last product is the target's own, which tells tokens apart already, and so is the norm before it."""
        model, target = self.model, self._target
        model.lm_head.weight.copy_(target.head[model.target_ids])
        model.norm.weight.copy_(target.norm)
        model.fc.weight.mul_(0.1)
        # And what is fused is at first the highest state.
        size = target.config.hidden_size
        model.fc.weight[:, -size:] += torch.eye(size, device=target.device)

    def _save(self) -> None:
        state = {
            "config": self._settings(),
            "model": self.model.state_dict(),
            "target_ids": self.model.target_ids,
            "optimizer": self._optimizer.state_dict(),
            "progress": (self._step, self._seconds, self._tokens),
            "history": json.dumps(self._history),
        }
        try:
            self._output.mkdir(parents=True, exist_ok=True)
            unfinished = self._output / f"{STATE_FILE}.tmp"
            torch.save(state, unfinished)
            unfinished.replace(self._output / STATE_FILE)
        except OSError as error:
            raise ConfigError(f"{self._output} can't be written ({error.strerror})", field="output") from error

    def _load(self) -> None:
        file = self._output / STATE_FILE
        if not file.is_file():
            if (self._output / CONFIG_FILE).is_file():
                raise ConfigError(f"{self._output} holds a head already: name another folder", field="output")
            return
        state = torch.load(file, map_location=self._target.device, weights_only=True)
        for name, value in self._settings().items():
            if state["config"][name] != value:
                raise ConfigError(
                    f"{self._output} holds a training with {name} {state['config'][name]!r} and now it is {value!r}: "
                    "name another folder, or go on with the same",
                    field=name,
                )
        self.model.load_state_dict(state["model"])
        self.model.target_ids = state["target_ids"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._step, self._seconds, self._tokens = state["progress"]
        self._history = json.loads(state["history"])

    def _settings(self) -> dict[str, Any]:
        told = {"target": self._name, "dialogues": len(self._dialogues), **asdict(self._config)}
        # A training may be given more time.
        del told["max_minutes"]
        return told


def _rate(done: float) -> float:
    """The learning rate's share: up in a line, down in a cosine."""
    if done < _WARM_UP:
        return (done + 1e-4) / _WARM_UP
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))
