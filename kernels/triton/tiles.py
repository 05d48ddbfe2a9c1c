"""What the attention kernels share: which tiles of rows a query sees, and the online softmax over them.

The tile of rows is cut from the sequence, not from a block: a tile of TILE_N rows lies in several blocks, in one, or in
part of one, and its rows are found through the block table (PagedAttention, Kwon et al. 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import code_unit, quantized, scale_pointers, widened
from .int4_codes import NO_ROW, first_that_reaches_out, int4_keys, int4_values

LOG2E = tl.constexpr(1.4426950408889634)
# Which rows a tile is of: of the one cache that there is, or of an int4 cache and the residual beside it.
ALL, BEFORE_OWN, OWN = tl.constexpr("all"), tl.constexpr("before own"), tl.constexpr("own")
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.constexpr_function
def padded_dim(head_dim):
    """Columns of a tile: a power of two that `tl.dot` takes; those past head_dim are masked."""
    return max(16, triton.next_power_of_2(head_dim))


@triton.constexpr_function
def far_tile_n(tile_n):
    """Rows of a tile with far sinks, and of own blocks: few, because keys that are turned take registers."""
    return min(tile_n, 16)


@triton.jit
def visible_tiles(oldest, end, TILE_N: tl.constexpr, MASK: tl.constexpr):
    """Tiles that queries at positions [oldest, end) look at, and how many lie unseen between sinks and window."""
    num_tiles = tl.cdiv(end, TILE_N)
    num_skipped = 0
    if MASK.window is not None:
        first_tile = tl.minimum(tl.maximum(oldest - MASK.window + 1, 0) // TILE_N, num_tiles)
        num_skipped = tl.maximum(first_tile - triton.cdiv(MASK.num_sinks, TILE_N), 0)
    return num_tiles - num_skipped, num_skipped


@triton.jit
def visible_int4_tiles(oldest, end, BLOCK_SIZE: tl.constexpr, TILE_N: tl.constexpr, MASK: tl.constexpr):
    """The same of an int4 cache: tiles before the block that the last query is in."""
    reaching = first_that_reaches_out(oldest, BLOCK_SIZE, MASK)
    return visible_tiles(reaching, (end - 1) // BLOCK_SIZE * BLOCK_SIZE, TILE_N, MASK)


@triton.jit
def tile_start(index, num_skipped, TILE_N: tl.constexpr, MASK: tl.constexpr):
    """First row of the index-th tile that is looked at."""
    if MASK.window is not None:
        index += tl.where(index >= triton.cdiv(MASK.num_sinks, TILE_N), num_skipped, 0)
    return index * TILE_N


@triton.jit
def far_tiles(end, TILE_N: tl.constexpr, MASK: tl.constexpr):
    """How many of the first tiles hold rows that are far sinks of queries before `end`."""
    return tl.where(end > MASK.window, triton.cdiv(MASK.num_sinks, TILE_N), 0)


@triton.jit
def load_queries(query_ptr, token, token_stride, head, row_mask, HEAD_DIM: tl.constexpr):
    """[ROWS, padded_dim]; token (int64, one or [ROWS]) and head [ROWS] of each row."""
    offs_d = tl.arange(0, padded_dim(HEAD_DIM))
    offs_q = (token * token_stride + head * HEAD_DIM)[:, None] + offs_d[None, :]
    return tl.load(query_ptr + offs_q, mask=row_mask[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)


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
def turned_back(k, far, key_ptr, offs_row, offs_n, row_mask, offs_blocks, block_mask, PLACE: tl.constexpr,
                BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, MASK: tl.constexpr):
    """Keys k [padded_dim, TILE_N] as `FarSinks` says, float32, where they are of sinks."""
    HALF: tl.constexpr = MASK.rotary // 2
    offs_d = tl.arange(0, padded_dim(HEAD_DIM))
    turns = offs_d < MASK.rotary
    partner = tl.where(turns, (offs_d + HALF) % MASK.rotary, offs_d)
    partner_mask = (row_mask & (offs_n < MASK.num_sinks))[None, :] & turns[:, None]
    if PLACE == BEFORE_OWN:
        partner_k = int4_keys(key_ptr, offs_row, row_mask, offs_blocks, block_mask, partner, k.dtype, BLOCK_SIZE,
                              HEAD_DIM)
    else:
        partner_k = tl.load(key_ptr + offs_row[None, :] + partner[:, None], mask=partner_mask, other=0)
        partner_k = widened(partner_k, k.dtype)
    offs_angle = offs_n[None, :] * HALF + (offs_d % HALF)[:, None]
    cos = tl.load(far.cos + offs_angle, mask=partner_mask, other=1.0)
    sin = tl.load(far.sin + offs_angle, mask=partner_mask, other=0.0)
    sign = tl.where(offs_d < HALF, 1.0, -1.0)[:, None]
    return k.to(tl.float32) * cos + partner_k.to(tl.float32) * sign * sin


@triton.jit
def far_dots(far_q, k, far, key_ptr, offs_row, offs_n, row_mask, offs_blocks, block_mask, PLACE: tl.constexpr,
             BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, MASK: tl.constexpr):
    """Products of the far queries with keys k [padded_dim, TILE_N], as they lie or turned back: [ROWS, TILE_N]."""
    dots = tl.zeros([far_q.shape[0], k.shape[1]], tl.float32)
    if MASK.rotary is None:
        dots = dot(far_q, k, dots)
    else:
        turned = turned_back(k, far, key_ptr, offs_row, offs_n, row_mask, offs_blocks, block_mask, PLACE, BLOCK_SIZE,
                             HEAD_DIM, MASK)
        high = turned.to(far_q.dtype)
        dots = dot(far_q, high, dots)
        if far_q.dtype != tl.float32:
            # A second narrow summand, so that tensor cores lose next to nothing of what has been turned in float32.
            dots = dot(far_q, (turned - high.to(tl.float32)).to(far_q.dtype), dots)
    return dots


@triton.jit
def attend_tile(q, far_q, far, acc, row_max, row_sum, positions, start, oldest, end, table_ptr, key_ptr, value_ptr,
                block_stride, scale, PLACE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
                TILE_N: tl.constexpr, MASK: tl.constexpr):
    """One tile of rows [start, start + TILE_N) for all queries of the program: an online softmax step in base 2.

    Shapes and names as in `attend_tiles`; far_q is None where no row of the tile is a far sink. PLACE: ALL, or, of an
    int4 cache, BEFORE_OWN, or, of a residual, OWN: each query sees only the rows that are its to see there.
    """
    CODE_TYPE: tl.constexpr = key_ptr.dtype.element_ty
    INT4: tl.constexpr = PLACE == BEFORE_OWN
    ROW: tl.constexpr = HEAD_DIM // 2 if INT4 else HEAD_DIM
    offs_d = tl.arange(0, padded_dim(HEAD_DIM))
    offs_n = start + tl.arange(0, TILE_N)
    # Rows that no query of the program sees are not read: their block may be gone.
    row_mask = offs_n < end
    if MASK.window is not None:
        row_mask &= (offs_n < MASK.num_sinks) | (offs_n > oldest - MASK.window)
    if BLOCK_SIZE % TILE_N == 0:
        block_ids = tl.load(table_ptr + start // BLOCK_SIZE)
    else:
        block_ids = tl.load(table_ptr + offs_n // BLOCK_SIZE, mask=row_mask, other=0)
    offs_block = block_ids.to(tl.int64) * block_stride
    offs_row = offs_block + (offs_n % BLOCK_SIZE) * ROW
    dim_mask = offs_d < HEAD_DIM

    offs_blocks, block_mask = None, None
    if INT4:
        # One entry per block of the tile, for what the rows of a block share.
        blocks = tl.arange(0, triton.cdiv(TILE_N, BLOCK_SIZE))
        first_rows = start + blocks * BLOCK_SIZE
        block_mask = first_rows < end
        if MASK.window is not None:
            block_mask &= (first_rows < MASK.num_sinks) | (first_rows + BLOCK_SIZE - 1 > oldest - MASK.window)
        shared_ids = tl.load(table_ptr + start // BLOCK_SIZE + blocks, mask=block_mask, other=0)
        offs_blocks = shared_ids.to(tl.int64) * block_stride
        k = int4_keys(key_ptr, offs_row, row_mask, offs_blocks, block_mask, offs_d, q.dtype, BLOCK_SIZE, HEAD_DIM)
    else:
        k = tl.load(key_ptr + offs_row[None, :] + offs_d[:, None], mask=row_mask[None, :] & dim_mask[:, None], other=0)
        k = widened(k, q.dtype)
    scores = dot(q, k, tl.zeros([q.shape[0], TILE_N], tl.float32))  # [ROWS, TILE_N]
    if far_q is not None:
        is_far = (offs_n < MASK.num_sinks)[None, :] & (offs_n[None, :] <= positions[:, None] - MASK.window)
        far_scores = far_dots(far_q, k, far, key_ptr, offs_row, offs_n, row_mask, offs_blocks, block_mask, PLACE,
                              BLOCK_SIZE, HEAD_DIM, MASK)
        scores = tl.where(is_far, far_scores, scores)
    if quantized(CODE_TYPE) and not INT4:
        UNIT: tl.constexpr = code_unit(CODE_TYPE, q.dtype)
        key_scales = tl.load(scale_pointers(key_ptr, offs_block, offs_n % BLOCK_SIZE, BLOCK_SIZE, HEAD_DIM),
                             mask=row_mask, other=0.0)
        scores *= (key_scales * UNIT)[None, :]
    if MASK.soft_cap is None:
        scores *= scale * LOG2E
    else:
        scores = soft_capped(scores * scale, MASK.soft_cap) * LOG2E
    visible = (offs_n[None, :] <= positions[:, None]) & row_mask[None, :]
    if MASK.window is not None:
        visible &= (offs_n[None, :] < MASK.num_sinks) | (offs_n[None, :] > positions[:, None] - MASK.window)
    if PLACE != ALL:
        own = (positions // BLOCK_SIZE * BLOCK_SIZE)[:, None]
        visible &= offs_n[None, :] < own if INT4 else offs_n[None, :] >= own
    scores = tl.where(visible, scores, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # A query that has seen nothing yet: keep inf - inf away.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - shift[:, None])
    shrink = tl.exp2(row_max - shift)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    if INT4:
        v, value_scales = int4_values(value_ptr, offs_block, offs_n % BLOCK_SIZE, row_mask, offs_d, q.dtype, BLOCK_SIZE,
                                      HEAD_DIM)
        # Codes are finite, scales need not be: those of rows that a query does not see are kept from it.
        weights = tl.where(visible, weights * value_scales[None, :], 0.0)
    else:
        if quantized(CODE_TYPE):
            value_scales = tl.load(scale_pointers(value_ptr, offs_block, offs_n % BLOCK_SIZE, BLOCK_SIZE, HEAD_DIM),
                                   mask=row_mask, other=0.0)
            weights *= (value_scales * UNIT)[None, :]
        v = tl.load(value_ptr + offs_row[:, None] + offs_d[None, :], mask=row_mask[:, None] & dim_mask[None, :],
                    other=0)
    return dot(weights.to(q.dtype), widened(v, q.dtype), acc * shrink[:, None]), new_max, row_sum


@triton.jit
def nothing_seen(q):
    """acc, row_max and row_sum as in `attend_tiles`, before any tile."""
    return (tl.zeros(q.shape, tl.float32), tl.full([q.shape[0]], float("-inf"), tl.float32),
            tl.zeros([q.shape[0]], tl.float32))


@triton.jit
def attend_tiles(q, far_q, far, acc, row_max, row_sum, positions, first_tile, last_tile, num_skipped, oldest, end,
                 table_ptr, key_ptr, value_ptr, block_stride, scale, PLACE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                 HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr, MASK: tl.constexpr):
    """Attention of the program's queries over its tiles [first_tile, last_tile), counted as `tile_start` counts.

    q, far_q [ROWS, padded_dim]; positions [ROWS], those of the queries, within [oldest, end). key_ptr, value_ptr: this
    KV head in block 0; table_ptr: of this sequence. acc [ROWS, padded_dim] float32 is the sum of the values by their
    weights, row_max and row_sum [ROWS] the largest score and the sum of the weights, `exp2(score - row_max)`.
    """
    if far is not None:
        # Before the own blocks, queries have come farther than `end`.
        num_far = far_tiles(end if PLACE == ALL else NO_ROW, TILE_N, MASK)
        FAR_TILE_N: tl.constexpr = far_tile_n(TILE_N)
        # Too few for a pipeline to be worth its shared memory.
        far_end = tl.minimum(tl.minimum(last_tile, num_far) * TILE_N, end)
        for start in tl.range(first_tile * TILE_N, far_end, FAR_TILE_N, num_stages=1):
            acc, row_max, row_sum = attend_tile(
                q, far_q, far, acc, row_max, row_sum, positions, start, oldest, end, table_ptr, key_ptr, value_ptr,
                block_stride, scale, PLACE, BLOCK_SIZE, HEAD_DIM, FAR_TILE_N, MASK)
        first_tile = tl.maximum(first_tile, num_far)
    for tile in range(first_tile, last_tile):
        acc, row_max, row_sum = attend_tile(
            q, None, None, acc, row_max, row_sum, positions, tile_start(tile, num_skipped, TILE_N, MASK), oldest, end,
            table_ptr, key_ptr, value_ptr, block_stride, scale, PLACE, BLOCK_SIZE, HEAD_DIM, TILE_N, MASK)
    return acc, row_max, row_sum


@triton.jit
def attend_own_blocks(q, far_q, far, acc, row_max, row_sum, positions, oldest, end, residual, seq, table_stride,
                      kv_head, scale, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, MASK: tl.constexpr):
    """As `attend_tiles`, of the blocks that queries at positions [oldest, end) are in. residual: ResidualTensors."""
    TILE_N: tl.constexpr = far_tile_n(16)
    offs_head = kv_head * BLOCK_SIZE * HEAD_DIM
    for start in tl.range(oldest // BLOCK_SIZE * BLOCK_SIZE, end, TILE_N, num_stages=1):
        acc, row_max, row_sum = attend_tile(
            q, far_q, far, acc, row_max, row_sum, positions, start, oldest, end,
            residual.block_tables + seq * table_stride, residual.key + offs_head, residual.value + offs_head,
            residual.stride, scale, OWN, BLOCK_SIZE, HEAD_DIM, TILE_N, MASK)
    return acc, row_max, row_sum
