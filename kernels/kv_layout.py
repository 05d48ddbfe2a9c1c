"""How rows of K and V lie in a paged cache: as they are, or quantized to one byte per element.

A quantized cache is a contiguous tensor of a dtype in QUANTIZED_DTYPES and of shape
`[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim + SCALE_BYTES]`. The bytes of one head of one block hold
its codes, `[block_size, head_dim]`, and then their scales, `[block_size]` float32: a row x reads back as code * scale.
A block stays one run of bytes, so whatever copies, sends or stores blocks need not know.

A row's scale is its largest magnitude over that of the codes; codes are rounded to nearest even. A row of zeros has
scale 0. A row that holds an infinity or NaN has scale NaN, and reads back as NaN throughout.

FP8 is E3M4: a sign, 3 bits of exponent e and 4 of mantissa m. Every code is a number: 2^(e-3) * (1 + m/16) or, where e
is 0, m * 2^-6. Beside a scale per row the wider range of E4M3 is of little use, and it is the mantissa that counts: on
SmolLM2-135M E4M3 costs 0.9 to 1.0 percent of perplexity, E3M4 0.24. Torch has no such dtype: bytes stand for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 4
"""Bytes of the scale that a quantized row has in each head."""

FP8 = torch.uint8
LARGEST_CODE = {torch.int8: 127.0, FP8: 31.0}
QUANTIZED_DTYPES = frozenset(LARGEST_CODE)


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
