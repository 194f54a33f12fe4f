"""The embedded model, a trained one: float32 against transformers, the fast mode against float32."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from teacher_forced import teacher_forced_logits
from transformers import AutoModelForCausalLM

from quire.engine.core import EngineCore
from quire.engine.cpu_runner import CpuRunner
from quire.engine.models.model import Model, ModelDtype
from quire.engine.models.registry import load_model
from quire.engine.page_pool import PagePool
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.service.checkpoint import load_text
from quire.service.checkpoint.locate import locate
from quire.service.request import Request, SamplingParams, StopConditions

pytestmark = pytest.mark.slow

NUM_TOKENS = 64
QUESTIONS = [
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Explain photosynthesis to a ten-year-old.",
    "Extract name and age as JSON: Maria Lopez is 34 years old and lives in Lima.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "List five fruits that are red.",
    "Translate to Spanish: The weather is nice today and the children play outside.",
    "Why is the sky blue, and why are sunsets red?",
]


@dataclass(frozen=True, slots=True)
class Conversation:
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.answer

    @property
    def predicting(self) -> slice:
        """The positions whose logits are of the answer's tokens."""
        return slice(len(self.prompt) - 1, len(self.tokens) - 1)


def load(dtype: ModelDtype) -> Model:
    checkpoint = locate()
    return load_model(checkpoint.path, checkpoint.format, dtype, lambda *_: None)


@pytest.fixture(scope="module")
def exact() -> Model:
    return load(ModelDtype.FLOAT32)


@pytest.fixture(scope="module")
def conversations(exact: Model) -> list[Conversation]:
    """The engine's greedy answers of 64 tokens, all in one batch, in float32, whatever the model means as their end."""
    tokenizer = load_text(locate()).tokenizer
    texts = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in QUESTIONS]
    prompts = [tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    config = SchedulerConfig(max_num_seqs=len(prompts), max_num_batched_tokens=64, max_model_len=256)
    runner = CpuRunner(exact, 80, len(prompts), 256, "float32")
    core = EngineCore(runner, Scheduler(config, PagePool(80), frozenset()), None, exact.config.vocab_size)
    answers: dict[int, list[int]] = {key: [] for key in range(len(prompts))}
    for key, prompt in enumerate(prompts):
        core.submit(key, Request(str(key), "m", prompt, SamplingParams(temperature=0.0), StopConditions(NUM_TOKENS)))
    while core.has_work:
        for update in core.step():
            answers[update.key].extend(update.token_ids)
    return [Conversation(prompt, tuple(answers[key])) for key, prompt in enumerate(prompts)]


def test_greedy_output_equals_transformers(conversations: list[Conversation]) -> None:
    """Tiny random models hide what only a trained one shows: large activations, a real vocabulary, quantized weights.

    If at every position of our output transformers' likeliest token is ours, its own greedy output is the same.
    """
    path = locate().path
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    for conversation in conversations:
        assert len(conversation.answer) == NUM_TOKENS
        with torch.inference_mode():
            logits = theirs(torch.tensor([conversation.tokens])).logits[0, conversation.predicting]
        assert tuple(logits.argmax(-1).tolist()) == conversation.answer


@pytest.mark.parametrize(("num_sequences", "chunk"), [(8, 64), (8, 1), (4, 1)])
def test_the_fast_mode_agrees_with_float32(
    exact: Model, conversations: list[Conversation], num_sequences: int, chunk: int
) -> None:
    """Rounding to bfloat16 must not make another model of it: at least 98% of the next tokens are the same.

    Steps of hundreds, of eight and of four tokens go through different products.
    """
    fast = load(ModelDtype.BFLOAT16)
    tokens = [conversation.tokens for conversation in conversations]
    expected = teacher_forced_logits(exact, tokens, 64)
    found = [
        logits
        for first in range(0, len(tokens), num_sequences)
        for logits in teacher_forced_logits(fast, tokens[first : first + num_sequences], chunk)
    ]
    same = torch.cat(found).argmax(-1) == torch.cat(expected).argmax(-1)
    assert len(same) >= 500
    assert same.float().mean() >= 0.98, f"{int(same.sum())} of {len(same)}"
