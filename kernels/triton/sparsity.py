"""KV sparsity: the attention that rows receive, in two passes over K, and the compaction of the rows that are kept.

Scored are the last num_scored queries of a sequence, in tiles of BLOCK_Q of them by HEADS heads. How the rows that a
tile sees are split among programs depends on the sequence alone, and so do the bits of the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import code_unit, head_stride, quantized, scale_pointers, widened
from .decode import tiles_per_split
from .prefill import sequence_of_tile
from .tiles import LOG2E, dot, load_queries, padded_dim, soft_capped


@triton.constexpr_function
def heads_per_tile(group, rows):
    """Heads of a tile where a group is divided evenly among as few tiles as it takes."""
    return triton.cdiv(group, triton.cdiv(group, rows))


@triton.jit
def scored_rows(first, head_tile, kv_head, end_token, kv_len, num_scored, GROUP: tl.constexpr, HEADS: tl.constexpr,
                ROWS: tl.constexpr):
    """Of a tile that begins with the first-th scored query: token (int64), position, head and mask of its rows, all
    [ROWS], and how many KV rows its last query sees."""
    BLOCK_Q: tl.constexpr = ROWS // HEADS
    offs_m = tl.arange(0, ROWS)
    query = first + offs_m // HEADS
    head_in_group = head_tile * HEADS + offs_m % HEADS
    mask = (offs_m < BLOCK_Q * HEADS) & (query < num_scored) & (head_in_group < GROUP)
    num_before = kv_len - num_scored
    token = (end_token - num_scored + query).to(tl.int64)
    return token, num_before + query, kv_head * GROUP + head_in_group, mask, \
        num_before + tl.minimum(first + BLOCK_Q, num_scored)


@triton.jit
def load_keys(start, end, table_ptr, key_ptr, block_stride, dtype: tl.constexpr, BLOCK_SIZE: tl.constexpr,
              HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr):
    """K [padded_dim, TILE_N] as dtype of rows [start, start + TILE_N), 0 from `end` on, and what multiplies their
    scores, [TILE_N]. key_ptr: this KV head in block 0; table_ptr: of this sequence."""
    CODE_TYPE: tl.constexpr = key_ptr.dtype.element_ty
    offs_d = tl.arange(0, padded_dim(HEAD_DIM))
    offs_n = start + tl.arange(0, TILE_N)
    row_mask = offs_n < end
    if BLOCK_SIZE % TILE_N == 0:
        block_ids = tl.load(table_ptr + start // BLOCK_SIZE)
    else:
        block_ids = tl.load(table_ptr + offs_n // BLOCK_SIZE, mask=row_mask, other=0)
    offs_block = block_ids.to(tl.int64) * block_stride
    offs_row = offs_block + (offs_n % BLOCK_SIZE) * HEAD_DIM
    mask = row_mask[None, :] & (offs_d < HEAD_DIM)[:, None]
    k = widened(tl.load(key_ptr + offs_row[None, :] + offs_d[:, None], mask=mask, other=0), dtype)
    if quantized(CODE_TYPE):
        scale_ptrs = scale_pointers(key_ptr, offs_block, offs_n % BLOCK_SIZE, BLOCK_SIZE, HEAD_DIM)
        factors = tl.load(scale_ptrs, mask=row_mask, other=0.0) * code_unit(CODE_TYPE, dtype)
    else:
        factors = tl.full([TILE_N], 1.0, tl.float32)
    return k, factors


@triton.jit
def base_2_scores(q, k, factors, scale, SOFT_CAP: tl.constexpr):
    """[ROWS, TILE_N] float32."""
    scores = dot(q, k, tl.zeros([q.shape[0], k.shape[1]], tl.float32)) * factors[None, :] * scale
    if SOFT_CAP is not None:
        scores = soft_capped(scores, SOFT_CAP)
    return scores * LOG2E


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def score_sums_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD_DIM]; tokens query_stride apart
    key_ptr,  # block 0's keys of the layer, [num_kv_heads, BLOCK_SIZE, HEAD_DIM] or as `kv_layout.py` has them
    block_tables_ptr,  # [num_seqs, table_stride]
    query_start_loc_ptr,  # [num_seqs + 1]
    kv_lens_ptr,  # [num_seqs]
    num_scored_ptr,  # [num_seqs]
    lse_ptr,  # out: [num_tokens, num_heads, NUM_SPLITS] float32, log2 of each split's sum of exponentials
    num_seqs,
    query_stride,
    block_stride,  # elements from one block to the next
    table_stride,
    scale,
    GROUP: tl.constexpr,  # query heads per KV head
    ROWS: tl.constexpr,  # of the tile: ROWS // HEADS queries by HEADS heads
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SOFT_CAP: tl.constexpr,  # or None
):
    """Grid (num_tokens // (ROWS // HEADS) + num_seqs, num_kv_heads * ceil(GROUP / HEADS), NUM_SPLITS). Tiles without a
    scored query, and splits that their tile does not need, write nothing."""
    HEADS: tl.constexpr = heads_per_tile(GROUP, ROWS)
    BLOCK_Q: tl.constexpr = ROWS // HEADS
    HEAD_TILES: tl.constexpr = triton.cdiv(GROUP, HEADS)
    seq = sequence_of_tile(query_start_loc_ptr, num_seqs, tl.program_id(0), BLOCK_Q).to(tl.int64)
    start_token = tl.load(query_start_loc_ptr + seq)
    first = (tl.program_id(0) - (start_token // BLOCK_Q + seq.to(tl.int32))) * BLOCK_Q
    num_scored = tl.load(num_scored_ptr + seq)
    if first >= num_scored:
        return
    end_token, kv_len = tl.load(query_start_loc_ptr + seq + 1), tl.load(kv_lens_ptr + seq)
    kv_head = tl.program_id(1) // HEAD_TILES
    token, position, head, mask, end = scored_rows(
        first, tl.program_id(1) % HEAD_TILES, kv_head, end_token, kv_len, num_scored, GROUP, HEADS, ROWS)
    num_tiles = tl.cdiv(end, TILE_N)
    per_split = tiles_per_split(num_tiles, NUM_SPLITS, TILE_N)
    first_tile = tl.program_id(2) * per_split
    if first_tile >= num_tiles:
        return

    q = load_queries(query_ptr, token, query_stride, head, mask, HEAD_DIM)  # [ROWS, padded_dim]
    key_ptr += kv_head * head_stride(key_ptr.dtype.element_ty, BLOCK_SIZE, HEAD_DIM)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for tile in range(first_tile, tl.minimum(first_tile + per_split, num_tiles)):
        k, factors = load_keys(tile * TILE_N, end, block_tables_ptr + seq * table_stride, key_ptr, block_stride,
                               q.dtype, BLOCK_SIZE, HEAD_DIM, TILE_N)
        scores = base_2_scores(q, k, factors, scale, SOFT_CAP)
        offs_n = tile * TILE_N + tl.arange(0, TILE_N)
        scores = tl.where(offs_n[None, :] <= position[:, None], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A query that has seen nothing yet: keep inf - inf away.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp2(row_max - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        row_max = new_max
    # A query of the tile may see nothing of a split that later ones need.
    lse = tl.where(row_sum == 0, float("-inf"), row_max + tl.log2(tl.where(row_sum == 0, 1.0, row_sum)))
    num_heads = tl.num_programs(1) // HEAD_TILES * GROUP
    tl.store(lse_ptr + (token * num_heads + head) * NUM_SPLITS + tl.program_id(2), lse, mask=mask)


@triton.jit
def load_lse(lse_ptr, token, head, num_heads, mask, end, NUM_SPLITS: tl.constexpr, TILE_N: tl.constexpr):
    """[ROWS]: of all splits of rows that see `end` KV rows at most; 0 where masked."""
    num_tiles = tl.cdiv(end, TILE_N)
    num_used = tl.cdiv(num_tiles, tiles_per_split(num_tiles, NUM_SPLITS, TILE_N))
    offs_s = tl.arange(0, NUM_SPLITS)
    offs_split = ((token * num_heads + head) * NUM_SPLITS)[:, None] + offs_s[None, :]
    lse = tl.load(lse_ptr + offs_split, mask=mask[:, None] & (offs_s < num_used)[None, :], other=float("-inf"))
    row_max = tl.where(mask, tl.max(lse, 1), 0.0)
    total = tl.sum(tl.exp2(lse - row_max[:, None]), 1)
    return row_max + tl.log2(tl.where(mask, total, 1.0))


@triton.jit(do_not_specialize=["max_rows", "table_stride"])
def receive_kernel(
    query_ptr,  # as in score_sums_kernel
    key_ptr,
    block_tables_ptr,
    query_start_loc_ptr,
    kv_lens_ptr,
    num_scored_ptr,
    lse_ptr,  # as score_sums_kernel wrote it
    received_ptr,  # out: [num_seqs, num_kv_heads, max_rows] float32
    max_rows,
    query_stride,
    block_stride,
    table_stride,
    scale,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Grid (ceil(max_rows / TILE_N), num_kv_heads, num_seqs): what a tile of KV rows receives from the scored
    queries, added up in their order."""
    HEADS: tl.constexpr = heads_per_tile(GROUP, ROWS)
    BLOCK_Q: tl.constexpr = ROWS // HEADS
    kv_head = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * TILE_N
    offs_n = start + tl.arange(0, TILE_N)
    received_ptrs = received_ptr + (seq * tl.num_programs(1) + kv_head) * max_rows + offs_n
    received = tl.zeros([TILE_N], tl.float32)
    num_scored, kv_len = tl.load(num_scored_ptr + seq), tl.load(kv_lens_ptr + seq)
    if (num_scored == 0) | (start >= kv_len):
        tl.store(received_ptrs, received, mask=offs_n < max_rows)
        return

    end_token = tl.load(query_start_loc_ptr + seq + 1)
    key_ptr += kv_head * head_stride(key_ptr.dtype.element_ty, BLOCK_SIZE, HEAD_DIM)
    k, factors = load_keys(start, kv_len, block_tables_ptr + seq * table_stride, key_ptr, block_stride,
                           query_ptr.dtype.element_ty, BLOCK_SIZE, HEAD_DIM, TILE_N)
    # Queries that come before these rows do not see them.
    first_seeing = tl.maximum(start - (kv_len - num_scored), 0) // BLOCK_Q * BLOCK_Q
    for head_tile in tl.static_range(triton.cdiv(GROUP, HEADS)):
        for first in range(first_seeing, num_scored, BLOCK_Q):
            token, position, head, mask, end = scored_rows(
                first, head_tile, kv_head, end_token, kv_len, num_scored, GROUP, HEADS, ROWS)
            q = load_queries(query_ptr, token, query_stride, head, mask, HEAD_DIM)
            lse = load_lse(lse_ptr, token, head, tl.num_programs(1) * GROUP, mask, end, NUM_SPLITS, TILE_N)
            scores = base_2_scores(q, k, factors, scale, SOFT_CAP)
            seen = mask[:, None] & (offs_n[None, :] <= position[:, None])
            received += tl.sum(tl.exp2(tl.where(seen, scores - lse[:, None], float("-inf"))), 0)
    tl.store(received_ptrs, received, mask=offs_n < max_rows)


@triton.jit
def copy_rows(head_ptr, source_block, source_offset, target_block, target_offset, row_mask, BLOCK_SIZE: tl.constexpr,
              HEAD_DIM: tl.constexpr):
    """Rows [ROWS] of one head, K or V, with their scales. head_ptr: in block 0; blocks: elements from there."""
    offs_d = tl.arange(0, padded_dim(HEAD_DIM))
    mask = row_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    elements = tl.load(head_ptr + (source_block + source_offset * HEAD_DIM)[:, None] + offs_d[None, :], mask=mask)
    tl.store(head_ptr + (target_block + target_offset * HEAD_DIM)[:, None] + offs_d[None, :], elements, mask=mask)
    if quantized(head_ptr.dtype.element_ty):
        scales = tl.load(scale_pointers(head_ptr, source_block, source_offset, BLOCK_SIZE, HEAD_DIM), mask=row_mask)
        tl.store(scale_pointers(head_ptr, target_block, target_offset, BLOCK_SIZE, HEAD_DIM), scales, mask=row_mask)


@triton.jit(do_not_specialize=["max_kept", "source_table_stride", "target_table_stride"])
def compact_rows_kernel(
    key_ptr,  # block 0's keys of the layer, [num_kv_heads, BLOCK_SIZE, HEAD_DIM] or as `kv_layout.py` has them
    value_ptr,
    rows_ptr,  # [num_seqs, num_kv_heads, max_kept]
    source_tables_ptr,  # [num_seqs, source_table_stride]
    target_tables_ptr,  # [num_seqs, target_table_stride]
    num_kept_ptr,  # [num_seqs]
    max_kept,
    block_stride,  # elements from one block to the next
    source_table_stride,
    target_table_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,  # of a program
):
    """Grid (ceil(max_kept / ROWS), num_kv_heads, num_seqs)."""
    kv_head = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = place < tl.load(num_kept_ptr + seq)
    row = tl.load(rows_ptr + (seq * tl.num_programs(1) + kv_head) * max_kept + place, mask=mask, other=0)
    source = tl.load(source_tables_ptr + seq * source_table_stride + row // BLOCK_SIZE, mask=mask, other=0)
    target = tl.load(target_tables_ptr + seq * target_table_stride + place // BLOCK_SIZE, mask=mask, other=0)
    source_block, target_block = source.to(tl.int64) * block_stride, target.to(tl.int64) * block_stride
    offs_head = kv_head * head_stride(key_ptr.dtype.element_ty, BLOCK_SIZE, HEAD_DIM)
    copy_rows(key_ptr + offs_head, source_block, row % BLOCK_SIZE, target_block, place % BLOCK_SIZE, mask, BLOCK_SIZE,
              HEAD_DIM)
    copy_rows(value_ptr + offs_head, source_block, row % BLOCK_SIZE, target_block, place % BLOCK_SIZE, mask, BLOCK_SIZE,
              HEAD_DIM)
