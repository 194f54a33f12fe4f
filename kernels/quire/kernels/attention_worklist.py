"""The list of what a step's attention has to do, made on the GPU from lengths that only the GPU knows.

`quire.kernels.paged_attention_triton` launches one program per item of a list and KV head. An item is a tile of one
sequence's queries and a part of the keys that they see: long contexts are cut into parts while there are too few tiles
to fill the GPU (Flash-Decoding, Dao et al., 2023). A list has room for the most items that a batch within its
`AttentionLimits` can need, so a captured graph serves every such batch.

Short queries (decodes) and long ones (prefill chunks) want different tiles, so there are up to two lists a step.
"""
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels._triton import ceil_div, jit, next_power_of_2, tl
from quire.kernels.draft_trees import DraftTrees
from quire.kernels.prefix_groups import PrefixGroups

# What `_list_kernel` writes for an item, in this order: the sequence's row in the block tables; its first query's row
# and position; how many queries; the first key and the last plus one; the slot of the tile's first part, or -1 if its
# context is whole; which part this is; of how many. With trees of drafts then the place of the first leaf, a large
# number if there is none, and how many tokens the trunk has.
ITEM_FIELDS = 9
_TREE_FIELDS = 2
_NO_LEAF = 2**30

_ANY = 2**30  # queries: so that limits differ without another compilation
_MANY_SEQS, _MORE_SEQS = 32, 96


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """A layer's heads; `window` is how many of the last keys a query sees, itself included, 0 for all."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    window: int = 0

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads != 0:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, and they are {self}")
        if self.window < 0:
            raise ValueError(f"window must be 0 (all keys) or positive, and is {self.window}")

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class AttentionLimits:
    """The largest batch that a launch, and so a captured graph, must serve."""

    max_tokens: int
    max_seqs: int
    max_query_len: int  # of one sequence
    decode_query_len: int = 1  # sequences of up to this many queries are decodes: 1 + drafts where there are drafts
    max_chunks: int | None = None  # sequences of more; as many as fit if None

    def __post_init__(self) -> None:
        if not 1 <= self.decode_query_len <= self.max_query_len <= self.max_tokens or self.max_seqs < 1:
            raise ValueError(
                f"1 ≤ decode_query_len ≤ max_query_len ≤ max_tokens and max_seqs ≥ 1 do not hold for {self}"
            )


@dataclass(frozen=True, slots=True)
class Tile:
    """How one launch cuts its work."""

    rows: int  # queries × the heads that share a KV head, padded
    keys: int  # read at a time
    num_warps: int
    num_stages: int  # of `keys` each, in flight
    programs_per_sm: int  # contexts are cut while there are fewer than this
    min_part: int  # keys: a smaller part is not worth combining
    max_registers: int = 0  # of a thread, so that more programs fit a multiprocessor; 0: as the compiler likes

    def __post_init__(self) -> None:
        if self.min_part % self.keys != 0:
            raise ValueError(f"min_part must be a multiple of keys, and they are {self}")


@dataclass(frozen=True, slots=True)
class WorkList:
    """What one launch has to do in a step, and where the programs that share a context meet."""

    tile: Tile
    items: Tensor  # int32 [capacity, ITEM_FIELDS], wider with trees
    count: Tensor  # int32 [1], of items that there are
    partials: Tensor  # float32 [slots, kv_heads, rows, head_size], results over parts of a context
    lses: Tensor  # float32 [slots, kv_heads, rows], base-2 logarithms of their softmax denominators
    arrivals: Tensor  # int32 [slots, kv_heads], how many parts are done; 0 between launches


def decode_tile(group: int, query_len: int, head_size: int = 128, num_seqs: int = 1) -> Tile:
    """For few queries of a sequence: bound by reading keys and values.

    For more than one query, a key must have at most 256 bytes.
    """
    rows = max(16, next_power_of_2(group * query_len))
    if query_len > 1 and head_size <= 128:
        return Tile(rows, 128, 4, 3, 4, 128)
    if num_seqs < _MANY_SEQS:
        return Tile(rows, 64, 4, 3, 4, 64)
    # Of many sequences more programs than a multiprocessor holds wait for their turn: small ones all fit. And the more
    # there are, the more their lengths differ: longer ones are cut, so that none is left at the end.
    return Tile(rows, 64, 2, 3, 8 if num_seqs < _MORE_SEQS else 12, 128)


def prefill_tile(head_size: int) -> Tile:
    """For many queries of a sequence: bound by arithmetic."""
    return Tile(128, 64, 4, 3, 1, 1024) if head_size <= 128 else Tile(64, 32, 4, 2, 1, 1024)


def prefix_tile(head_size: int) -> Tile:
    """For the queries of all sequences that share a prefix: its keys stay in the L2 cache, arithmetic counts."""
    return Tile(64, 64, 4, 3, 2, 256) if head_size <= 128 else Tile(64, 32, 4, 2, 1, 256)


def list_work(
    query_start: Tensor,
    context_lens: Tensor,
    shape: AttentionShape,
    limits: AttentionLimits,
    table_rows: Tensor | None,
    tiles: tuple[Tile, Tile] | None,
    prefix_lens: Tensor | None = None,
    trees: DraftTrees | None = None,
) -> tuple[WorkList, ...]:
    """The lists of decodes and, if the limits allow any, of prefill chunks. Arguments: `plan_attention_triton`.

    prefix_lens int32 [S]: so many keys of each sequence are left out.
    """
    decode, prefill = tiles or (
        decode_tile(shape.group, limits.decode_query_len, shape.head_size, limits.max_seqs),
        prefill_tile(shape.head_size),
    )
    if limits.decode_query_len * shape.group > decode.rows or shape.group > prefill.rows:
        raise ValueError(
            f"{limits.decode_query_len} queries of {shape.group} heads do not fit a tile of {decode.rows} rows, "
            f"or {shape.group} heads one of {prefill.rows}"
        )
    first_long = limits.decode_query_len + 1
    num_tiles = min(limits.max_seqs, limits.max_tokens)
    given = (query_start, context_lens, shape, table_rows, prefix_lens, trees)
    lists = [_launch(decode, num_tiles, (1, limits.decode_query_len), *given)]
    if limits.max_query_len >= first_long:
        # Each chunk may end in a tile that is not full.
        num_tiles = limits.max_tokens // (prefill.rows // shape.group)
        most = limits.max_tokens if limits.max_chunks is None else limits.max_chunks
        num_tiles += min(limits.max_seqs, limits.max_tokens // first_long, most)
        lists.append(_launch(prefill, num_tiles, (first_long, _ANY), *given))
    return tuple(lists)


def list_prefix_work(groups: PrefixGroups, shape: AttentionShape, limits: AttentionLimits, tile: Tile) -> WorkList:
    """The list of what groups share: every row of a group against all of the group's keys."""
    most_groups = max(1, limits.max_seqs // 2)
    num_tiles = limits.max_tokens // (tile.rows // shape.group) + most_groups
    given = (groups.row_start, groups.lengths, shape, groups.table_rows, None, None)
    return _launch(tile, num_tiles, (1, _ANY), *given, causal=False)


def _launch(
    tile: Tile,
    num_tiles: int,
    query_range: tuple[int, int],
    query_start: Tensor,
    context_lens: Tensor,
    shape: AttentionShape,
    table_rows: Tensor | None,
    prefix_lens: Tensor | None,
    trees: DraftTrees | None,
    causal: bool = True,
) -> WorkList:
    device = query_start.device
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    # An item is a program for each KV head: this many fill the GPU.
    target = ceil_div(num_sms * tile.programs_per_sm, shape.num_kv_heads)
    # Of the parts of a context that is cut all but one are full, and there are no more full ones than the target.
    num_slots = 2 * target
    rows = (num_slots, shape.num_kv_heads, tile.rows)
    fields = ITEM_FIELDS + (0 if trees is None else _TREE_FIELDS)
    work = WorkList(
        tile=tile,
        items=torch.empty((num_tiles + target, fields), dtype=torch.int32, device=device),
        count=torch.empty(1, dtype=torch.int32, device=device),
        partials=torch.empty((*rows, shape.head_size), dtype=torch.float32, device=device),
        lses=torch.empty(rows, dtype=torch.float32, device=device),
        arrivals=torch.zeros(rows[:2], dtype=torch.int32, device=device),
    )
    _list_kernel[(work.items.shape[0],)](
        query_start,
        context_lens,
        query_start if table_rows is None else table_rows,
        query_start if prefix_lens is None else prefix_lens,
        query_start if trees is None else trees.num_drafts,
        query_start if trees is None else trees.num_siblings,
        work.items,
        work.count,
        context_lens.shape[0],
        MIN_QUERIES=query_range[0],
        MAX_QUERIES=query_range[1],
        TILE_QUERIES=tile.rows // shape.group,
        BLOCK_KEYS=tile.keys,
        MIN_PART=tile.min_part // tile.keys,
        TARGET=target,
        WINDOW=shape.window,
        HAS_ROWS=table_rows is not None,
        HAS_PREFIX=prefix_lens is not None,
        CAUSAL=causal,
        TREE=trees is not None,
        NO_LEAF=_NO_LEAF,
        FIELDS=fields,
        BLOCK_SEQS=next_power_of_2(context_lens.shape[0]),
        num_warps=4,
    )
    return work


@jit
def _tiles_and_blocks(
    queries: tl.tensor,
    length: tl.tensor,
    siblings: tl.tensor,
    MIN_QUERIES: tl.constexpr,
    MAX_QUERIES: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    TREE: tl.constexpr,
) -> tl.tensor:
    """A sequence's tiles of queries, none if another list has it, and the most blocks of keys that one of them sees."""
    mine = (queries >= MIN_QUERIES) & (queries <= MAX_QUERIES)
    tiles = tl.where(mine, tl.cdiv(queries, TILE_QUERIES), 0)
    blocks = tl.cdiv(length, BLOCK_KEYS)
    if WINDOW > 0:
        # The first block may be seen only in its last key.
        span = tl.minimum(queries, TILE_QUERIES)
        if TREE:
            # A leaf in the last tile may have one of the first positions.
            span = tl.where(siblings > 0, queries, span)
        most = tl.cdiv(span + (WINDOW + BLOCK_KEYS - 2), BLOCK_KEYS)
        blocks = tl.minimum(blocks, most)
    return tiles, tl.where(mine, blocks, 0)


@jit
def _parts(blocks: tl.tensor, part_blocks: tl.tensor) -> tl.tensor:
    """How many parts of at most `part_blocks` there are, and how many blocks each has if they are about equal."""
    fewest = tl.maximum(tl.cdiv(blocks, part_blocks), 1)
    size = tl.maximum(tl.cdiv(blocks, fewest), 1)
    return tl.cdiv(blocks, size), size


@jit
def _list_kernel(
    query_start_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    table_rows_ptr: tl.tensor,
    prefix_lens_ptr: tl.tensor,
    num_drafts_ptr: tl.tensor,
    num_siblings_ptr: tl.tensor,
    items_ptr: tl.tensor,
    count_ptr: tl.tensor,
    num_seqs: tl.tensor,
    MIN_QUERIES: tl.constexpr,
    MAX_QUERIES: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MIN_PART: tl.constexpr,
    TARGET: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    CAUSAL: tl.constexpr,
    TREE: tl.constexpr,
    NO_LEAF: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
) -> None:
    """One item a program; each looks at all sequences, which are few, and finds its own place."""
    item = tl.program_id(0)
    seq = tl.arange(0, BLOCK_SEQS)
    inside = seq < num_seqs
    starts = tl.load(query_start_ptr + seq, mask=inside, other=0)
    ends = tl.load(query_start_ptr + seq + 1, mask=inside, other=0)
    lengths = tl.load(context_lens_ptr + seq, mask=inside, other=0)
    if HAS_PREFIX:
        lengths -= tl.load(prefix_lens_ptr + seq, mask=inside, other=0)
    siblings = lengths
    if TREE:
        siblings = tl.load(num_siblings_ptr + seq, mask=inside, other=0)
    tiles, blocks = _tiles_and_blocks(
        ends - starts, lengths, siblings, MIN_QUERIES, MAX_QUERIES, TILE_QUERIES, BLOCK_KEYS, WINDOW, TREE
    )
    # With parts of this size the list is at most TARGET items longer than if no context were cut.
    part_blocks = tl.maximum(tl.cdiv(tl.sum(tiles * blocks, 0), TARGET), MIN_PART)
    parts, size = _parts(blocks, part_blocks)
    items = tiles * parts
    total = tl.sum(items, 0)
    if item == 0:
        tl.store(count_ptr, total)
    if item >= total:
        return

    index = tl.sum((tl.cumsum(items, 0) <= item).to(tl.int32), 0)
    rank = item - tl.sum(tl.where(seq < index, items, 0), 0)
    slot = tl.sum(tl.where((seq < index) & (parts > 1), items, 0), 0)
    start = tl.load(query_start_ptr + index)
    queries = tl.load(query_start_ptr + index + 1) - start
    length = tl.load(context_lens_ptr + index)
    begin = 0
    if HAS_PREFIX:
        begin = tl.load(prefix_lens_ptr + index)
    num_siblings = length
    if TREE:
        num_siblings = tl.load(num_siblings_ptr + index)
    tiles, blocks = _tiles_and_blocks(
        queries, length - begin, num_siblings, MIN_QUERIES, MAX_QUERIES, TILE_QUERIES, BLOCK_KEYS, WINDOW, TREE
    )
    parts, size = _parts(blocks, part_blocks)

    # A chunk's last tile has most keys to read: first, so that what is left at the end is small.
    tile = tiles - 1 - rank // parts
    part = rank % parts
    first = tile * TILE_QUERIES
    num_queries = tl.minimum(queries - first, TILE_QUERIES)
    position = length - queries + first
    end = position + num_queries
    if not CAUSAL:
        position = length
        end = length
    begin += part * size * BLOCK_KEYS
    if WINDOW > 0:
        earliest = position
        if TREE:
            earliest = tl.where(num_siblings > 0, length - queries, position)
        begin += tl.maximum(earliest - WINDOW + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
    table_row = index
    if HAS_ROWS:
        table_row = tl.load(table_rows_ptr + index).to(tl.int32)
    fields = items_ptr + item * FIELDS
    tl.store(fields, table_row)
    tl.store(fields + 1, start + first)
    tl.store(fields + 2, position)
    tl.store(fields + 3, num_queries)
    tl.store(fields + 4, begin)
    tl.store(fields + 5, tl.minimum(begin + size * BLOCK_KEYS, end))
    tl.store(fields + 6, tl.where(parts > 1, slot + rank // parts * parts, -1))
    tl.store(fields + 7, part)
    tl.store(fields + 8, parts)
    if TREE:
        tl.store(fields + 9, tl.where(num_siblings > 0, length - num_siblings, NO_LEAF))
        tl.store(fields + 10, tl.load(num_drafts_ptr + index))
