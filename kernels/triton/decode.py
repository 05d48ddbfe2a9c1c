"""Decode: one query per sequence, its rows split among programs, and a second kernel that adds the splits up.

Flash-Decoding (Dao et al. 2023) over paged rows. All query heads of a KV head are packed into one tile and share every
row that is loaded. How the rows are split depends on the sequence alone, and so do the bits of the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import head_stride
from .tiles import (
    ALL,
    attend_tiles,
    far_tiles,
    load_queries,
    nothing_seen,
    padded_dim,
    visible_int4_tiles,
    visible_tiles,
)

MIN_SPLIT_TOKENS = tl.constexpr(256)


@triton.constexpr_function
def packed_rows(heads):
    """Rows of a tile of `heads` queries: a power of two that tensor cores take; those past heads are masked."""
    return max(16, triton.next_power_of_2(heads))


@triton.jit
def tiles_per_split(num_tiles, NUM_SPLITS: tl.constexpr, TILE_N: tl.constexpr):
    return tl.maximum(tl.cdiv(num_tiles, NUM_SPLITS), triton.cdiv(MIN_SPLIT_TOKENS, TILE_N))


@triton.jit(do_not_specialize=["table_stride"])
def decode_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD_DIM]; tokens query_stride apart
    key_ptr,  # block 0's keys of the layer, [num_kv_heads, BLOCK_SIZE, HEAD_DIM] or as `kv_layout.py` has them
    value_ptr,
    block_tables_ptr,  # [num_seqs, table_stride]
    query_start_loc_ptr,  # [num_seqs + 1]
    kv_lens_ptr,  # [num_seqs]
    partial_ptr,  # out: [num_seqs, num_heads, NUM_SPLITS, HEAD_DIM] float32, each split's attention
    lse_ptr,  # out: [num_seqs, num_heads, NUM_SPLITS] float32, log2 of each split's sum of exponentials
    query_stride,
    block_stride,  # elements from one block to the next
    table_stride,
    scale,
    far,  # FarTensors or None
    GROUP: tl.constexpr,  # query heads per KV head, of which a program takes HEADS
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MASK: tl.constexpr,  # MaskConstants
):
    """Grid (NUM_SPLITS, num_kv_heads * ceil(GROUP / HEADS), num_seqs). Sequences with other than one query, and splits
    that their sequence does not need, write nothing."""
    split = tl.program_id(0)
    seq = tl.program_id(2).to(tl.int64)
    token = tl.load(query_start_loc_ptr + seq)
    if tl.load(query_start_loc_ptr + seq + 1) - token != 1:
        return
    end = tl.load(kv_lens_ptr + seq)
    num_tiles, num_skipped = visible_tiles(end - 1, end, TILE_N, MASK)
    per_split = tiles_per_split(num_tiles, NUM_SPLITS, TILE_N)
    first_tile = split * per_split
    if first_tile >= num_tiles:
        return

    HEAD_TILES: tl.constexpr = triton.cdiv(GROUP, HEADS)
    kv_head = tl.program_id(1) // HEAD_TILES
    num_heads = tl.num_programs(1) // HEAD_TILES * GROUP
    offs_m = tl.arange(0, packed_rows(HEADS))
    head_in_group = tl.program_id(1) % HEAD_TILES * HEADS + offs_m
    head_mask = (offs_m < HEADS) & (head_in_group < GROUP)
    head = kv_head * GROUP + head_in_group
    q = load_queries(query_ptr, token.to(tl.int64), query_stride, head, head_mask, HEAD_DIM)  # [ROWS, padded_dim]
    far_q = None
    if far is not None:
        far_mask = head_mask & (first_tile < far_tiles(end, TILE_N, MASK))
        far_q = load_queries(far.query, token.to(tl.int64), far.stride, head, far_mask, HEAD_DIM)
    positions = tl.zeros([q.shape[0]], tl.int32) + end - 1
    offs_head = kv_head * head_stride(key_ptr.dtype.element_ty, BLOCK_SIZE, HEAD_DIM)
    acc, row_max, row_sum = nothing_seen(q)
    last_tile = tl.minimum(first_tile + per_split, num_tiles)
    acc, row_max, row_sum = attend_tiles(
        q, far_q, far, acc, row_max, row_sum, positions, first_tile, last_tile, num_skipped, end - 1, end,
        block_tables_ptr + seq * table_stride, key_ptr + offs_head, value_ptr + offs_head, block_stride, scale,
        ALL, BLOCK_SIZE, HEAD_DIM, TILE_N, MASK)

    offs_d = tl.arange(0, padded_dim(HEAD_DIM))
    mask = head_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    offs_split = (seq * num_heads + head) * NUM_SPLITS + split
    tl.store(partial_ptr + offs_split[:, None] * HEAD_DIM + offs_d[None, :], acc / row_sum[:, None], mask=mask)
    tl.store(lse_ptr + offs_split, row_max + tl.log2(row_sum), mask=head_mask)


@triton.jit
def reduce_kernel(
    partial_ptr,  # as decode_kernel wrote it
    lse_ptr,
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    query_start_loc_ptr,
    kv_lens_ptr,
    HEAD_DIM: tl.constexpr,
    TILE_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MASK: tl.constexpr,  # MaskConstants
    INT4_BLOCK_SIZE: tl.constexpr,  # None: the cache is not int4
):
    """Grid (num_heads, num_seqs): the mean of a head's splits, weighted by their sums of exponentials."""
    head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    token = tl.load(query_start_loc_ptr + seq)
    if tl.load(query_start_loc_ptr + seq + 1) - token != 1:
        return
    end = tl.load(kv_lens_ptr + seq)
    if INT4_BLOCK_SIZE is None:
        num_tiles, _ = visible_tiles(end - 1, end, TILE_N, MASK)
        num_used = tl.cdiv(num_tiles, tiles_per_split(num_tiles, NUM_SPLITS, TILE_N))
    else:
        num_tiles, _ = visible_int4_tiles(end - 1, end, INT4_BLOCK_SIZE, TILE_N, MASK)
        num_used = tl.maximum(tl.cdiv(num_tiles, tiles_per_split(num_tiles, NUM_SPLITS, TILE_N)), 1)

    offs_s = tl.arange(0, NUM_SPLITS)
    offs_d = tl.arange(0, padded_dim(HEAD_DIM))
    split_mask, dim_mask = offs_s < num_used, offs_d < HEAD_DIM
    offs_split = (seq * tl.num_programs(0) + head) * NUM_SPLITS + offs_s
    lse = tl.load(lse_ptr + offs_split, mask=split_mask, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, 0))
    offs_partial = offs_split[:, None] * HEAD_DIM + offs_d[None, :]
    partial = tl.load(partial_ptr + offs_partial, mask=split_mask[:, None] & dim_mask[None, :], other=0.0)
    out = tl.sum(weights[:, None] * partial, 0) / tl.sum(weights, 0)  # [padded_dim]
    offs_out = (token.to(tl.int64) * tl.num_programs(0) + head) * HEAD_DIM + offs_d
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=dim_mask)
