"""LLM.generate on a tiny random model: what it returns, and that a batch changes nothing of it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import tiny_checkpoint
from transformers import LlamaForCausalLM

from quire.engine.core import EngineCore
from quire.engine.cpu_runner import CpuRunner
from quire.engine.models.model import ModelDtype
from quire.engine.models.registry import load_model
from quire.engine.page_pool import PagePool
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.llm import LLM, RequestOutput, SamplingParams
from quire.service import request as contract
from quire.service.checkpoint.locate import CheckpointFormat
from quire.service.errors import InternalError, InvalidRequestError

GREEDY = SamplingParams(temperature=0, max_tokens=12)
TEXTS = ["a", "The quick brown fox jumps over the lazy dog", "x" * 50, "The quick brown fox sleeps", "é"]

Alone = Callable[[list[int], contract.SamplingParams, int], list[int]]


@pytest.fixture(scope="session")
def alone(checkpoint: Path) -> Alone:
    """What the engine's core gives for a request that is alone in it."""
    model = load_model(checkpoint, CheckpointFormat.FOLDER, ModelDtype.FLOAT32, lambda *_: None)

    def run(prompt: list[int], sampling: contract.SamplingParams, max_tokens: int) -> list[int]:
        scheduler = Scheduler(SchedulerConfig(max_model_len=256), PagePool(16), frozenset(model.config.eos_token_ids))
        core = EngineCore(CpuRunner(model, 16, 64, 256, "float32"), scheduler, None, model.config.vocab_size)
        core.submit(0, contract.Request("0", "m", tuple(prompt), sampling, contract.StopConditions(max_tokens)))
        tokens: list[int] = []
        while core.has_work:
            tokens += [token for update in core.step() for token in update.token_ids]
        return tokens

    return run


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def test_a_batch_gives_what_each_prompt_gives_alone(tiny: LLM, alone: Alone) -> None:
    """Without it an output could depend on what else is in the batch, or come at another prompt's place."""
    outputs = tiny.generate(TEXTS, GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == TEXTS
    for output in outputs:
        greedy = contract.SamplingParams(temperature=0.0)
        assert output.outputs[0].token_ids == alone(output.prompt_token_ids, greedy, 12)
        assert output.outputs[0].finish_reason in ("length", "stop") and output.finished
        assert 0 < output.metrics.first_token_seconds <= output.metrics.seconds


def test_small_caches_and_small_steps_change_nothing(checkpoint: Path, tiny: LLM) -> None:
    """Without it preemption or chunks would show in what a user gets."""
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with LLM(checkpoint, dtype="float32", max_model_len=128, max_num_batched_tokens=7, num_pages=9) as small:
        assert tokens_of(small.generate(TEXTS, params, use_tqdm=False)) == tokens_of(tiny.generate(TEXTS, params))
        metrics = small.metrics()
    assert metrics.preemptions > 0 and metrics.pages_used == 0 and metrics.running == metrics.waiting == 0
    assert metrics.pages_total == 9 and metrics.pages_cached > 0


def test_every_form_of_a_prompt(tiny: LLM) -> None:
    """Without it token ids, dicts and texts could mean different things."""
    (text,) = tiny.generate("hello", GREEDY, use_tqdm=False)
    ids = text.prompt_token_ids
    forms = [ids, [ids], tuple(ids), torch.tensor(ids), {"prompt_token_ids": ids}, [{"prompt": "hello"}], ["hello"]]
    for form in forms:
        (output,) = tiny.generate(form, GREEDY, use_tqdm=False)
        assert output.outputs == text.outputs
        assert output.prompt == ("hello" if "hello" in str(form) else None)
    assert tiny.generate([], GREEDY) == []


def test_salted_prompts_share_only_among_themselves(tiny: LLM) -> None:
    """Without it a tenant could learn from the time to first token what another one asked."""
    prompt = "salted " * 9

    def cached(salt: str) -> int:
        (output,) = tiny.generate({"prompt": prompt, "cache_salt": salt}, GREEDY, use_tqdm=False)
        return output.num_cached_tokens

    assert [cached("a"), cached("b"), cached("a")] == [0, 0, len(prompt) // 16 * 16]


def test_params_of_their_own(tiny: LLM) -> None:
    """Without it all prompts would get the first one's params."""
    params = [SamplingParams(temperature=0, max_tokens=count) for count in (1, 2, 3)]
    assert [len(tokens) for tokens in tokens_of(tiny.generate(TEXTS[:3], params, use_tqdm=False))] == [1, 2, 3]
    with pytest.raises(InvalidRequestError, match="2 entries for 3 prompts"):
        tiny.generate(TEXTS[:3], params[:2])


def test_several_outputs_share_the_prompts_pages(checkpoint: Path, alone: Alone) -> None:
    """Without it n outputs would cost n prompts, or be n times the same one."""
    params = SamplingParams(n=4, seed=7, max_tokens=8, ignore_eos=True, prompt_logprobs=0)
    with LLM(checkpoint, dtype="float32", max_model_len=256) as llm:
        (output,) = llm.generate([[1] * 100], params, use_tqdm=False)
        metrics = llm.metrics()
    computed = metrics.tokens_per_step.mean * metrics.tokens_per_step.count
    # The prompt's last, unfinished page and the output's tokens are each output's own.
    assert computed == 100 + 3 * 4 + 4 * 7
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 4
    for index, completion in enumerate(output.outputs):
        assert completion.token_ids == alone([1] * 100, contract.SamplingParams(seed=7 + index), 8)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 100


def test_seeds(checkpoint: Path, tiny: LLM) -> None:
    """Without it a run could not be repeated, or all prompts without a seed would draw alike."""
    seeded, free = SamplingParams(seed=-5, max_tokens=20), SamplingParams(max_tokens=20)
    alone = tokens_of(tiny.generate("abc", seeded, use_tqdm=False))[0]
    batch = tokens_of(tiny.generate(["x", "abc", "abc", "abc"], [free, seeded, free, free], use_tqdm=False))
    assert batch[1] == alone and batch[2] != batch[3] != alone

    def own(seed: int | None) -> list[list[int]]:
        with LLM(checkpoint, dtype="float32", max_model_len=64, seed=seed) as llm:
            return tokens_of(llm.generate(["abc", "abc"], free, use_tqdm=False))

    first, again, other, random = own(1), own(1), own(2), own(None)
    assert first == again and first[0] != first[1]
    assert len({str(tokens) for tokens in (first, other, random)}) == 3


def test_stop_strings(tiny: LLM) -> None:
    """Without it an output could run on past its stop string, show it, or keep its tokens from whoever asked."""
    params = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    (whole,) = tiny.generate("Tell", SamplingParams(**params), use_tqdm=False)
    text, tokens = whole.outputs[0].text, whole.outputs[0].token_ids
    stop = next(text[i : i + 2] for i in range(8, len(text)) if "\ufffd" not in text[i : i + 2])
    (cut,) = tiny.generate("Tell", SamplingParams(**params, stop=stop), use_tqdm=False)
    completion = cut.outputs[0]
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == tokens[: len(completion.token_ids)] and len(completion.token_ids) < 40
    (kept,) = tiny.generate("Tell", SamplingParams(**params, stop=[stop], include_stop_str_in_output=True))
    assert kept.outputs[0].text == completion.text + stop
    # Looked for only after min_tokens.
    later = SamplingParams(**params, stop=[stop], min_tokens=len(completion.token_ids))
    assert len(tiny.generate("Tell", later, use_tqdm=False)[0].outputs[0].token_ids) > len(completion.token_ids)
    assert tiny.metrics().pages_used == 0


def test_stop_tokens_and_ends(tiny: LLM) -> None:
    """Without it an end token could be ignored, or its text shown."""
    (whole,) = tiny.generate("Go", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True), use_tqdm=False)
    tokens = whole.outputs[0].token_ids
    stop = tokens[4]
    params = SamplingParams(temperature=0, max_tokens=30, stop_token_ids=[stop], logprobs=0)
    completion = tiny.generate("Go", params, use_tqdm=False)[0].outputs[0]
    assert completion.token_ids == tokens[: tokens.index(stop) + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids)
    before = tiny.generate("Go", SamplingParams(temperature=0, max_tokens=tokens.index(stop)), use_tqdm=False)
    assert completion.text == before[0].outputs[0].text
    # The model's own end token, pushed to be the first, and held off.
    pushed = {"temperature": 0, "max_tokens": 10, "logit_bias": {2: 100.0}}
    ended = tiny.generate("Go", SamplingParams(**pushed), use_tqdm=False)[0].outputs[0]
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([2], "", "stop", None)
    held = tiny.generate("Go", SamplingParams(**pushed, min_tokens=4), use_tqdm=False)[0].outputs[0]
    assert held.token_ids.index(2) == 4
    ignored = tiny.generate("Go", SamplingParams(**pushed, ignore_eos=True), use_tqdm=False)[0].outputs[0]
    assert ignored.token_ids == [2] * 10 and ignored.finish_reason == "length"


def test_penalties_and_bad_words(tiny: LLM) -> None:
    """Without it these params could get lost between the user and the engine."""

    def text(bias: dict[int, float], **params: float | list[str]) -> str:
        asked = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logit_bias=bias, **params)  # type: ignore[arg-type]
        return tiny.generate("Go", asked, use_tqdm=False)[0].outputs[0].text

    d_before_e = {70: 60.0, 71: 50.0}
    assert text(d_before_e) == "d" * 8
    assert text(d_before_e, bad_words=["d"]) == "e" * 8
    assert text(d_before_e, bad_words=["dd"]) == "dededede"
    assert "e" in text(d_before_e, frequency_penalty=2.0)
    assert "e" in text({70: 60.0, 71: 59.0}, presence_penalty=2.0)
    assert text({}, repetition_penalty=100.0) != text({}) != text({}, presence_penalty=-2.0)


