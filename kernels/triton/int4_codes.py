"""Blocks as int4 codes (`kv_layout.py`): what kernels read of a tile of them, and how a block is made.

A head of a block is addressed by its first byte: `head_ptr`, in block 0, and the bytes from there to the block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import kv_layout

LARGEST_CODE = tl.constexpr(kv_layout.INT4_LARGEST_CODE)
LARGEST_ZERO = tl.constexpr(kv_layout.INT4_LARGEST_ZERO)
NO_ROW = tl.constexpr(2**30)
"""Behind every row of a sequence."""


@triton.constexpr_function
def head_bytes(block_size, head_dim):
    """`kv_layout.int4_head_bytes`, which no kernel can call."""
    return block_size * head_dim + 2 * (head_dim + block_size) + head_dim + block_size // 2


@triton.constexpr_function
def value_codes(block_size, head_dim):
    """Where a part begins in a head: this and those below, in their order."""
    return block_size * head_dim // 2


@triton.constexpr_function
def key_scales(block_size, head_dim):
    return block_size * head_dim


@triton.constexpr_function
def value_scales(block_size, head_dim):
    return block_size * head_dim + 2 * head_dim


@triton.constexpr_function
def key_zeros(block_size, head_dim):
    return block_size * head_dim + 2 * (head_dim + block_size)


@triton.constexpr_function
def value_zeros(block_size, head_dim):
    return block_size * head_dim + 2 * (head_dim + block_size) + head_dim


@triton.constexpr_function
def value_unit(dtype):
    """What codes of values are divided by and their scales multiplied, lest weights by scales fall below float16."""
    return 64.0 if dtype == tl.float16 else 1.0


@triton.jit
def first_that_reaches_out(oldest, BLOCK_SIZE: tl.constexpr, MASK: tl.constexpr):
    """The first position of a query, from `oldest` on, whose window reaches out of its own block."""
    reaching = oldest
    if MASK.window is not None:
        own = oldest // BLOCK_SIZE * BLOCK_SIZE
        if MASK.window == 1:
            reaching = own * 0 + NO_ROW
        else:
            reaching = tl.where(oldest - MASK.window + 1 < own, oldest, own + BLOCK_SIZE)
    return reaching


@triton.jit
def bfloat16_at(ptr, mask):
    """float32 of what lies at byte pointers, which are even."""
    bits = tl.load(ptr.to(tl.pointer_type(tl.uint16), bitcast=True), mask=mask, other=0)
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def int8_at(ptr, mask):
    return tl.load(ptr, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def over_rows(x, TILE_N: tl.constexpr):
    """`[CHANNELS, blocks of the tile]`, repeated for the rows of each block: `[CHANNELS, TILE_N]`."""
    CHANNELS: tl.constexpr = x.shape[0]
    BLOCKS: tl.constexpr = x.shape[1]
    if BLOCKS == 1:
        return tl.broadcast_to(x, [CHANNELS, TILE_N])
    return tl.reshape(tl.broadcast_to(x[:, :, None], [CHANNELS, BLOCKS, TILE_N // BLOCKS]), [CHANNELS, TILE_N])


@triton.jit
def int4_keys(head_ptr, offs_rows, row_mask, offs_blocks, block_mask, channels, dtype: tl.constexpr,
              BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Keys `[len(channels), TILE_N]` of dtype: rounded to it, and no larger than it holds.

    offs_rows [TILE_N]: bytes to each row of codes; offs_blocks: to the blocks of the tile, in order.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    channel_mask = channels < HEAD_DIM
    packed = tl.load(head_ptr + offs_rows[None, :] + (channels % HALF)[:, None],
                     mask=channel_mask[:, None] & row_mask[None, :], other=0)
    codes = (packed >> (channels // HALF * 4)[:, None].to(tl.uint8)) & 15
    block_ptr = head_ptr + offs_blocks[None, :]
    mask = channel_mask[:, None] & block_mask[None, :]
    scales = bfloat16_at(block_ptr + key_scales(BLOCK_SIZE, HEAD_DIM) + 2 * channels[:, None], mask)
    zeros = int8_at(block_ptr + key_zeros(BLOCK_SIZE, HEAD_DIM) + channels[:, None], mask)
    TILE_N: tl.constexpr = row_mask.shape[0]
    keys = (codes.to(tl.float32) - over_rows(zeros, TILE_N)) * over_rows(scales, TILE_N)
    if dtype == tl.float16:
        keys = tl.minimum(tl.maximum(keys, -65504.0), 65504.0)
    return keys.to(dtype)


@triton.jit
def int4_values(head_ptr, offs_block, offs_slot, row_mask, channels, dtype: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                HEAD_DIM: tl.constexpr):
    """Values `[TILE_N, len(channels)]` of dtype, without their scales and over `value_unit`; and scales [TILE_N]."""
    HALF: tl.constexpr = HEAD_DIM // 2
    offs_rows = offs_block + value_codes(BLOCK_SIZE, HEAD_DIM) + offs_slot * HALF
    packed = tl.load(head_ptr + offs_rows[:, None] + (channels % HALF)[None, :],
                     mask=row_mask[:, None] & (channels < HEAD_DIM)[None, :], other=0)
    codes = (packed >> (channels // HALF * 4)[None, :].to(tl.uint8)) & 15
    HALF_BLOCK: tl.constexpr = BLOCK_SIZE // 2
    pairs = tl.load(head_ptr + offs_block + value_zeros(BLOCK_SIZE, HEAD_DIM) + offs_slot % HALF_BLOCK, mask=row_mask,
                    other=0)
    zeros = ((pairs >> (offs_slot // HALF_BLOCK * 4).to(tl.uint8)) & 15).to(tl.float32)
    scales = bfloat16_at(head_ptr + offs_block + value_scales(BLOCK_SIZE, HEAD_DIM) + 2 * offs_slot, row_mask)
    UNIT: tl.constexpr = value_unit(dtype)
    values = codes.to(tl.float32) - zeros[:, None]
    if UNIT != 1.0:
        values *= 1.0 / UNIT
    return values.to(dtype), scales * UNIT


@triton.jit
def int4_scales(low, high, spoilt):
    """Scales, divisors, zeros and largest codes [N], float32, of vectors with such ranges; spoilt [N]: > 0 where one is
    not finite."""
    fifteen, most = tl.full(low.shape, LARGEST_CODE, tl.float32), tl.full(low.shape, LARGEST_ZERO, tl.float32)
    # Where the range has a 0 in it, the first is never the smaller.
    step = tl.maximum(tl.div_rn(high - low, fifteen), tl.div_rn(tl.maximum(tl.abs(low), tl.abs(high)), most))
    # Up to the next of bfloat16.
    scales = ((step.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    finite = (spoilt == 0) & (step < float("inf")) & (scales < float("inf"))
    used = finite & (scales > 0)
    divisors = tl.where(used, scales, 1.0)
    zeros = rounded(tl.div_rn(-low, divisors))
    zeros = tl.where(used, tl.minimum(tl.maximum(zeros, -128.0), 127.0), 0.0)
    return tl.where(finite, scales, float("nan")), divisors, zeros, tl.where(used, LARGEST_CODE, 0.0)


@triton.jit
def rounded(x):
    # At 1.5 * 2^23 the floats are the integers: the addition rounds to nearest even.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def int4_codes(x, divisors, zeros, largest):
    """uint8 codes of x; the others are of its shape, or broadcast to it."""
    codes = rounded(tl.div_rn(x, divisors + tl.zeros(x.shape, tl.float32))) + zeros
    # What is not finite is spoilt, and code 0.
    codes = tl.where(codes > 0, codes, 0.0)
    return tl.where(codes < largest, codes, largest + tl.zeros(x.shape, tl.float32)).to(tl.uint8)
