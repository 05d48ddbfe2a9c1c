"""Decode and prefill over an int4 cache and the residual beside it: as `decode.py` and `prefill.py`, but that each
query reads its own block from the residual.

In decode the last split has the own block too, so that a sequence takes no more splits than its int4 rows do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import packed_rows, tiles_per_split
from .int4_codes import first_that_reaches_out, head_bytes
from .prefill import sequence_of_tile
from .tiles import (
    BEFORE_OWN,
    attend_own_blocks,
    attend_tiles,
    load_queries,
    nothing_seen,
    padded_dim,
    visible_int4_tiles,
)


@triton.jit
def attend_before_own(q, far_q, far, acc, row_max, row_sum, positions, first_tile, last_tile, num_skipped, oldest, end,
                      table_ptr, cache_ptr, kv_head, block_stride, scale, BLOCK_SIZE: tl.constexpr,
                      HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr, MASK: tl.constexpr):
    """As `attend_tiles`, of the int4 blocks before those that queries at positions [oldest, end) are in."""
    head_ptr = cache_ptr + kv_head * head_bytes(BLOCK_SIZE, HEAD_DIM)
    return attend_tiles(
        q, far_q, far, acc, row_max, row_sum, positions, first_tile, last_tile, num_skipped,
        first_that_reaches_out(oldest, BLOCK_SIZE, MASK), (end - 1) // BLOCK_SIZE * BLOCK_SIZE, table_ptr, head_ptr,
        head_ptr, block_stride, scale, BEFORE_OWN, BLOCK_SIZE, HEAD_DIM, TILE_N, MASK)


@triton.jit(do_not_specialize=["table_stride"])
def decode_int4_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD_DIM]; tokens query_stride apart
    cache_ptr,  # bytes of block 0's layer, [num_kv_heads, head_bytes]
    residual,  # ResidualTensors
    block_tables_ptr,  # [num_seqs, table_stride]
    query_start_loc_ptr,  # [num_seqs + 1]
    kv_lens_ptr,  # [num_seqs]
    partial_ptr,  # as of `decode_kernel`
    lse_ptr,
    query_stride,
    block_stride,  # bytes from one block to the next
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
    """Grid as of `decode_kernel`, whose kernel for the sum of the splits follows."""
    split = tl.program_id(0)
    seq = tl.program_id(2).to(tl.int64)
    token = tl.load(query_start_loc_ptr + seq)
    if tl.load(query_start_loc_ptr + seq + 1) - token != 1:
        return
    end = tl.load(kv_lens_ptr + seq)
    num_tiles, num_skipped = visible_int4_tiles(end - 1, end, BLOCK_SIZE, TILE_N, MASK)
    per_split = tiles_per_split(num_tiles, NUM_SPLITS, TILE_N)
    first_tile = split * per_split
    if first_tile >= tl.maximum(num_tiles, 1):
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
        far_q = load_queries(far.query, token.to(tl.int64), far.stride, head, head_mask, HEAD_DIM)
    positions = tl.zeros([q.shape[0]], tl.int32) + end - 1
    last_tile = tl.minimum(first_tile + per_split, num_tiles)
    acc, row_max, row_sum = nothing_seen(q)
    acc, row_max, row_sum = attend_before_own(
        q, far_q, far, acc, row_max, row_sum, positions, first_tile, last_tile, num_skipped, end - 1, end,
        block_tables_ptr + seq * table_stride, cache_ptr, kv_head, block_stride, scale, BLOCK_SIZE, HEAD_DIM, TILE_N,
        MASK)
    if last_tile == num_tiles:
        acc, row_max, row_sum = attend_own_blocks(
            q, far_q, far, acc, row_max, row_sum, positions, end - 1, end, residual, seq, table_stride, kv_head, scale,
            BLOCK_SIZE, HEAD_DIM, MASK)

    offs_d = tl.arange(0, padded_dim(HEAD_DIM))
    mask = head_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    offs_split = (seq * num_heads + head) * NUM_SPLITS + split
    tl.store(partial_ptr + offs_split[:, None] * HEAD_DIM + offs_d[None, :], acc / row_sum[:, None], mask=mask)
    tl.store(lse_ptr + offs_split, row_max + tl.log2(row_sum), mask=head_mask)


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def prefill_int4_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD_DIM]; tokens query_stride apart
    out_ptr,  # the same, contiguous
    cache_ptr,  # bytes of block 0's layer, [num_kv_heads, head_bytes]
    residual,  # ResidualTensors
    block_tables_ptr,  # [num_seqs, table_stride]
    query_start_loc_ptr,  # [num_seqs + 1]
    kv_lens_ptr,  # [num_seqs]
    num_seqs,
    query_stride,
    block_stride,  # bytes from one block to the next
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
    """Grid as of `prefill_kernel`."""
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
    num_tiles, num_skipped = visible_int4_tiles(oldest, end, BLOCK_SIZE, TILE_N, MASK)
    far_q = None
    if far is not None:
        far_q = load_queries(far.query, token, far.stride, head, query_mask & (end > MASK.window), HEAD_DIM)
    acc, row_max, row_sum = nothing_seen(q)
    acc, row_max, row_sum = attend_before_own(
        q, far_q, far, acc, row_max, row_sum, num_before + query, 0, num_tiles, num_skipped, oldest, end,
        block_tables_ptr + seq * table_stride, cache_ptr, kv_head, block_stride, scale, BLOCK_SIZE, HEAD_DIM, TILE_N,
        MASK)
    acc, row_max, row_sum = attend_own_blocks(
        q, far_q, far, acc, row_max, row_sum, num_before + query, oldest, end, residual, seq, table_stride, kv_head,
        scale, BLOCK_SIZE, HEAD_DIM, MASK)

    offs_d = tl.arange(0, padded_dim(HEAD_DIM))
    mask = query_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    # Rows of the padding have seen something too, or nothing: neither is stored.
    out = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    offs_out = ((token * num_heads + head) * HEAD_DIM)[:, None] + offs_d[None, :]
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask)
