"""What an engine is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from quire.engine.scheduler import SchedulerConfig
from quire.service.errors import ConfigError
from quire.service.logs import LogFormat
from quire.service.tls_files import TlsFiles

# On a GPU a step of many tokens costs little more than the reading of the weights.
_GPU_NUM_SEQS = 256
_GPU_NUM_BATCHED_TOKENS = 8192
_GPU_MIXED_TOKENS = 512

MAX_SPECULATIVE_TOKENS = 64
# Of a sequence that verifies drafts attention takes at most so many rows together; more are attended to as prompts are.
MAX_VERIFIED_ROWS = 16
CPU_KV_CACHE_BYTES = 2 << 30


class Device(Enum):
    """What the model runs on. AUTO is the GPU, if torch sees one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class LoadFormat(Enum):
    """Where weights come from. DUMMY makes random ones for a folder that has only config.json, to measure speed."""

    AUTO = "auto"
    DUMMY = "dummy"


class Dtype(Enum):
    """AUTO is the fastest that the device does well: bfloat16, on a CPU over the file's own weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class KVCacheDtype(Enum):
    """In which type keys and values are kept. AUTO: the model's. FP8 (e4m3, no scales) takes half of bfloat16's memory;
    GPUs only."""

    AUTO = "auto"
    FP8 = "fp8"


class Speculation(Enum):
    """Whether tokens are drafted and verified. AUTO: as many as make the batch faster by measurement."""

    OFF = "off"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """What the core process needs: model, batch, memory, sidecar.

    `max_model_len` 0 is the model's own; `num_pages` 0 is as many as `kv_cache_bytes` hold, and that 0 is 2 GiB on a
    CPU, and on a GPU what `gpu_memory_utilization` of its memory leaves. `max_num_seqs`, `max_num_batched_tokens`
    and `max_mixed_tokens` None are the device's. `enforce_eager`: no CUDA graphs. `num_speculative_tokens` at
    most are drafted for a sequence and step; `speculative_model` is the folder of an EAGLE head for it, or empty: a GPU
    then drafts nothing, unless who loads the core brings drafts.

    `tensor_parallel_size` GPUs share the model, as many on each of `nnodes` hosts; `kv_cache_bytes` is then each one's.
    The other hosts find host 0 at `master_addr` and `master_port`; all must be there within `rendezvous_timeout_s`
    seconds.
    """

    model: str = ""
    device: Device = Device.AUTO
    dtype: Dtype = Dtype.AUTO
    load_format: LoadFormat = LoadFormat.AUTO
    max_model_len: int = 0
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_mixed_tokens: int | None = None
    max_waiting: int = 1024
    enable_prefix_caching: bool = True
    num_pages: int = 0
    kv_cache_bytes: int = 0
    kv_cache_dtype: KVCacheDtype = KVCacheDtype.AUTO
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    threads: int = 0
    sidecar: str = ""
    sidecar_deadline_s: float = 10.0
    speculation: Speculation = Speculation.OFF
    num_speculative_tokens: int = 8
    speculative_model: str = ""
    tensor_parallel_size: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = ""
    master_port: int = 29501
    rendezvous_timeout_s: float = 600.0

    @property
    def ranks_per_node(self) -> int:
        """How many of the GPUs that share the model one host has."""
        return self.tensor_parallel_size // self.nnodes

    @property
    def num_siblings(self) -> int:
        """Second choices beside a sequence's drafts that a GPU's runner can make and verify in a step: as many as
        drafts, if its attention takes them together. Ranks don't tell each other of them."""
        if not self.speculative_model or self.tensor_parallel_size > 1:
            return 0
        return min(self.num_speculative_tokens, max(0, MAX_VERIFIED_ROWS - 1 - self.num_speculative_tokens))

    @property
    def interpreted(self) -> bool:
        """Whether the GPU's code is to run on a CPU: its kernels then need Triton's interpreter."""
        return self.tensor_parallel_size > 1 and self.device is Device.CPU

    def __post_init__(self) -> None:
        for name in ("max_model_len", "num_pages", "threads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}: 0 chooses it", field=name)
        if 0 != self.kv_cache_bytes < 1 << 20:
            raise ConfigError(
                f"--kv-cache-bytes is {self.kv_cache_bytes}: it must be at least {1 << 20}, or 0 to choose it",
                field="kv_cache_bytes",
            )
        if not 1 <= self.num_speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            raise ConfigError(
                f"--num-speculative-tokens is {self.num_speculative_tokens}: it must lie in "
                f"[1, {MAX_SPECULATIVE_TOKENS}]",
                field="num_speculative_tokens",
            )
        if self.speculative_model and self.speculation is Speculation.OFF:
            raise ConfigError(
                f"--speculative-model is {self.speculative_model} and --speculation is off: set it to auto",
                field="speculation",
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"--gpu-memory-utilization is {self.gpu_memory_utilization:g}: give a share, like 0.9",
                field="gpu_memory_utilization",
            )
        self._check_ranks()
        self.batch_limits(on_gpu=False)

    def _check_ranks(self) -> None:
        size, nodes = self.tensor_parallel_size, self.nnodes
        for name in ("tensor_parallel_size", "nnodes"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1", field=name
                )
        if size % nodes:
            raise ConfigError(
                f"--nnodes is {nodes} and --tensor-parallel-size, the GPUs of all nodes together, is {size}: it must "
                f"be a multiple, such as {-(-size // nodes) * nodes}",
                field="nnodes",
            )
        if not 0 <= self.node_rank < nodes:
            raise ConfigError(
                f"--node-rank is {self.node_rank} and --nnodes is {nodes}: it must lie in [0, {nodes - 1}]",
                field="node_rank",
            )
        if nodes > 1 and not self.master_addr:
            raise ConfigError(
                f"--nnodes is {nodes} and --master-addr is empty: give the address at which the others reach node 0",
                field="master_addr",
            )
        if not 1 <= self.master_port <= 65535:
            raise ConfigError(f"--master-port is {self.master_port}: it must lie in [1, 65535]", field="master_port")
        if not self.rendezvous_timeout_s > 0:
            raise ConfigError(
                f"--rendezvous-timeout is {self.rendezvous_timeout_s:g}: it must be above 0 seconds",
                field="rendezvous_timeout_s",
            )
        if self.interpreted and self.dtype is Dtype.BFLOAT16:
            raise ConfigError(
                f"--dtype is bfloat16 and --tensor-parallel-size {size} on a CPU, where kernels are interpreted in "
                "float32 only: leave it out",
                field="dtype",
            )

    def batch_limits(self, *, on_gpu: bool) -> SchedulerConfig:
        """The batch's limits on a device; of the two that belong together one that is not set follows the other.

        Raises ConfigError for values that can't be used.
        """
        default = SchedulerConfig(_GPU_NUM_SEQS, _GPU_NUM_BATCHED_TOKENS) if on_gpu else SchedulerConfig()
        num_seqs, num_tokens = self.max_num_seqs, self.max_num_batched_tokens
        if num_seqs is None:
            num_seqs = default.max_num_seqs
            if num_tokens is not None:
                num_seqs = max(1, min(num_seqs, num_tokens))
        if num_tokens is None:
            num_tokens = max(default.max_num_batched_tokens, num_seqs)
        mixed_tokens = self.max_mixed_tokens
        if mixed_tokens is None:
            mixed_tokens = _GPU_MIXED_TOKENS if on_gpu else 0
        return SchedulerConfig(
            max_mixed_tokens=mixed_tokens,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=num_tokens,
            max_waiting=self.max_waiting,
            enable_prefix_caching=self.enable_prefix_caching,
        )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The whole service: where it listens, what it is called, and its core."""

    listen: str
    name: str = "engine-0"
    metrics_port: int = 0
    grace_s: float = 30.0
    # A core that has work and ends no step for so long, nor begins to compile a kernel, hangs.
    step_timeout_s: float = 120.0
    log_level: str = "info"
    log_format: LogFormat = LogFormat.TEXT
    core: CoreConfig = field(default_factory=CoreConfig)
    # For routers; None: plain text. How often the files are looked at, in seconds.
    tls: TlsFiles | None = None
    reload_interval: float = 1.0

    def __post_init__(self) -> None:
        if not self.reload_interval > 0:
            raise ConfigError(
                f"--reload-interval is {self.reload_interval}: it must be above 0 seconds", field="reload_interval"
            )
        if not self.step_timeout_s > 0:
            raise ConfigError(
                f"--step-timeout is {self.step_timeout_s:g}: it must be above 0 seconds", field="step_timeout"
            )
        if not 0 <= self.metrics_port < 65536:
            raise ConfigError(
                f"--metrics-port is {self.metrics_port}: give a port from 1 to 65535, or 0 for none",
                field="metrics_port",
            )
