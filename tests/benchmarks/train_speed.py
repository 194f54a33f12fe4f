"""How fast a head is trained, and where a GPU's time goes.

    PYTHONPATH=services:kernels:operator python tests/benchmarks/train_speed.py
    PYTHONPATH=services:kernels:operator python tests/benchmarks/train_speed.py --plain --batch-tokens 16384

A target of SmolLM2-135M's shape and random weights, dialogues of random tokens. First both ways of computing are
compared on one batch: the losses and the gradient's norm; then steps of one of them are timed after some that are not
counted, which compile; then one step is profiled. `--plain` times what keeps scores and logits as a textbook has it,
with nothing compiled.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from quire.engine.models.dummy import DummyWeights
from quire.service.checkpoint.locate import Checkpoint, CheckpointFormat
from quire.speculate.batches import Batch, batches
from quire.speculate.compiled import as_written
from quire.speculate.dialogues import Dialogue
from quire.speculate.loss import unrolled_losses
from quire.speculate.target import FrozenTarget
from quire.speculate.train import TrainConfig, Trainer

SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "eos_token_id": 2,
}  # fmt: skip
WARM_UP = 3
KERNELS = 12


class Training:
    """A trainer and batches for it."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        cuda = torch.cuda.is_available()
        self.device, self.dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
        (folder / "config.json").write_text(json.dumps(SMOLLM2), encoding="utf-8")
        weights = DummyWeights(folder, self.device, self.dtype)
        checkpoint = Checkpoint(folder, CheckpointFormat.FOLDER, "random")
        self.target = FrozenTarget(checkpoint, self.device, self.dtype, weights)
        self.config = TrainConfig(steps=arguments.steps, batch_tokens=arguments.batch_tokens)
        dialogues = random_dialogues(arguments.length, arguments.batch_tokens * (WARM_UP + arguments.repeat))
        self.trainer = Trainer(self.target, dialogues, self.config, folder / "head", "random")
        order = random.Random(0)
        self.batches = list(batches(dialogues, self.config.batch_tokens, self.config.max_length, order))

    def batch(self, index: int) -> Batch:
        return Batch.of(self.batches[index % len(self.batches)], self.config.max_length).to(self.device)

    def gradient_norm(self) -> tuple[list[float], float]:
        """Of the first batch: each draft's loss, and the norm of what their sum's gradients are."""
        model = self.trainer.model
        with torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext():
            losses = [step.loss for step in unrolled_losses(model, self.target, self.batch(0), self.config.steps)]
        model.zero_grad()
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        return [loss.item() for loss in losses], norm.item()

    def wait(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def random_dialogues(length: int, tokens: int) -> list[Dialogue]:
    """Of `length` tokens on average, an eighth of them the prompt."""
    drawn, found = random.Random(0), []
    while tokens > 0:
        size = drawn.randint(length // 2, length + length // 2)
        found.append(Dialogue("random", drawn.choices(range(SMOLLM2["vocab_size"]), k=size), [(size // 8, size)]))
        tokens -= size
    return found


def compare(training: Training) -> None:
    fused_losses, fused_norm = training.gradient_norm()
    with way(training, plain=True):
        plain_losses, plain_norm = training.gradient_norm()
    differences = [abs(a - b) / b for a, b in zip(fused_losses, plain_losses, strict=True)]
    print(f"losses {' '.join(f'{loss:.4f}' for loss in fused_losses)}, gradient's norm {fused_norm:.4f}")
    print(f"differ from the plain ones by {max(differences):.1e}, the norm by {abs(fused_norm / plain_norm - 1):.1e}")


def way(training: Training, plain: bool) -> AbstractContextManager[Any]:
    """Within it, one of both ways."""
    stack = ExitStack()
    if plain:
        training.trainer.model.fused = False
        stack.callback(setattr, training.trainer.model, "fused", True)
        stack.enter_context(as_written())
    return stack


def measure(training: Training, repeat: int) -> None:
    began = training.wait()
    for index in range(WARM_UP):
        training.trainer.learn(training.batch(index))
    warm = training.wait()
    tokens = 0
    for index in range(WARM_UP, WARM_UP + repeat):
        batch = training.batch(index)
        training.trainer.learn(batch)
        tokens += batch.token_ids.numel()
    asked = time.perf_counter()
    seconds = training.wait() - warm
    print(f"{WARM_UP} steps before: {warm - began:.1f} s")
    print(f"{1e3 * seconds / repeat:.1f} ms a step, {tokens / seconds:,.0f} tokens/s with padding")
    print(f"{1e3 * (asked - warm) / repeat:.1f} ms of it until the processor had asked for all")


def profile(training: Training) -> None:
    batch = training.batch(WARM_UP)
    training.wait()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        training.trainer.learn(batch)
        training.wait()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.time_range.elapsed_us()
            counts[event.name] += 1
    print(f"kernels of one step: {times.total() / 1e3:.1f} ms, {counts.total()} launches")
    for name, total in times.most_common(KERNELS):
        print(f"  {total / 1e3:8.2f} ms {counts[name]:5} × {total / counts[name]:8.1f} µs  {name[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="time the plain way")
    parser.add_argument("--steps", type=int, default=5, help="drafts in a row (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="in a batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=400, help="of a dialogue, on average (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=20, help="steps that are timed (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        training = Training(Path(folder), arguments)
        began = training.wait()
        compare(training)
        print(f"in {training.wait() - began:.1f} s, with what was compiled")
        on_gpu = training.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with way(training, arguments.plain):
            measure(training, arguments.repeat)
            if on_gpu:
                print(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most")
                profile(training)


if __name__ == "__main__":
    main()
