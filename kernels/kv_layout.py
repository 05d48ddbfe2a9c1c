"""How K and V lie in a paged cache: as they are, or quantized to one byte or to half a byte per element.

Of one byte: a quantized cache is a contiguous tensor of a dtype in QUANTIZED_DTYPES and of shape
`[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim + SCALE_BYTES]`. The bytes of one head of one block hold
its codes, `[block_size, head_dim]`, and then their scales, `[block_size]` float32: a row x reads back as code * scale.
A block stays one run of bytes, so whatever copies, sends or stores blocks need not know.

A row's scale is its largest magnitude over that of the codes; codes are rounded to nearest even. A row of zeros has
scale 0. A row that holds an infinity or NaN has scale NaN, and reads back as NaN throughout.

FP8 is E3M4: a sign, 3 bits of exponent e and 4 of mantissa m. Every code is a number: 2^(e-3) * (1 + m/16) or, where e
is 0, m * 2^-6. Beside a scale per row the wider range of E4M3 is of little use, and it is the mantissa that counts: on
SmolLM2-135M E4M3 costs 0.9 to 1.0 percent of perplexity, E3M4 0.24. Torch has no such dtype: bytes stand for it.

Of half a byte, int4: KIVI (Liu et al. 2024) fitted to blocks, with keys quantized per channel over the rows of a block
and values per row. Only whole blocks are quantized; the rows of a block that is being filled, and all rows for queries
in that block, are read from a dense cache, the *residual*. An int4 cache is uint8, contiguous, of shape
`[num_blocks, num_layers, num_kv_heads, int4_head_bytes]`. The bytes of one head of one block are those of `Int4Parts`,
one after another. Byte i of a row of codes holds element i, low, and element i + head_dim / 2, high. An element reads
back as (code - zero) * scale, which float32 holds exactly.

The scale of a vector x, a channel of keys or a row of values, comes from its range. That of a channel is from low = min
x to high = max x, and its scale max((high - low) / 15, max |x| / 120), rounded up to bfloat16: the first covers x with
16 codes, the second keeps the zero, round(-low / scale), within int8. That of a row is from low = min(x, 0) to high =
max(x, 0), and its scale (high - low) / 15, rounded up alike: its zero is one of the codes, and two rows' zeros share a
byte, row i low and row i + block_size / 2 high. A row of head_dim values rarely lacks either sign, so next to nothing
is lost, and half a byte is won; a channel often does.

Codes are clamp(round(x / scale) + zero, 0, 15). All of it in float32, with ties to even. A vector whose scale is 0
reads back as zeros, one whose scale is not finite as NaN, which is then its scale: both have codes and zero 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SCALE_BYTES = 4
"""Bytes of the scale that a quantized row has in each head."""

FP8 = torch.uint8
LARGEST_CODE = {torch.int8: 127.0, FP8: 31.0}
QUANTIZED_DTYPES = frozenset(LARGEST_CODE)

INT4 = torch.uint8
"""What int4 caches are made of; their shape tells them from FP8."""
INT4_LARGEST_CODE = 15.0
INT4_LARGEST_ZERO = 120.0
"""Of which no more is asked before rounding."""


def quantized(dtype: torch.dtype) -> bool:
    return dtype in QUANTIZED_DTYPES


def row_elements(dtype: torch.dtype, head_dim: int) -> int:
    """The last dimension of a cache of that dtype."""
    return head_dim + SCALE_BYTES if quantized(dtype) else head_dim


def codes_and_scales(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a quantized cache: `[..., block_size, head_dim]` of its dtype and `[..., block_size]` float32."""
    block_size, head_dim = cache.shape[-2], cache.shape[-1] - SCALE_BYTES
    heads = cache.view(torch.int8).flatten(-2)
    codes = heads[..., : block_size * head_dim].view(*cache.shape[:-1], head_dim)
    return codes.view(cache.dtype), heads[..., block_size * head_dim :].view(torch.float32)


def widen(codes: Tensor) -> Tensor:
    """The values of codes of a quantized dtype, float32, exactly."""
    if codes.dtype != FP8:
        return codes.float()
    bits = codes.short()
    # Six bits higher, and the sign where it belongs, a code is the float16 of 2^-12 its value.
    return ((bits & 0x80) << 8 | (bits & 0x7F) << 6).view(torch.float16).float() * 2.0**12


class Int4Parts(NamedTuple):
    """Views of an int4 cache, each behind its dimensions `[num_blocks, num_layers, num_kv_heads]`."""

    key_codes: Tensor
    """`[block_size, head_dim / 2]` uint8."""
    value_codes: Tensor
    """The same."""
    key_scales: Tensor
    """`[head_dim]` bfloat16."""
    value_scales: Tensor
    """`[block_size]` bfloat16."""
    key_zeros: Tensor
    """`[head_dim]` int8."""
    value_zeros: Tensor
    """`[block_size / 2]` uint8, as `pack_int4` makes them of `[block_size]`."""


def int4_head_bytes(block_size: int, head_dim: int) -> int:
    """Bytes of K and V of one head of one block of an int4 cache."""
    return block_size * head_dim + 2 * (head_dim + block_size) + head_dim + block_size // 2


def int4_parts(cache: Tensor, block_size: int, head_dim: int) -> Int4Parts:
    half = block_size * head_dim // 2
    sizes = [half, half, 2 * head_dim, 2 * block_size, head_dim, block_size // 2]
    key_codes, value_codes, key_scales, value_scales, key_zeros, value_zeros = torch.split(cache, sizes, -1)
    return Int4Parts(
        key_codes.view(*cache.shape[:-1], block_size, -1),
        value_codes.view(*cache.shape[:-1], block_size, -1),
        key_scales.view(torch.bfloat16),
        value_scales.view(torch.bfloat16),
        key_zeros.view(torch.int8),
        value_zeros,
    )


def pack_int4(codes: Tensor) -> Tensor:
    """Bytes `[..., n / 2]` of codes, or of zeros, `[..., n]`, uint8 from 0 to 15."""
    low, high = codes.chunk(2, -1)
    return low | high << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """The way back."""
    return torch.cat((packed & 15, packed >> 4), -1)
