"""What the attention kernels share: which tiles of rows a query sees, and one tile of online softmax.

The tile of rows is cut from the sequence, not from a block: a tile of TILE_N rows lies in several blocks, in one, or in
part of one, and its rows are found through the block table (PagedAttention, Kwon et al. 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.constexpr_function
def padded_dim(head_dim):
    """Columns of a tile: a power of two that `tl.dot` takes; those past head_dim are masked."""
    return max(16, triton.next_power_of_2(head_dim))


@triton.jit
def visible_tiles(oldest, end, TILE_N: tl.constexpr, WINDOW: tl.constexpr, NUM_SINKS: tl.constexpr):
    """Tiles that queries at positions [oldest, end) look at, and how many lie unseen between sinks and window.

    A query at position p sees the rows up to p: all, or those after p - WINDOW and the first NUM_SINKS.
    """
    num_tiles = tl.cdiv(end, TILE_N)
    num_skipped = 0
    if WINDOW is not None:
        first_tile = tl.maximum(oldest - WINDOW + 1, 0) // TILE_N
        num_skipped = tl.maximum(first_tile - triton.cdiv(NUM_SINKS, TILE_N), 0)
    return num_tiles - num_skipped, num_skipped


@triton.jit
def tile_start(index, num_skipped, TILE_N: tl.constexpr, WINDOW: tl.constexpr, NUM_SINKS: tl.constexpr):
    """First row of the index-th tile that is looked at."""
    if WINDOW is not None:
        index += tl.where(index >= triton.cdiv(NUM_SINKS, TILE_N), num_skipped, 0)
    return index * TILE_N


@triton.jit
def dot(a, b, acc):
    """`acc + a @ b` in float32; the interpreter cannot multiply bfloat16."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def soft_capped(scores, SOFT_CAP: tl.constexpr):
    # cap * tanh(scores / cap), in a form that overflows to the right limits
    return SOFT_CAP - 2 * SOFT_CAP / (1 + tl.exp2(scores * (2 * LOG2E / SOFT_CAP)))


@triton.jit
def attend_tile(q, acc, row_max, row_sum, positions, start, oldest, end, table_ptr, key_ptr, value_ptr, block_stride,
                scale, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr, WINDOW: tl.constexpr,
                NUM_SINKS: tl.constexpr, SOFT_CAP: tl.constexpr):
    """One tile of rows [start, start + TILE_N) for all queries of the program: an online softmax step in base 2.

    q [ROWS, padded_dim]; acc [ROWS, padded_dim], row_max and row_sum [ROWS], float32; positions [ROWS], those of the
    queries, within [oldest, end). key_ptr, value_ptr: this KV head in block 0.
    """
    offs_d = tl.arange(0, padded_dim(HEAD_DIM))
    offs_n = start + tl.arange(0, TILE_N)
    # Rows that no query of the program sees are not read: their block may be gone.
    row_mask = offs_n < end
    if WINDOW is not None:
        row_mask &= (offs_n < NUM_SINKS) | (offs_n > oldest - WINDOW)
    if BLOCK_SIZE % TILE_N == 0:
        block_ids = tl.load(table_ptr + start // BLOCK_SIZE)
    else:
        block_ids = tl.load(table_ptr + offs_n // BLOCK_SIZE, mask=row_mask, other=0)
    offs_row = block_ids.to(tl.int64) * block_stride + (offs_n % BLOCK_SIZE) * HEAD_DIM
    dim_mask = offs_d < HEAD_DIM

    k = tl.load(key_ptr + offs_row[None, :] + offs_d[:, None], mask=row_mask[None, :] & dim_mask[:, None], other=0.0)
    scores = dot(q, k, tl.zeros([q.shape[0], TILE_N], tl.float32))  # [ROWS, TILE_N]
    if SOFT_CAP is None:
        scores *= scale * LOG2E
    else:
        scores = soft_capped(scores * scale, SOFT_CAP) * LOG2E
    visible = (offs_n[None, :] <= positions[:, None]) & row_mask[None, :]
    if WINDOW is not None:
        visible &= (offs_n[None, :] < NUM_SINKS) | (offs_n[None, :] > positions[:, None] - WINDOW)
    scores = tl.where(visible, scores, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # A query that has seen nothing yet: keep inf - inf away.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - shift[:, None])
    shrink = tl.exp2(row_max - shift)
    v = tl.load(value_ptr + offs_row[:, None] + offs_d[None, :], mask=row_mask[:, None] & dim_mask[None, :], other=0.0)
    acc = dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return acc, new_max, row_sum * shrink + tl.sum(weights, 1)
