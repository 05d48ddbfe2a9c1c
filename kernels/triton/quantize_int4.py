"""Whole blocks of the residual into an int4 cache."""

from __future__ import annotations

import triton
import triton.language as tl

from .int4_codes import (
    head_bytes,
    int4_codes,
    int4_scales,
    key_scales,
    key_zeros,
    value_codes,
    value_scales,
    value_zeros,
)


@triton.jit
def extremes(low_half, high_half, column_mask, AXIS: tl.constexpr):
    """Least and largest along an axis of both halves of rows, and how many elements are not finite.

    AXIS 0: of each column, of either half, as one vector of both; 1: of each row.
    """
    finite_low, finite_high = tl.abs(low_half) < float("inf"), tl.abs(high_half) < float("inf")
    spoilt_low, spoilt_high = tl.where(finite_low, 0.0, 1.0), tl.where(finite_high, 0.0, 1.0)
    # What is not finite is left out: tl.min and tl.max need not let NaN through.
    seen_low, seen_high = finite_low & column_mask[None, :], finite_high & column_mask[None, :]
    least = tl.minimum(tl.min(tl.where(seen_low, low_half, float("inf")), AXIS),
                       tl.min(tl.where(seen_high, high_half, float("inf")), AXIS))
    largest = tl.maximum(tl.max(tl.where(seen_low, low_half, float("-inf")), AXIS),
                         tl.max(tl.where(seen_high, high_half, float("-inf")), AXIS))
    return least, largest, tl.sum(spoilt_low, AXIS) + tl.sum(spoilt_high, AXIS)


@triton.jit
def store_scales(ptr, offs, scales, mask):
    """At bytes; offs [N]: which vectors; scales float32 that bfloat16 holds."""
    bits = (scales.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
    tl.store((ptr + 2 * offs).to(tl.pointer_type(tl.uint16), bitcast=True), bits, mask=mask)


@triton.jit
def quantize_channels(x, head_ptr, channels, mask, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Codes of keys [BLOCK_SIZE, HALF] of some channels; their scales and zeros are stored."""
    least, largest, spoilt = extremes(x, x, mask, 0)
    scales, divisors, zeros, most = int4_scales(least, largest, spoilt)
    store_scales(head_ptr + key_scales(BLOCK_SIZE, HEAD_DIM), channels, scales, mask)
    tl.store(head_ptr + key_zeros(BLOCK_SIZE, HEAD_DIM) + channels, zeros.to(tl.int8).to(tl.uint8, bitcast=True),
             mask=mask)
    return int4_codes(x, divisors[None, :], zeros[None, :], most[None, :])


@triton.jit
def quantize_blocks_kernel(
    key_ptr,  # block 0's keys of the residual's layer, [num_kv_heads, BLOCK_SIZE, HEAD_DIM]
    value_ptr,
    cache_ptr,  # bytes of block 0's layer, [num_kv_heads, head_bytes]
    residual_blocks_ptr,  # [n] int64
    blocks_ptr,  # [n] int64
    num_residual_blocks,
    num_blocks,
    residual_stride,  # elements from one block to the next
    block_stride,  # bytes
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_TILE: tl.constexpr,  # a power of two from HEAD_DIM / 2 on
):
    """Grid (n, num_kv_heads). What names a block outside its cache is dropped."""
    HALF: tl.constexpr = HEAD_DIM // 2
    source = tl.load(residual_blocks_ptr + tl.program_id(0))
    target = tl.load(blocks_ptr + tl.program_id(0))
    if (source < 0) | (source >= num_residual_blocks) | (target < 0) | (target >= num_blocks):
        return
    head = tl.program_id(1)
    offs_n, offs_d = tl.arange(0, BLOCK_SIZE), tl.arange(0, HALF_TILE)
    mask = offs_d < HALF
    tile_mask = (offs_n >= 0)[:, None] & mask[None, :]
    offs = source * residual_stride + head * BLOCK_SIZE * HEAD_DIM + offs_n[:, None] * HEAD_DIM + offs_d[None, :]
    head_ptr = cache_ptr + target * block_stride + head * head_bytes(BLOCK_SIZE, HEAD_DIM)
    offs_codes = offs_n[:, None] * HALF + offs_d[None, :]

    low = tl.load(key_ptr + offs, mask=tile_mask, other=0.0).to(tl.float32)
    low_codes = quantize_channels(low, head_ptr, offs_d, mask, BLOCK_SIZE, HEAD_DIM)
    high = tl.load(key_ptr + offs + HALF, mask=tile_mask, other=0.0).to(tl.float32)
    high_codes = quantize_channels(high, head_ptr, HALF + offs_d, mask, BLOCK_SIZE, HEAD_DIM)
    tl.store(head_ptr + offs_codes, low_codes | (high_codes << 4), mask=tile_mask)

    low = tl.load(value_ptr + offs, mask=tile_mask, other=0.0).to(tl.float32)
    high = tl.load(value_ptr + offs + HALF, mask=tile_mask, other=0.0).to(tl.float32)
    least, largest, spoilt = extremes(low, high, mask, 1)
    scales, divisors, zeros, most = int4_scales(tl.minimum(least, 0.0), tl.maximum(largest, 0.0), spoilt)
    store_scales(head_ptr + value_scales(BLOCK_SIZE, HEAD_DIM), offs_n, scales, offs_n >= 0)
    halves = tl.reshape(zeros.to(tl.int32), [2, BLOCK_SIZE // 2]) << (4 * tl.arange(0, 2))[:, None]
    tl.store(head_ptr + value_zeros(BLOCK_SIZE, HEAD_DIM) + tl.arange(0, BLOCK_SIZE // 2),
             tl.sum(halves, 0).to(tl.uint8))
    low_codes = int4_codes(low, divisors[:, None], zeros[:, None], most[:, None])
    high_codes = int4_codes(high, divisors[:, None], zeros[:, None], most[:, None])
    tl.store(head_ptr + value_codes(BLOCK_SIZE, HEAD_DIM) + offs_codes, low_codes | (high_codes << 4), mask=tile_mask)
