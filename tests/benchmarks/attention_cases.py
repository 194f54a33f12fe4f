"""Attention as `kernel_speed.py` checks and times it: prefill chunks, verifications and decodes over scattered pages.

Others compute the same where they can: torch's fused attention over contiguous keys and values, which spares it the
pages but not one byte of keys and values, and FlashInfer and vLLM's FlashAttention over the same pages where they are
installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from kernel_cases import DTYPE, PAGE_SIZE, SHAPES, Case, Shape, error_ratio, random, turns
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from quire.kernels.attention_new_tokens import attend_new_tokens_triton
from quire.kernels.attention_worklist import AttentionLimits, AttentionShape, Tile
from quire.kernels.paged_attention_triton import TritonAttentionPlan, paged_attention_triton, plan_attention_triton
from quire.kernels.prefix_groups import group_prefixes
from quire.kernels.rotary import rotary_table

POOL_TOKENS = 1 << 21
Launches = list[Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Workload:
    """A step's sequences as (queries, context length), those of equal size next to each other."""

    detail: str
    seqs: list[tuple[int, int]]
    decode_query_len: int = 1
    window: int = 0
    shared: int = 0  # tokens that all of them begin with, in the same pages


def uneven(count: int, least: int = 100, most: int = 2000) -> list[int]:
    """Lengths from `least` to `most` in no order."""
    return torch.randint(least, most + 1, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def decodes() -> Iterator[Workload]:
    for batch in (1, 8, 32, 64, 256):
        for context in (1024, 4096, 8192, 32768):
            if batch * context <= POOL_TOKENS and not (context == 8192 and batch < 256):
                yield Workload(f"{batch} decodes at {context}", [(1, context)] * batch)
    yield Workload("256 decodes at 100-2000", [(1, length) for length in uneven(256)])


OTHERS = [
    Workload("64 decodes at 8192, window 1024", [(1, 8192)] * 64, window=1024),
    Workload("64 verifications of 4 at 2048", [(4, 2048)] * 64, decode_query_len=4),
    Workload("1 verification of 8 at 32768", [(8, 32768)], decode_query_len=8),
    Workload("64 decodes at 2048, all shared", [(1, 2048 + 17)] * 64, shared=2048),
    Workload("256 decodes at 2100, 2048 shared", [(1, 2100)] * 256, shared=2048),
    Workload("256 decodes at 4096, 512 shared", [(1, 4096)] * 256, shared=512),
    Workload("prefill 2048 of 2048", [(2048, 2048)]),
    Workload("prefill 8192 of 8192", [(8192, 8192)]),
    Workload("prefill 2048 at 8192", [(2048, 8192)]),
    Workload("prefill 512 at 32768", [(512, 32768)]),
    Workload("prefill 16 × 512 of 512", [(512, 512)] * 16),
    Workload("prefill 8192 of 8192, window 1024", [(8192, 8192)], window=1024),
    Workload("mixed: 128 at 1024, 2048 of 2048", [(1, 1024)] * 128 + [(2048, 2048)]),
    Workload("mixed: 64 at 4096, 512 at 4096", [(1, 4096)] * 64 + [(512, 4096)]),
]
OF_SMALL_MODELS = ("1 decodes at 4096", "64 decodes at 1024", "256 decodes at 100-2000", "prefill 8192 of 8192")


@cache
def pool(kv_heads: int, head_size: int, pool_type: torch.dtype) -> Tensor:
    """Keys and values of as many random tokens as the largest case has."""
    size = (2, POOL_TOKENS // PAGE_SIZE, kv_heads, PAGE_SIZE, head_size)
    return torch.empty(size, device="cuda", dtype=DTYPE).normal_().to(pool_type)


class PagedInput:
    """A workload's inputs, several sets of them, and one plan; keys and values lie in the pool as `pool_type`."""

    def __init__(
        self,
        shape: Shape,
        workload: Workload,
        tiles: tuple[Tile, Tile] | None = None,
        pool_type: torch.dtype = DTYPE,
    ) -> None:
        self.seqs = workload.seqs
        self.shared = workload.shared
        self.shape = AttentionShape(shape.heads, shape.kv_heads, shape.head_size, workload.window)
        self.pages = pool(shape.kv_heads, shape.head_size, pool_type)
        self.starts = torch.tensor([0, *(count for count, _ in self.seqs)]).cumsum(0).tolist()
        lengths = [length for _, length in self.seqs]
        self.query_start = torch.tensor(self.starts, dtype=torch.int32, device="cuda")
        self.context_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.limits = AttentionLimits(
            max_tokens=self.starts[-1],
            max_seqs=len(self.seqs),
            max_query_len=max(count for count, _ in self.seqs),
            decode_query_len=workload.decode_query_len,
        )
        read = [min(length, workload.window + count - 1) if workload.window else length for count, length in self.seqs]
        token_bytes = shape.kv_heads * shape.head_size * 2 * pool_type.itemsize
        read_once = sum(read) - self.shared * (len(self.seqs) - 1)
        self.num_bytes = read_once * token_bytes + 2 * self.starts[-1] * shape.heads * shape.head_size * DTYPE.itemsize
        sights = sum(sights_of(count, length, workload.window) for count, length in self.seqs)
        self.flops = 4 * shape.heads * shape.head_size * sights
        sets = turns(self.num_bytes)
        self.tables = [self._block_tables(lengths) for _ in sets]
        self.queries = [random(self.starts[-1], shape.heads, shape.head_size) for _ in sets]
        self.use(tiles)

    def use(self, tiles: tuple[Tile, Tile] | None) -> None:
        """Plans for these tiles; None: the kernel's own."""
        plan = self.plan(tiles)
        self.plans = [replace(plan, block_tables=tables) for tables in self.tables]

    def _block_tables(self, lengths: list[int]) -> Tensor:
        pages = torch.tensor([-(-length // PAGE_SIZE) for length in lengths])
        width = -(-int(pages.max()) // 16) * 16
        there = torch.arange(width) < pages[:, None]
        tables = torch.zeros(there.shape, dtype=torch.int32)
        tables[there] = torch.randperm(POOL_TOKENS // PAGE_SIZE)[: int(pages.sum())].to(torch.int32)
        tables[:, : self.shared // PAGE_SIZE] = tables[0, : self.shared // PAGE_SIZE]
        return tables.cuda()

    def plan(self, tiles: tuple[Tile, Tile] | None = None) -> TritonAttentionPlan:
        groups = None
        if self.shared:
            groups = group_prefixes(
                self.query_start, self.context_lens, self.tables[0], None, PAGE_SIZE, self.limits.max_tokens
            )
        return plan_attention_triton(
            self.query_start, self.context_lens, self.tables[0], self.shape, self.limits, tiles=tiles, groups=groups
        )

    def run(self, index: int) -> Tensor:
        return paged_attention_triton(self.queries[index], self.pages[0], self.pages[1], self.plans[index])

    def launches(self) -> Launches:
        return [lambda index=index: self.run(index) for index in range(len(self.plans))]

    def launches_with_new_tokens(self) -> Launches:
        """The same for decodes as an engine runs them: the last key and value of each are made and written, too."""
        heads, kv_heads, size = self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_size
        table = rotary_table(int(self.context_lens.max()), 1.0 / 5e5 ** (torch.arange(0, size, 2) / size)).cuda()
        qkv = [random(self.starts[-1], heads + 2 * kv_heads, size) for _ in self.plans]
        keys, values = self.pages

        def launch(index: int) -> Tensor:
            return attend_new_tokens_triton(qkv[index], table, None, keys, values, self.plans[index])

        return [lambda index=index: launch(index) for index in range(len(self.plans))]

    def error(self) -> float:
        """Over torch's in the same precision, in some queries of some sequences."""
        poison = torch.full_like(self.queries[0], float("nan"))
        del poison  # the next allocation of this size is this memory
        out = self.run(0)
        outs, exact, by_torch = [], [], []
        for index in {0, len(self.seqs) // 3, len(self.seqs) // 2, len(self.seqs) - 2, len(self.seqs) - 1} - {-1}:
            count, length = self.seqs[index]
            rows = torch.unique(torch.cat((torch.randint(count, (30,)), torch.tensor([0, count - 1])))).cuda()
            outs.append(out[self.starts[index] + rows])
            queries = self.queries[0][self.starts[index] + rows]
            keys, values = (part[0, :, :length].transpose(0, 1) for part in self.dense(0, index, index + 1))
            for results, precision in ((exact, torch.float64), (by_torch, DTYPE)):
                args = (queries.to(precision), keys.to(precision), values.to(precision))
                results.append(definition(*args, rows + length - count, self.shape))
        return error_ratio(torch.cat(outs), torch.cat(exact), torch.cat(by_torch))

    def dense(self, turn: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Keys and values of sequences of one length, contiguous: [S, kv_heads, length, D]."""
        length = self.seqs[first][1]
        tables = self.tables[turn][first:last, : -(-length // PAGE_SIZE)]
        keys, values = (part[tables].transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous() for part in self.pages)
        return keys, values

    def groups(self) -> list[tuple[int, int]]:
        """Ranges of equal sequences."""
        edges = [i for i in range(1, len(self.seqs)) if self.seqs[i] != self.seqs[i - 1]]
        return list(zip([0, *edges], [*edges, len(self.seqs)], strict=True))


def sights_of(count: int, length: int, window: int) -> int:
    """Pairs of a query and a key that it sees."""
    return sum(min(end, window) if window else end for end in range(length - count + 1, length + 1))


def definition(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, shape: AttentionShape) -> Tensor:
    """Attention as a textbook has it, in its arguments' type: queries [T, heads, D]; keys, values [L, kv_heads, D]."""
    grouped = queries.unflatten(1, (shape.num_kv_heads, shape.group))
    scores = torch.einsum("tngd,lnd->ngtl", grouped, keys) * shape.head_size**-0.5
    key = torch.arange(len(keys), device=keys.device)
    hidden = key > positions[:, None]
    if shape.window:
        hidden |= key <= positions[:, None] - shape.window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("ngtl,lnd->tngd", weights, values).flatten(1, 2)


def by_sdpa(inputs: PagedInput, backend: SDPBackend) -> Launches:
    """torch's fused attention, a call for each size of sequence."""
    calls = []
    for first, last in inputs.groups():
        count, length = inputs.seqs[first]
        bias = None if count in (1, length) else causal_lower_right(count, length)
        per_turn = []
        for turn, queries in enumerate(inputs.queries):
            rows = queries[inputs.starts[first] : inputs.starts[last]]
            rows = rows.unflatten(0, (last - first, count)).transpose(1, 2)
            per_turn.append((rows, *inputs.dense(turn, first, last)))
        calls.append((per_turn, bias, count == length))

    def launch(turn: int) -> None:
        with sdpa_kernel(backend):
            for per_turn, bias, causal in calls:
                scaled_dot_product_attention(*per_turn[turn], attn_mask=bias, is_causal=causal, enable_gqa=True)

    return [lambda turn=turn: launch(turn) for turn in range(len(inputs.queries))]


def by_flashinfer(inputs: PagedInput) -> Launches:
    import flashinfer  # not everywhere

    launches: Launches = []
    lengths = inputs.context_lens
    pages = (lengths + PAGE_SIZE - 1) // PAGE_SIZE
    for queries, tables in zip(inputs.queries, inputs.tables, strict=True):
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(
            inputs.query_start,
            torch.cat((pages.new_zeros(1), pages.cumsum(0, dtype=torch.int32))),
            tables[torch.arange(tables.shape[1], device="cuda") < pages[:, None]],
            lengths - (pages - 1) * PAGE_SIZE,
            inputs.shape.num_heads,
            inputs.shape.num_kv_heads,
            inputs.shape.head_size,
            PAGE_SIZE,
            causal=True,
            q_data_type=DTYPE,
            window_left=inputs.shape.window - 1,
        )
        launches.append(lambda run=wrapper.run, q=queries: run(q, (inputs.pages[0], inputs.pages[1])))
    return launches


def by_vllm(inputs: PagedInput) -> Launches:
    from vllm.vllm_flash_attn import flash_attn_varlen_func  # not everywhere

    # It wants a page's tokens in front of its heads.
    keys, values = (part.transpose(1, 2).contiguous() for part in inputs.pages)

    def launch(turn: int) -> None:
        flash_attn_varlen_func(
            inputs.queries[turn],
            keys,
            values,
            inputs.limits.max_query_len,
            inputs.query_start,
            int(max(length for _, length in inputs.seqs)),
            seqused_k=inputs.context_lens,
            causal=True,
            block_table=inputs.tables[turn],
            fa_version=3,
            window_size=[inputs.shape.window - 1, 0] if inputs.shape.window else None,
        )

    return [lambda turn=turn: launch(turn) for turn in range(len(inputs.queries))]


def paged_attention_cases(shape: Shape) -> Iterator[Case]:
    for workload in [*decodes(), *OTHERS]:
        if shape is not SHAPES[0] and workload.detail not in OF_SMALL_MODELS:
            continue
        inputs = PagedInput(shape, workload)
        peers: dict[str, Callable[[], Launches]] = {
            "FlashInfer": lambda inputs=inputs: by_flashinfer(inputs),
            "FlashAttention 3": lambda inputs=inputs: by_vllm(inputs),
        }
        if not workload.window and len(inputs.groups()) <= 2:
            peers["torch flash"] = lambda inputs=inputs: by_sdpa(inputs, SDPBackend.FLASH_ATTENTION)
            peers["torch cuDNN"] = lambda inputs=inputs: by_sdpa(inputs, SDPBackend.CUDNN_ATTENTION)
        yield Case(
            model=shape.name,
            detail=workload.detail,
            num_bytes=inputs.num_bytes,
            launches=inputs.launches(),
            check=inputs.error,
            flops=inputs.flops,
            peers=peers,
        )


def attention_plan_cases(shape: Shape) -> Iterator[Case]:
    """What making the work lists takes, once a step. That they are right, attention's results show."""
    for workload in (
        Workload("1 decode", [(1, 1024)]),
        Workload("mixed 256", [(1, 1024)] * 255 + [(512, 512)]),
        Workload("256 with a shared prefix", [(1, 2100)] * 256, shared=2048),
    ):
        inputs = PagedInput(shape, workload)
        yield Case(shape.name, workload.detail, 0.0, [inputs.plan], inputs.error)
