"""Writes to the cache that are no attention: rows into slots, and whole blocks from pool to pool."""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import head_stride, quantize, scale_pointers
from .tiles import padded_dim


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
def write_codes(rows_ptr, head_ptr, block_offset, offset, head, head_mask, BLOCK_SIZE: tl.constexpr,
                HEAD_DIM: tl.constexpr):
    """Quantize a token's rows of heads head [HEADS] into a slot. rows_ptr: of the token; head_ptr: block 0's head 0."""
    CODE_TYPE: tl.constexpr = head_ptr.dtype.element_ty
    offs_d = tl.arange(0, padded_dim(HEAD_DIM))
    mask = head_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    rows = tl.load(rows_ptr + head[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    codes, scales = quantize(rows, CODE_TYPE)
    head_ptrs = head_ptr + head * head_stride(CODE_TYPE, BLOCK_SIZE, HEAD_DIM)
    tl.store(head_ptrs[:, None] + block_offset + offset * HEAD_DIM + offs_d[None, :], codes, mask=mask)
    tl.store(scale_pointers(head_ptrs, block_offset, offset, BLOCK_SIZE, HEAD_DIM), scales, mask=head_mask)


@triton.jit
def write_quantized_kv_kernel(
    key_rows_ptr,  # [num_tokens, num_kv_heads, HEAD_DIM]; tokens key_stride apart
    value_rows_ptr,
    key_ptr,  # block 0's keys of the layer, as `kv_layout.py` has them
    value_ptr,
    slot_mapping_ptr,  # [num_tokens] int64
    num_slots,
    num_kv_heads,
    key_stride,
    value_stride,
    block_stride,  # bytes from one block to the next
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,  # of a program
):
    """Grid (num_tokens, ceil(num_kv_heads / HEADS)). Rows whose slot is outside the cache are dropped."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    if (slot < 0) | (slot >= num_slots):
        return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    block_offset, offset = slot // BLOCK_SIZE * block_stride, slot % BLOCK_SIZE
    head_mask = head < num_kv_heads
    write_codes(key_rows_ptr + token * key_stride, key_ptr, block_offset, offset, head, head_mask, BLOCK_SIZE, HEAD_DIM)
    write_codes(value_rows_ptr + token * value_stride, value_ptr, block_offset, offset, head, head_mask, BLOCK_SIZE,
                HEAD_DIM)


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
