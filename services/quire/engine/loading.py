"""From a CoreConfig to an EngineCore: finds the model, loads it, sizes the pages, connects the sidecar.

Who calls this: the core process, and the offline API.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from quire.engine.config import CoreConfig, Dtype
from quire.engine.core import EngineCore
from quire.engine.cpu_runner import CpuRunner
from quire.engine.masks import MaskSource
from quire.engine.messages import Ready
from quire.engine.models.config import ModelConfig
from quire.engine.models.model import ModelDtype
from quire.engine.models.registry import load_model
from quire.engine.page_pool import PagePool
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.engine.sequence import pages_for
from quire.service.checkpoint.locate import locate
from quire.service.errors import ConfigError

Progress = Callable[[float, str], None]
MakeMasks = Callable[[ModelConfig], MaskSource]


@dataclass(frozen=True, slots=True)
class LoadedCore:
    """A core that can step, and what to tell about it."""

    core: EngineCore
    ready: Ready


def load_core(config: CoreConfig, progress: Progress, make_masks: MakeMasks | None = None) -> LoadedCore:
    """Loads what `config` names; raises ConfigError or ModelError with what to change. `progress` gets 0 to 1.

    Masks come from what `make_masks` makes for the model, if it is given, and else from the sidecar, if there is one.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    began = time.perf_counter()
    checkpoint = locate(config.model)
    dtype = ModelDtype.FLOAT32 if config.dtype is Dtype.FLOAT32 else ModelDtype.BFLOAT16
    model = load_model(checkpoint.path, checkpoint.format, dtype, progress)
    loaded = time.perf_counter()

    max_model_len = _max_model_len(config, model.config)
    num_pages = _num_pages(config, max_model_len, model.kv_page_bytes)
    pool = PagePool(num_pages)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=max_model_len,
            max_waiting=config.max_waiting,
            enable_prefix_caching=config.enable_prefix_caching,
        ),
        pool,
        frozenset(model.config.eos_token_ids),
    )
    runner = CpuRunner(model, num_pages, config.max_num_seqs, max_model_len, dtype.value)
    if make_masks is None and config.sidecar:
        make_masks = partial(_sidecar, config)
    masks = make_masks(model.config) if make_masks is not None else None
    core = EngineCore(runner, scheduler, masks, model.config.vocab_size)
    ready = Ready(
        model=checkpoint.name,
        device=runner.info,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        num_pages=num_pages,
        start_seconds={"model": loaded - began, "pages": time.perf_counter() - loaded},
    )
    return LoadedCore(core, ready)


def _max_model_len(config: CoreConfig, model: ModelConfig) -> int:
    if config.max_model_len > model.max_model_len:
        raise ConfigError(
            f"--max-model-len is {config.max_model_len} and the model's context is {model.max_model_len}: lower it",
            field="max_model_len",
        )
    return config.max_model_len or model.max_model_len


def _num_pages(config: CoreConfig, max_model_len: int, page_bytes: int) -> int:
    num_pages = config.num_pages or config.kv_cache_bytes // page_bytes
    # More than this can't be in use at once, and a small model would otherwise reserve what it never touches.
    num_pages = min(num_pages, 2 * config.max_num_seqs * pages_for(max_model_len))
    if num_pages < pages_for(max_model_len):
        raise ConfigError(
            f"{num_pages} pages of {page_bytes} bytes hold less than one context of {max_model_len} tokens "
            f"({pages_for(max_model_len)} pages): raise --kv-cache-bytes to {pages_for(max_model_len) * page_bytes} "
            f"or lower --max-model-len",
            field="kv_cache_bytes",
        )
    return num_pages


def _sidecar(config: CoreConfig, model: ModelConfig) -> MaskSource:
    # The offline API runs without gRPC, so this module must not need it.
    from quire.engine.sidecar_masks import SidecarMasks

    return SidecarMasks(config.sidecar, model.vocab_size, config.max_num_seqs, config.sidecar_deadline_s)
