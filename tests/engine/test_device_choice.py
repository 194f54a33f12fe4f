"""Which device a core runs on and what its limits are, and what is said where that can't be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from quire.engine.config import CoreConfig, Device, KVCacheDtype, LoadFormat
from quire.engine.gpu.loading import choose_gpu, choose_kv_dtype
from quire.engine.gpu.runner import GpuRunner
from quire.engine.loading import load_core
from quire.engine.models.dummy import DummyWeights
from quire.engine.models.gpu_decoder import GpuDecoder
from quire.engine.models.model import ModelDtype
from quire.engine.models.registry import load_gpu_model
from quire.engine.plan import Admission, PageGrant, StepPlan, Work
from quire.kernels.pool_type import FP8
from quire.service.checkpoint.locate import CheckpointFormat
from quire.service.errors import ConfigError
from quire.service.request import SamplingParams


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    """A pod that falls back to the CPU in silence would be a hundred times slower than was asked for."""
    with pytest.raises(ConfigError, match="--device is cuda and torch sees no GPU: install a torch with CUDA"):
        choose_gpu(Device.CUDA)
    assert choose_gpu(Device.AUTO) is None and choose_gpu(Device.CPU) is None


@pytest.mark.parametrize(
    ("given", "on_gpu", "limits"),
    [
        ({}, False, (64, 512, 0)),
        ({}, True, (256, 8192, 512)),
        ({"max_num_seqs": 1000}, False, (1000, 1000, 0)),
        ({"max_num_batched_tokens": 7}, True, (7, 7, 512)),
        ({"max_num_seqs": 3, "max_num_batched_tokens": 5, "max_mixed_tokens": 4}, True, (3, 5, 4)),
    ],
)
def test_limits(given: dict[str, int], on_gpu: bool, limits: tuple[int, int, int]) -> None:
    """Whoever sets one of two that belong together means it: the other must follow, on each device from its own."""
    found = CoreConfig(**given).batch_limits(on_gpu=on_gpu)  # type: ignore[arg-type]
    assert (found.max_num_seqs, found.max_num_batched_tokens, found.max_mixed_tokens) == limits


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization is 0: give a share"),
        ({"kv_cache_bytes": 5}, "--kv-cache-bytes is 5: it must be at least"),
        ({"num_speculative_tokens": 0}, r"--num-speculative-tokens is 0: it must lie in \[1, 64\]"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_batched_tokens 8 is less than max_num_seqs 9"),
    ],
)
def test_wrong_values(given: dict[str, float], words: str) -> None:
    """They must be refused when they are given, not when a model has been loaded for a minute."""
    with pytest.raises(ConfigError, match=words):
        CoreConfig(**given)  # type: ignore[arg-type]


def test_fp8_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They halve what pages take, and what they round is little; where they can't be had it is said, before a model is
    loaded."""
    tiny_model(tmp_path, "qwen3")
    config = CoreConfig(str(tmp_path), device=Device.CPU, kv_cache_dtype=KVCacheDtype.FP8)
    with pytest.raises(ConfigError, match="--kv-cache-dtype is fp8, which takes a GPU, and the model runs on the CPU"):
        load_core(config, lambda *_: None)
    gpu, capability = torch.device("cuda"), (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(ConfigError, match=r"capability 8.9 or newer, and this one, A100, has 8.0: leave it out"):
        choose_kv_dtype(KVCacheDtype.FP8, gpu)
    assert choose_kv_dtype(KVCacheDtype.AUTO, gpu) is None
    capability = (9, 0)
    assert choose_kv_dtype(KVCacheDtype.FP8, gpu) is FP8

    def load(kv_dtype: torch.dtype | None) -> GpuDecoder:
        given = (tmp_path, CheckpointFormat.FOLDER, ModelDtype.FLOAT32, torch.device("cpu"), lambda *_: None)
        return load_gpu_model(*given, kv_dtype=kv_dtype)

    exact, fp8 = load(None), load(FP8)
    assert exact.kv_page_bytes == 4 * fp8.kv_page_bytes
    assert all(pages.dtype is FP8 for pages in fp8.new_kv_cache(2).keys + fp8.new_kv_cache(2).values)
    first, second = (logits_of(model) for model in (exact, fp8))
    assert not torch.equal(first, second)
    assert (first - second).abs().mean() < 0.1 * first.std()


def logits_of(model: GpuDecoder) -> Tensor:
    """After each token of a prompt of 40, in two steps: the second reads what the first has stored."""
    runner = GpuRunner(model, 4, 2, 64, 64, graphs=False)
    params = SamplingParams(temperature=0.0)
    prompt = tuple(range(3, 43))
    plans = [
        StepPlan((Admission(0, prompt, 40, params),), (PageGrant(0, 0, (0, 1, 2)),), (Work(0, 0, 30, False),)),
        StepPlan((), (), (Work(0, 30, 10, True),)),
    ]
    found: list[Tensor] = []
    logits = model.logits

    def noted(hidden: Tensor) -> Tensor:
        found.append(logits(hidden))
        return found[-1].clone()

    model.logits = noted  # type: ignore[method-assign]
    for plan in plans:
        runner.launch(plan, masked=False).wait()
    return found[-1]


def test_random_weights(tmp_path: Path) -> None:
    """A folder with nothing but config.json is enough to measure speed; its model is finite and the same each time."""
    tiny_model(tmp_path, "qwen2", seed=1)
    (tmp_path / "model.safetensors").unlink()
    device = torch.device("cpu")
    first, second = (
        load_gpu_model(tmp_path, CheckpointFormat.FOLDER, ModelDtype.FLOAT32, device, lambda *_: None, dummy=True)
        for _ in range(2)
    )
    hidden = torch.ones(1, first.config.hidden_size)
    logits = first.logits(hidden)
    assert torch.isfinite(logits).all() and logits.std() > 0 and torch.equal(logits, second.logits(hidden))
    assert torch.equal(DummyWeights(tmp_path, device, torch.float32).vector("a.bias", 3), torch.zeros(3))
    told: list[str] = []
    config = CoreConfig(str(tmp_path), device=Device.CPU, load_format=LoadFormat.DUMMY, max_model_len=64)
    load_core(config, lambda _, activity: told.append(activity)).core.close()
    assert "making random weights" in told
