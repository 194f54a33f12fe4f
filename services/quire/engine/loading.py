"""From a CoreConfig to an EngineCore: finds the model, loads it, sizes the pages, connects the sidecar.

Who calls this: the core process, and the offline API.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from quire.engine.config import CPU_KV_CACHE_BYTES, CoreConfig, Dtype, LoadFormat, Speculation
from quire.engine.core import EngineCore
from quire.engine.cpu_runner import CpuRunner
from quire.engine.gpu.eagle import GpuEagle, load_gpu_eagle
from quire.engine.gpu.loading import choose_device, choose_kv_dtype, load_part, new_runner, size_pages
from quire.engine.masks import MaskSource
from quire.engine.messages import Ready
from quire.engine.models.config import ModelConfig
from quire.engine.models.gpu_decoder import GpuDecoder
from quire.engine.models.model import ModelDtype
from quire.engine.models.registry import load_model, open_weights
from quire.engine.page_pool import PagePool
from quire.engine.parallel.leader import Leader
from quire.engine.parallel.messages import Begin, Loaded, Measure, Measured
from quire.engine.parallel.ranks import OnLost, Ranks
from quire.engine.parallel.shards import Shard
from quire.engine.runner import Runner
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.engine.sequence import pages_for
from quire.engine.speculation.drafts import DraftSource
from quire.engine.speculation.eagle.drafter import EagleDrafter
from quire.engine.speculation.eagle.head import load_eagle
from quire.engine.speculation.speculator import SpeculationConfig, Speculator
from quire.service.checkpoint.locate import Checkpoint, locate
from quire.service.errors import ConfigError

# What the masks of drafts may take of the memory that is shared with the sidecar.
_DRAFT_MASK_BYTES = 32 << 20
# Of a step on a GPU: each takes a row of logits.
_GPU_DRAFT_TOKENS = 1024
# How long a step waits for drafts, in seconds: a tenth of what one takes on a CPU, and on a GPU.
_CPU_DRAFT_PATIENCE_S, _GPU_DRAFT_PATIENCE_S = 0.005, 0.001

Progress = Callable[[float, str], None]
MakeMasks = Callable[[ModelConfig], MaskSource]
MakeDrafts = Callable[[], DraftSource]


@dataclass(frozen=True, slots=True)
class LoadedCore:
    """A core that can step, and what to tell about it."""

    core: EngineCore
    ready: Ready


def load_core(
    config: CoreConfig,
    progress: Progress,
    make_masks: MakeMasks | None = None,
    make_drafts: MakeDrafts | None = None,
    on_lost: OnLost | None = None,
) -> LoadedCore:
    """Loads what `config` names; raises ConfigError or ModelError with what to change. `progress` gets 0 to 1.

    Masks come from what `make_masks` makes for the model, if it is given, and else from the sidecar, if there is one;
    with speculation drafts come from what `make_drafts` makes in the same way. `on_lost` hears, in a thread of its own,
    if a process that computes a part of the model is lost; without it the next step raises the error.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    began = time.perf_counter()
    checkpoint = locate(config.model)
    gpu = choose_device(config)
    kv_dtype = choose_kv_dtype(config.kv_cache_dtype, gpu)
    speculation = _speculation(config, gpu, chosen=make_drafts is not None)
    limits = config.batch_limits(on_gpu=gpu is not None and gpu.type == "cuda")
    if speculation is not None and gpu is not None:
        limits = replace(limits, max_draft_tokens=_most_drafts(limits, speculation, _GPU_DRAFT_TOKENS))
    with ExitStack() as on_error:
        if gpu is None:
            loaded = _load_cpu(config, checkpoint, limits, progress)
        elif config.tensor_parallel_size == 1:
            loaded = _load_gpu(gpu, kv_dtype, config, checkpoint, limits, progress)
        else:
            loaded = _load_ranks(gpu, kv_dtype, config, checkpoint, limits, progress, on_lost)
        on_error.callback(loaded.runner.close)
        pool = PagePool(loaded.num_pages)
        limits = replace(limits, max_model_len=loaded.max_model_len, drafter_in_pages=gpu is not None and loaded.drafts)
        if speculation is not None and config.sidecar:
            limits = replace(limits, max_draft_tokens=_maskable_drafts(limits, speculation, loaded.model.vocab_size))
        scheduler = Scheduler(limits, pool, frozenset(loaded.model.eos_token_ids))
        if make_masks is None and config.sidecar:
            make_masks = partial(_sidecar_masks, config, limits.max_num_seqs + (limits.max_draft_tokens or 0))
        masks = make_masks(loaded.model) if make_masks is not None else None
        if make_drafts is None and config.sidecar:
            patience_s = _CPU_DRAFT_PATIENCE_S if gpu is None else _GPU_DRAFT_PATIENCE_S
            make_drafts = partial(_sidecar_drafts, config, patience_s)
        speculator = None
        if speculation is not None:
            source = make_drafts() if make_drafts is not None else None
            speculator = Speculator(source, speculation, on_device=loaded.drafts)
        core = EngineCore(
            loaded.runner, scheduler, masks, loaded.model.vocab_size, run_ahead=gpu is not None, speculator=speculator
        )
        seconds = {"model": loaded.weights_at - began, "pages": time.perf_counter() - loaded.weights_at}
        ready = Ready(
            model=checkpoint.name,
            device=loaded.runner.info,
            max_model_len=loaded.max_model_len,
            max_num_seqs=limits.max_num_seqs,
            num_pages=loaded.num_pages,
            start_seconds=seconds,
        )
        on_error.pop_all()
        return LoadedCore(core, ready)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A device's part of a core; `weights_at` is on time.perf_counter's clock. `drafts`: the runner has a drafter."""

    runner: Runner
    model: ModelConfig
    num_pages: int
    max_model_len: int
    weights_at: float
    drafts: bool


def _load_cpu(config: CoreConfig, checkpoint: Checkpoint, limits: SchedulerConfig, progress: Progress) -> _Loaded:
    dtype = ModelDtype.FLOAT32 if config.dtype is Dtype.FLOAT32 else ModelDtype.BFLOAT16
    dummy = config.load_format is LoadFormat.DUMMY
    model = load_model(checkpoint.path, checkpoint.format, dtype, progress, dummy=dummy)
    weights_at = time.perf_counter()
    max_model_len = _max_model_len(config, model.config)
    num_bytes = config.kv_cache_bytes or CPU_KV_CACHE_BYTES
    num_pages = _num_pages(
        config.num_pages or num_bytes // model.kv_page_bytes, limits, max_model_len, model.kv_page_bytes
    )
    drafter = None
    if config.speculative_model:
        head = load_eagle(Path(config.speculative_model), model, dtype)
        drafter = EagleDrafter(head, limits.max_num_seqs)
    runner = CpuRunner(model, num_pages, limits.max_num_seqs, max_model_len, dtype.value, drafter)
    return _Loaded(runner, model.config, num_pages, max_model_len, weights_at, drafter is not None)


def _load_gpu(
    gpu: torch.device,
    kv_dtype: torch.dtype | None,
    config: CoreConfig,
    checkpoint: Checkpoint,
    limits: SchedulerConfig,
    progress: Progress,
) -> _Loaded:
    model = load_part(config, checkpoint, gpu, kv_dtype, progress)
    head = _load_head(config, model)
    weights_at = time.perf_counter()
    max_model_len = _max_model_len(config, model.config)
    progress(1.0, "sizing the cache")
    num_pages = size_pages(config, model, limits, max_model_len, head)
    num_pages = _num_pages(num_pages, limits, max_model_len, _page_bytes(model, head))
    runner = new_runner(config, model, num_pages, limits, max_model_len, head)
    return _Loaded(runner, model.config, num_pages, max_model_len, weights_at, head is not None)


def _load_ranks(
    gpu: torch.device,
    kv_dtype: torch.dtype | None,
    config: CoreConfig,
    checkpoint: Checkpoint,
    limits: SchedulerConfig,
    progress: Progress,
    on_lost: OnLost | None,
) -> _Loaded:
    """As `_load_gpu`, on all ranks: this one, 0, loads its part of the model, and the head."""
    # Whether the model can be divided is known before anything is started.
    _, whole, _ = open_weights(checkpoint.path, checkpoint.format, progress)
    Shard(0, config.tensor_parallel_size).config(whole)
    max_model_len = _max_model_len(config, whole)
    progress(0.0, f"waiting for {config.tensor_parallel_size} ranks")
    ranks = Ranks.gather(config, gpu, on_lost)
    try:
        model = load_part(config, checkpoint, gpu, kv_dtype, progress, ranks.group)
        head = _load_head(config, model)
        ranks.expect(Loaded)
        weights_at = time.perf_counter()
        progress(1.0, "sizing the cache")
        ranks.send(Measure(limits, max_model_len))
        with ranks.watched():
            num_pages = size_pages(config, model, limits, max_model_len, head)
        num_pages = min(num_pages, *(measured.num_pages for measured in ranks.expect(Measured)))
        num_pages = _num_pages(num_pages, limits, max_model_len, _page_bytes(model, head))
        ranks.send(Begin(num_pages))
        runner = new_runner(config, model, num_pages, limits, max_model_len, head)
    except BaseException:
        ranks.close()
        raise
    leader = Leader(runner, ranks)
    return _Loaded(leader, model.config, num_pages, max_model_len, weights_at, head is not None)


def _page_bytes(model: GpuDecoder, head: GpuEagle | None) -> int:
    return model.kv_page_bytes + (head.kv_page_bytes if head is not None else 0)


def _load_head(config: CoreConfig, model: GpuDecoder) -> GpuEagle | None:
    if not config.speculative_model:
        return None
    return load_gpu_eagle(Path(config.speculative_model), model, dummy=config.load_format is LoadFormat.DUMMY)


def _speculation(config: CoreConfig, gpu: torch.device | None, *, chosen: bool) -> SpeculationConfig | None:
    """`chosen`: who calls brings drafts."""
    if config.speculation is not Speculation.AUTO:
        return None
    # The default model's steps are so short on a GPU that what the host does for drafts costs more than they save, and
    # the host's own drafts hold up a device that runs ahead. So it drafts only where someone asks for it.
    if gpu is not None and not chosen and not config.speculative_model:
        return None
    num_siblings = config.num_siblings if gpu is not None else 0
    return SpeculationConfig(config.num_speculative_tokens, num_siblings=num_siblings)


def _max_model_len(config: CoreConfig, model: ModelConfig) -> int:
    if config.max_model_len > model.max_model_len:
        raise ConfigError(
            f"--max-model-len is {config.max_model_len} and the model's context is {model.max_model_len}: lower it",
            field="max_model_len",
        )
    return config.max_model_len or model.max_model_len


def _num_pages(num_pages: int, limits: SchedulerConfig, max_model_len: int, page_bytes: int) -> int:
    # More than this can't be in use at once, and a small model would otherwise reserve what it never touches.
    num_pages = min(num_pages, 2 * limits.max_num_seqs * pages_for(max_model_len))
    if num_pages < pages_for(max_model_len):
        raise ConfigError(
            f"{num_pages} pages of {page_bytes} bytes hold less than one context of {max_model_len} tokens "
            f"({pages_for(max_model_len)} pages): raise --kv-cache-bytes to {pages_for(max_model_len) * page_bytes} "
            f"or lower --max-model-len",
            field="kv_cache_bytes",
        )
    return num_pages


def _most_drafts(limits: SchedulerConfig, speculation: SpeculationConfig, most: int) -> int:
    """Drafts of a step: those of a full batch, or `most`."""
    wanted = limits.max_num_seqs * max(speculation.num_tokens + speculation.num_siblings, speculation.num_forced)
    return min(wanted, most if limits.max_draft_tokens is None else min(most, limits.max_draft_tokens))


def _maskable_drafts(limits: SchedulerConfig, speculation: SpeculationConfig, vocab_size: int) -> int:
    """Each draft takes a row of masks, twice as there may be two steps in flight."""
    row_bytes = 4 * -(-vocab_size // 32)
    return _most_drafts(limits, speculation, _DRAFT_MASK_BYTES // (2 * row_bytes))


def _sidecar_drafts(config: CoreConfig, patience_s: float) -> DraftSource:
    # As below.
    from quire.engine.sidecar_drafts import SidecarDrafts

    return SidecarDrafts(config.sidecar, patience_s)


def _sidecar_masks(config: CoreConfig, max_rows: int, model: ModelConfig) -> MaskSource:
    # The offline API runs without gRPC, so this module must not need it.
    from quire.engine.sidecar_masks import SidecarMasks

    return SidecarMasks(config.sidecar, model.vocab_size, max_rows, config.sidecar_deadline_s)
