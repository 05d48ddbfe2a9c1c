"""Rows as codes and scales (`kv_layout.py`): what kernels do with an element of a quantized cache, int8 or uint8, which
stands for FP8 (E3M4)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import kv_layout

SCALE_BYTES = tl.constexpr(kv_layout.SCALE_BYTES)


@triton.constexpr_function
def quantized(element_type):
    return element_type.primitive_bitwidth == 8


@triton.constexpr_function
def head_stride(element_type, block_size, head_dim):
    """Elements from one head of a block to the next."""
    return block_size * (head_dim + (kv_layout.SCALE_BYTES if element_type.primitive_bitwidth == 8 else 0))


@triton.constexpr_function
def largest_code(code_type):
    return kv_layout.LARGEST_CODE[kv_layout.FP8 if code_type == tl.uint8 else torch.int8]


@triton.constexpr_function
def code_unit(code_type, dtype):
    """What a code is divided by when it is widened to dtype, and its scale multiplied by.

    Weights times scales are rounded to dtype. The units of float16 keep most of them from becoming subnormal there, and
    the scale of no row of float16 from overflowing. Those of the others save a multiplication.
    """
    if dtype == tl.float16:
        return 16.0 if code_type == tl.uint8 else 64.0
    return 4096.0 if code_type == tl.uint8 else 1.0


@triton.constexpr_function
def code_factor(code_type, dtype):
    """What `widened` multiplies by, where bits of FP8 are first read as 2^-12 their value."""
    if not quantized(code_type):
        return 1.0
    return (4096.0 if code_type == tl.uint8 else 1.0) / code_unit(code_type, dtype)


@triton.jit
def widened(elements, dtype: tl.constexpr):
    """Elements of a cache as dtype: codes exactly, and divided by `code_unit`."""
    if elements.dtype == tl.uint8:
        # Six bits higher, and the sign where it belongs, a code is the float16 of 2^-12 its value.
        bits = elements.to(tl.uint16)
        wide = (((bits & 0x80) << 8) | ((bits & 0x7F) << 6)).to(tl.float16, bitcast=True).to(dtype)
    elif elements.dtype == tl.int8:
        wide = elements.to(tl.float32).to(dtype)  # the interpreter makes no bfloat16 of integers
    else:
        wide = elements
    FACTOR: tl.constexpr = code_factor(elements.dtype, dtype)
    if FACTOR != 1.0:
        wide = wide * FACTOR
    return wide


@triton.jit
def scale_pointers(head_ptr, block_offset, offs_slot, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Pointers to float32. head_ptr: the codes of a head in block 0; block_offset: bytes from there to the block."""
    scale_ptr = (head_ptr + BLOCK_SIZE * HEAD_DIM).to(tl.pointer_type(tl.float32), bitcast=True)
    return scale_ptr + block_offset // SCALE_BYTES + offs_slot


@triton.jit
def quantize(rows, code_type: tl.constexpr):
    """Codes [ROWS, padded_dim] of code_type and scales [ROWS] of float32 rows, whose padding is 0."""
    LARGEST: tl.constexpr = largest_code(code_type)
    # tl.max need not let NaN through.
    magnitudes = tl.where(tl.abs(rows) < float("inf"), tl.abs(rows), float("inf"))
    largest = tl.max(magnitudes, 1)
    scales = tl.where(largest < float("inf"), tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32)),
                      float("nan"))
    usable = scales > 0  # neither 0 nor NaN
    divisors = tl.where(usable, scales, 1.0)[:, None] + tl.zeros(rows.shape, tl.float32)
    quotients = tl.where(usable[:, None], tl.div_rn(rows, divisors), 0.0)
    if code_type == tl.uint8:
        codes = fp8_codes(quotients)
    else:
        # At 1.5 * 2^23 the floats are the integers: the addition rounds to nearest even.
        rounded = (quotients + 12582912.0) - 12582912.0
        codes = tl.minimum(tl.maximum(rounded, -LARGEST), LARGEST).to(tl.int8)
    return codes, scales


@triton.jit
def fp8_codes(x):
    """The E3M4 codes nearest to float32 x, even ones between two, saturating."""
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.int32, bitcast=True)
    # 19 bits of the fraction go; exponents count from 2^-3 instead of 2^-127.
    normal = ((bits + 0x3FFFF + ((bits >> 19) & 1)) >> 19) - (124 << 4)
    # Below 2^-2 the codes are multiples of 2^-6, and so are the floats from 2^17 on.
    subnormal = (magnitude + 131072.0).to(tl.int32, bitcast=True) - 0x48000000
    code = tl.minimum(tl.where(magnitude < 0.25, subnormal, normal), 0x7F)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)