def test_log_probabilities_are_the_models(checkpoint: Path, tiny: LLM) -> None:
    """Without it log-probabilities could be off by a place, or those of another token."""
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval().float()
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=6, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    # Asked twice: the second finds the prompt's pages in the cache.
    for output in (tiny.generate("Log-probabilities", params, use_tqdm=False)[0] for _ in range(2)):
        completion = output.outputs[0]
        tokens = output.prompt_token_ids + completion.token_ids
        with torch.inference_mode():
            expected = torch.log_softmax(model(torch.tensor([tokens])).logits[0], dim=-1)
        assert output.prompt_logprobs is not None and completion.logprobs is not None
        assert output.prompt_logprobs[0] is None
        reported = [*output.prompt_logprobs[1:], *completion.logprobs]
        assert len(reported) == len(tokens) - 1
        for position, (token, found) in enumerate(zip(tokens[1:], reported, strict=True)):
            assert found is not None
            row = expected[position]
            for token_id, logprob in found.items():
                assert logprob.logprob == pytest.approx(float(row[token_id]), abs=1e-3)
            assert found[token].rank == int((row > row[token]).sum()) + 1
            assert int(row.argmax()) in found
            assert len(found) in ((2, 3) if position < len(output.prompt_token_ids) - 1 else (3, 4))
        total = sum(
            float(expected[len(output.prompt_token_ids) - 1 + i][t]) for i, t in enumerate(completion.token_ids)
        )
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-2)
    (plain,) = tiny.generate("x", GREEDY, use_tqdm=False)
    assert plain.prompt_logprobs is plain.outputs[0].logprobs is plain.outputs[0].cumulative_logprob is None


