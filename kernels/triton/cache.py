"""Writes to the cache that are no attention: rows into slots, and whole blocks from pool to pool."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_kv_kernel(
    key_rows_ptr,  # [num_tokens, num_kv_heads, HEAD_DIM]; tokens key_stride apart
    value_rows_ptr,
    key_ptr,  # block 0's keys of the layer, [num_kv_heads, BLOCK_SIZE, HEAD_DIM]; blocks block_stride apart
    value_ptr,
    slot_mapping_ptr,  # [num_tokens] int64
    num_slots,
    row_size,  # num_kv_heads * HEAD_DIM
    key_stride,
    value_stride,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (num_tokens, ceil(row_size / CHUNK)). Rows whose slot is outside the cache are dropped."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    if (slot < 0) | (slot >= num_slots):
        return
    offs = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    mask = offs < row_size
    head, offs_d = offs // HEAD_DIM, offs % HEAD_DIM
    offs_slot = slot // BLOCK_SIZE * block_stride + (head * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + offs_d
    tl.store(key_ptr + offs_slot, tl.load(key_rows_ptr + token * key_stride + offs, mask=mask), mask=mask)
    tl.store(value_ptr + offs_slot, tl.load(value_rows_ptr + token * value_stride + offs, mask=mask), mask=mask)


@triton.jit
def copy_blocks_kernel(
    source_ptr,  # words; blocks source_stride apart
    destination_ptr,
    pairs_ptr,  # [num_pairs, 2] int64: (block of source, block of destination)
    num_words,  # of a block
    source_stride,
    destination_stride,
    CHUNK: tl.constexpr,
):
    """Grid (num_pairs, ceil(num_words / CHUNK)). Either pool may be pinned host memory."""
    pair = tl.program_id(0).to(tl.int64)
    from_block = tl.load(pairs_ptr + 2 * pair)
    to_block = tl.load(pairs_ptr + 2 * pair + 1)
    offs = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    mask = offs < num_words
    words = tl.load(source_ptr + from_block * source_stride + offs, mask=mask)
    tl.store(destination_ptr + to_block * destination_stride + offs, words, mask=mask)
