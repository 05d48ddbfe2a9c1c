"""Prefill: chunks of several queries per sequence, causal against all rows that the sequence holds.

FlashAttention (Dao 2023) over paged rows. A tile holds the queries of several tokens and of all heads of a KV head, so
that groups of any size fill it and share every row that is loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import head_stride
from .tiles import ALL, attend_tiles, load_queries, nothing_seen, padded_dim, visible_tiles


@triton.jit
def sequence_of_tile(query_start_loc_ptr, num_seqs, tile, BLOCK_Q: tl.constexpr):
    """The sequence that a tile of queries belongs to, by bisection.

    Sequence s has the tiles from `query_start_loc[s] // BLOCK_Q + s` on, which are never fewer than it needs.
    """
    low, high = tl.full([], 0, tl.int32), num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc_ptr + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def prefill_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD_DIM]; tokens query_stride apart
    out_ptr,  # the same, contiguous
    key_ptr,  # block 0's keys of the layer, [num_kv_heads, BLOCK_SIZE, HEAD_DIM] or as `kv_layout.py` has them
    value_ptr,
    block_tables_ptr,  # [num_seqs, table_stride]
    query_start_loc_ptr,  # [num_seqs + 1]
    kv_lens_ptr,  # [num_seqs]
    num_seqs,
    query_stride,
    block_stride,  # elements from one block to the next
    table_stride,
    scale,
    far,  # FarTensors or None
    GROUP: tl.constexpr,  # query heads per KV head, of which a program takes HEADS
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,  # of the tile: ROWS // HEADS tokens by HEADS heads
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK: tl.constexpr,  # MaskConstants
):
    """Grid (num_tokens // (ROWS // HEADS) + num_seqs, num_kv_heads * ceil(GROUP / HEADS)). Sequences of one query are
    left to the decode kernels."""
    BLOCK_Q: tl.constexpr = ROWS // HEADS
    HEAD_TILES: tl.constexpr = triton.cdiv(GROUP, HEADS)
    seq = sequence_of_tile(query_start_loc_ptr, num_seqs, tl.program_id(0), BLOCK_Q).to(tl.int64)
    start = tl.load(query_start_loc_ptr + seq)
    num_queries = tl.load(query_start_loc_ptr + seq + 1) - start
    first = (tl.program_id(0) - (start // BLOCK_Q + seq.to(tl.int32))) * BLOCK_Q
    if (num_queries < 2) | (first >= num_queries):
        return
    num_before = tl.load(kv_lens_ptr + seq) - num_queries

    kv_head = tl.program_id(1) // HEAD_TILES
    num_heads = tl.num_programs(1) // HEAD_TILES * GROUP
    offs_m = tl.arange(0, ROWS)
    query = first + offs_m // HEADS
    head_in_group = tl.program_id(1) % HEAD_TILES * HEADS + offs_m % HEADS
    query_mask = (offs_m < BLOCK_Q * HEADS) & (query < num_queries) & (head_in_group < GROUP)
    head = kv_head * GROUP + head_in_group
    token = (start + query).to(tl.int64)
    q = load_queries(query_ptr, token, query_stride, head, query_mask, HEAD_DIM)  # [ROWS, padded_dim]
    oldest = num_before + first
    end = num_before + tl.minimum(first + BLOCK_Q, num_queries)
    num_tiles, num_skipped = visible_tiles(oldest, end, TILE_N, MASK)
    far_q = None
    if far is not None:
        far_q = load_queries(far.query, token, far.stride, head, query_mask & (end > MASK.window), HEAD_DIM)
    offs_head = kv_head * head_stride(key_ptr.dtype.element_ty, BLOCK_SIZE, HEAD_DIM)
    acc, row_max, row_sum = nothing_seen(q)
    acc, _, row_sum = attend_tiles(
        q, far_q, far, acc, row_max, row_sum, num_before + query, 0, num_tiles, num_skipped, oldest, end,
        block_tables_ptr + seq * table_stride, key_ptr + offs_head, value_ptr + offs_head, block_stride, scale,
        ALL, BLOCK_SIZE, HEAD_DIM, TILE_N, MASK)

    offs_d = tl.arange(0, padded_dim(HEAD_DIM))
    mask = query_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    # Rows of the padding have seen something too, or nothing: neither is stored.
    out = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    offs_out = ((token * num_heads + head) * HEAD_DIM)[:, None] + offs_d[None, :]
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask)
