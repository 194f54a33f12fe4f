"""Which GPU a core runs on, and how much of its memory becomes pages: what weights and the largest step leave."""

from __future__ import annotations

import gc

import torch

from quire.engine.config import CPU_KV_CACHE_BYTES, CoreConfig, Device, Dtype, KVCacheDtype, LoadFormat
from quire.engine.gpu.eagle import GpuEagle
from quire.engine.gpu.runner import GpuRunner
from quire.engine.models.gpu_decoder import GpuDecoder
from quire.engine.models.model import ModelDtype
from quire.engine.models.registry import Progress, load_gpu_model
from quire.engine.parallel.group import Group
from quire.engine.parallel.runner import ShardedRunner
from quire.engine.scheduler import SchedulerConfig
from quire.engine.sequence import pages_for
from quire.kernels._triton import interpreted
from quire.kernels.pool_type import FP8
from quire.service.checkpoint.locate import Checkpoint
from quire.service.errors import ConfigError

# For captured graphs, which need about what a step of their largest size does, and what the driver takes.
_RESERVED = 768 << 20
# Older ones convert no e4m3.
_FP8_CAPABILITY = (8, 9)


def choose_gpu(device: Device) -> torch.device | None:
    """The GPU to run on, None for the CPU; raises ConfigError if there is none and one was asked for."""
    available = device is not Device.CPU and torch.cuda.is_available()
    if device is Device.CUDA and not available:
        raise ConfigError(
            "--device is cuda and torch sees no GPU: install a torch with CUDA and check `nvidia-smi`, or use cpu",
            field="device",
        )
    return torch.device("cuda", torch.cuda.current_device()) if available else None


def choose_device(config: CoreConfig, local_rank: int = 0) -> torch.device | None:
    """What this rank's part of the model runs on, as a GPU's does; None for the CPU's own code.

    Raises ConfigError if that can't be had.
    """
    gpu, size = choose_gpu(config.device), config.tensor_parallel_size
    if size == 1:
        return gpu
    if gpu is not None:
        if torch.cuda.device_count() < config.ranks_per_node:
            raise ConfigError(
                f"--tensor-parallel-size is {size}, {config.ranks_per_node} of them on this host, where torch sees "
                f"{torch.cuda.device_count()} GPUs: lower it, or spread it over more hosts with --nnodes",
                field="tensor_parallel_size",
            )
        gpu = torch.device("cuda", local_rank)
        # Kernels are launched on the current one.
        torch.cuda.set_device(gpu)
        return gpu
    if config.device is not Device.CPU:
        raise ConfigError(
            f"--tensor-parallel-size is {size} and torch sees no GPU: lower it to 1, or set --device to cpu to try it "
            "out, slowly",
            field="tensor_parallel_size",
        )
    if not interpreted():
        raise ConfigError(
            f"--tensor-parallel-size is {size} on a CPU, which takes Triton and its interpreter: `pip install triton` "
            "and set TRITON_INTERPRET=1 in the environment before Python starts",
            field="tensor_parallel_size",
        )
    torch.set_num_threads(max(1, (config.threads or torch.get_num_threads()) // config.ranks_per_node))
    return torch.device("cpu")


def choose_kv_dtype(dtype: KVCacheDtype, gpu: torch.device | None) -> torch.dtype | None:
    """What keys and values are kept in, None for the model's type; raises ConfigError where it can't be had."""
    if dtype is KVCacheDtype.AUTO:
        return None
    if gpu is None or gpu.type == "cpu":
        raise ConfigError(
            f"--kv-cache-dtype is {dtype.value}, which takes a GPU, and the model runs on the CPU: leave it out",
            field="kv_cache_dtype",
        )
    capability = torch.cuda.get_device_capability(gpu)
    if capability < _FP8_CAPABILITY:
        raise ConfigError(
            f"--kv-cache-dtype is {dtype.value}, which takes a GPU of compute capability 8.9 or newer, and this one, "
            f"{torch.cuda.get_device_name(gpu)}, has {capability[0]}.{capability[1]}: leave it out",
            field="kv_cache_dtype",
        )
    return FP8


def load_part(
    config: CoreConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    kv_dtype: torch.dtype | None,
    progress: Progress,
    group: Group | None = None,
) -> GpuDecoder:
    """The model on `device` as `config` wants it, or this rank's part of it. Raises ModelError as `load_gpu_model`."""
    # Triton's interpreter knows no bfloat16.
    exact = config.dtype is Dtype.FLOAT32 or device.type == "cpu"
    dtype, dummy = ModelDtype.FLOAT32 if exact else ModelDtype.BFLOAT16, config.load_format is LoadFormat.DUMMY
    path, format = checkpoint.path, checkpoint.format
    return load_gpu_model(path, format, dtype, device, progress, dummy=dummy, kv_dtype=kv_dtype, group=group)


def new_runner(
    config: CoreConfig,
    model: GpuDecoder,
    num_pages: int,
    limits: SchedulerConfig,
    max_model_len: int,
    head: GpuEagle | None,
    *,
    graphs: bool = True,
) -> GpuRunner:
    """For steps within `limits`; `graphs`: if the configuration wants them, too."""
    kind = GpuRunner if model.group is None else ShardedRunner
    return kind(
        model,
        num_pages,
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
        max_model_len,
        graphs=graphs and not config.enforce_eager,
        max_draft_tokens=limits.max_draft_tokens or 0,
        num_speculative_tokens=config.num_speculative_tokens,
        num_siblings=config.num_siblings,
        head=head,
    )


def size_pages(
    config: CoreConfig, model: GpuDecoder, limits: SchedulerConfig, max_model_len: int, head: GpuEagle | None
) -> int:
    """How many pages, the head's part of them included, fit beside the weights and the largest step, which is run to
    see what it needs: on all ranks at once.

    Raises ConfigError, with the bytes that are missing, if one context does not fit.
    """
    device, max_draft_tokens = model.device, limits.max_draft_tokens or 0
    page_bytes = model.kv_page_bytes + (head.kv_page_bytes if head is not None else 0)
    if device.type == "cpu":
        return config.num_pages or (config.kv_cache_bytes or CPU_KV_CACHE_BYTES) // page_bytes
    before = torch.cuda.memory_allocated(device)
    probe = new_runner(config, model, 1, limits, max_model_len, head, graphs=False)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        probe.warm_up(limits.max_num_batched_tokens)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of --max-num-batched-tokens {limits.max_num_batched_tokens} does not fit the GPU beside the "
            "weights: lower it",
            field="max_num_batched_tokens",
        ) from error
    step_bytes = torch.cuda.max_memory_allocated(device) - before
    del probe
    gc.collect()
    torch.cuda.empty_cache()
    if config.num_pages:
        return config.num_pages
    free, total = torch.cuda.mem_get_info(device)
    # Logits in front of drafts, in the graphs' memory, too, and twice where log-probabilities are asked for.
    draft_bytes = 3 * max_draft_tokens * model.config.vocab_size * torch.float32.itemsize
    room = int(total * config.gpu_memory_utilization) - (total - free) - step_bytes - draft_bytes - _RESERVED
    num_bytes = config.kv_cache_bytes or room
    needed = pages_for(max_model_len) * page_bytes
    if num_bytes < needed:
        raise ConfigError(
            f"pages for one context of {max_model_len} tokens need {needed} bytes, and {max(num_bytes, 0)} are left of "
            f"the GPU's {total}: {needed - num_bytes} are missing; lower --max-model-len, --max-num-batched-tokens or "
            "raise --gpu-memory-utilization or --kv-cache-bytes",
            field="max_model_len",
        )
    return num_bytes // page_bytes