def test_more_prompts_than_a_servers_queue_takes(tiny: LLM) -> None:
    """Without it a large job would be refused, as a server must refuse it."""
    outputs = tiny.generate([[1 + i % 200] for i in range(1100)], SamplingParams(temperature=0, max_tokens=1))
    assert [output.prompt_token_ids for output in outputs] == [[1 + i % 200] for i in range(1100)]


def test_max_tokens_none_fills_the_context(tiny: LLM) -> None:
    """Without it an output would end long before its context does."""
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    assert len(tiny.generate([[5] * 200], params, use_tqdm=False)[0].outputs[0].token_ids) == 56


def test_priorities(checkpoint: Path) -> None:
    """Without it what is urgent would wait behind what is not."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(checkpoint, dtype="float32", max_model_len=64, max_num_seqs=1) as llm:
        outputs = llm.generate(["a", "b", "c"], params, use_tqdm=False, priority=[0, 1, 2])
    seconds = [output.metrics.seconds for output in outputs]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        (["fine", "x" * 300], GREEDY, r"prompts\[1\]: the prompt has 300 tokens and the model's context 256"),
        (["fine", [5, 259]], GREEDY, r"prompts\[1\]\[1\] is 259: this model's token ids lie in \[0, 258\]"),
        ([[-1]], GREEDY, r"prompts\[0\]\[0\] is -1"),
        (["fine", ""], GREEDY, r"prompts\[1\] is empty"),
        (["fine", 5.5], GREEDY, r"prompts\[1\] is 5.5: give a text or a list of token ids"),
        (5, GREEDY, "prompts is 5"),
        ({"prompt_ids": [5]}, GREEDY, "did you mean prompt_token_ids"),
        ({"cache_salt": "x"}, GREEDY, "give prompt or prompt_token_ids"),
        (["fine", "a"], SamplingParams(stop_token_ids=[999]), r"prompts\[0\]: stop.stop_token_ids holds token 999"),
        ("fine", SamplingParams(logit_bias={999: 1.0}), "logit_bias holds token 999"),
        ("fine", {"temperature": 0}, "give SamplingParams"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    tiny: LLM, prompts: object, params: object, words: str
) -> None:
    """Without it a mistake in the last prompt would cost the work on all before it, or be left in the queue."""
    steps = tiny.metrics().steps
    with pytest.raises(InvalidRequestError, match=words):
        tiny.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
    metrics = tiny.metrics()
    assert (metrics.steps, metrics.running, metrics.waiting, metrics.pages_used) == (steps, 0, 0, 0)
    assert tiny.generate("a", GREEDY, use_tqdm=False)[0].outputs[0].token_ids


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """A shell starts background jobs deaf to Ctrl-C, and the tests may be one."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_leaves_it_usable(tiny: LLM) -> None:
    """Without it an interrupted call would leave its requests running, or a step half done."""
    expected = tokens_of(tiny.generate(TEXTS, GREEDY, use_tqdm=False))
    done = threading.Event()

    def press() -> None:
        while not done.is_set() and not tiny.metrics().running:
            done.wait(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            tiny.generate([[9, 8, 7]] * 3000, SamplingParams(max_tokens=200, ignore_eos=True), use_tqdm=False)
    finally:
        done.set()
        thread.join()
    metrics = tiny.metrics()
    assert metrics.running == metrics.waiting == metrics.pages_used == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert tokens_of(tiny.generate(TEXTS, GREEDY, use_tqdm=False)) == expected


def test_one_output_that_fails_takes_no_other_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without it hours of work could be lost to one prompt, or a failure pass for an end."""
    folder = tiny_checkpoint(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][200] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with LLM(folder, dtype="float32", max_model_len=64) as llm:
        good, bad = llm.generate([[5, 6], [5, 200]], SamplingParams(temperature=0, logit_bias={200: -100.0}))
        assert good.outputs[0].error is None and good.outputs[0].token_ids
        assert bad.outputs[0].finish_reason == "error" and isinstance(bad.outputs[0].error, InternalError)
        assert "not finite" in caplog.text
        assert llm.metrics().pages_used == 0


def test_a_broken_step_is_not_built_upon(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a batch in an unknown state would go on to give wrong answers."""
    llm = LLM(checkpoint, dtype="float32", max_model_len=64)

    def fail(*arguments: object, **options: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(CpuRunner, "launch", fail)
    with pytest.raises(MemoryError):
        llm.generate("a", GREEDY, use_tqdm=False)
    monkeypatch.undo()
    with pytest.raises(InternalError, match="MemoryError: no more"):
        llm.generate("a", GREEDY, use_tqdm=False)
    llm.close()


def test_closed_ones_say_so(checkpoint: Path) -> None:
    """Without it using one after its block would fail in some odd place."""
    with LLM(checkpoint, dtype="float32", max_model_len=64) as llm:
        pass
    llm.close()
    with pytest.raises(InvalidRequestError, match="closed"):
        llm.generate("a", GREEDY, use_tqdm=False)


def test_the_progress_bar_counts_prompts(tiny: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it a long job would not tell how far it is."""
    tiny.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""
    tiny.generate(["a", "b"], GREEDY)
    assert "2/2" in (shown := capsys.readouterr().err) and "tok/s" in shown
