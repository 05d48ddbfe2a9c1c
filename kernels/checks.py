"""Refuses bad tensors, by name, before a backend sees them: wrong dtypes are TypeErrors, the rest ValueErrors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .kv_layout import FP8, INT4, QUANTIZED_DTYPES, SCALE_BYTES, int4_head_bytes, quantized
from .mask import FarSinks, Mask, Residual
from .triton import available as triton_available

TRITON = triton_available.NAME
REFERENCE = "torch-reference"
MAX_HEAD_DIM = 256
# The numbers of abi.h.
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CACHE_DTYPE_NUMBERS = {**DTYPE_NUMBERS, torch.int8: 3, FP8: 4}
INT4_NUMBER = 5
BLOCK_SIZES = (8, 16, 32, 64, 128)


class CacheShape(NamedTuple):
    num_blocks: int
    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int


def checked_cache(cache: Tensor, layer: int, backend_name: str) -> CacheShape:
    if cache.dtype not in CACHE_DTYPE_NUMBERS:
        raise TypeError(f"cache must be float32, bfloat16, float16, int8 or uint8 (E3M4), got {cache.dtype}")
    shape = cache.shape
    if len(shape) != 6 or shape[2] != 2:
        raise ValueError(
            f"cache must be [num_blocks, num_layers, 2, num_kv_heads, block_size, row], got {list(shape)}"
        )
    num_blocks, num_layers, _, num_kv_heads, block_size, row = shape
    head_dim = row - SCALE_BYTES if quantized(cache.dtype) else row
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    if head_dim % 8 != 0 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim} ({cache.dtype} rows of {row})"
        )
    if not cache.is_contiguous():
        raise ValueError(f"cache must be contiguous, got strides {cache.stride()}")
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer must be in [0, {num_layers}), got {layer}")
    check_device("cache", cache, backend_name)
    return CacheShape(num_blocks, num_layers, num_kv_heads, block_size, head_dim)


def checked_residual(residual: Tensor, layer: int, cache: Tensor, cache_layer: int, backend_name: str) -> CacheShape:
    """The shape of the residual beside an int4 cache, which is checked too."""
    check_dtype("residual", residual)
    shape = checked_cache(residual, layer, backend_name)
    head = (shape.num_kv_heads, int4_head_bytes(shape.block_size, shape.head_dim))
    if cache.dim() != 4 or cache.shape[2:] != head:
        raise ValueError(
            f"an int4 cache must be [num_blocks, num_layers, {head[0]}, {head[1]}], got {list(cache.shape)}"
        )
    check("cache", cache, INT4, cache.shape, residual.device)
    dense(cache, "cache")
    if not 0 <= cache_layer < cache.shape[1]:
        raise ValueError(f"layer must be in [0, {cache.shape[1]}), got {cache_layer}")
    return shape


def check_residual_tables(residual: Residual, block_tables: Tensor) -> None:
    check("residual.block_tables", residual.block_tables, torch.int32, block_tables.shape, block_tables.device)
    dense(residual.block_tables, "residual.block_tables")


def check_row_dtype(label: str, rows: Tensor, cache: Tensor) -> None:
    """Rows beside a cache are of its dtype, or, where it is quantized, of any that can be quantized."""
    if cache.dtype in QUANTIZED_DTYPES:
        check_dtype(label, rows)
    elif rows.dtype != cache.dtype:
        raise TypeError(f"{label} must be {cache.dtype}, got {rows.dtype}")


def check_query(query: Tensor, cache: Tensor, shape: CacheShape) -> None:
    if query.dim() != 3 or query.shape[2] != shape.head_dim or query.shape[1] % shape.num_kv_heads != 0:
        raise ValueError(
            f"query must be [num_tokens, a multiple of {shape.num_kv_heads} KV heads, {shape.head_dim}], "
            f"got {list(query.shape)}"
        )
    check_row_dtype("query", query, cache)
    check("query", query, query.dtype, query.shape, cache.device)
    token_stride("query", query)


def check_far_sinks(far: FarSinks, mask: Mask, query: Tensor) -> None:
    if mask.window is None or mask.num_sinks == 0:
        raise ValueError(f"far_sinks need a mask with a window and sinks, got {mask}")
    check("far_sinks.query", far.query, query.dtype, query.shape, query.device)
    token_stride("far_sinks.query", far.query)
    if far.cos is None and far.sin is None:
        return
    if far.cos is None or far.sin is None:
        raise ValueError("far_sinks: cos and sin come together")
    if far.cos.dim() != 2 or not 0 < 2 * far.cos.shape[1] <= query.shape[2]:
        raise ValueError(
            f"far_sinks.cos must be [{mask.num_sinks}, up to head_dim / 2 = {query.shape[2] // 2}], "
            f"got {list(far.cos.shape)}"
        )
    for label, angles in (("far_sinks.cos", far.cos), ("far_sinks.sin", far.sin)):
        check(label, angles, torch.float32, (mask.num_sinks, far.cos.shape[1]), query.device)
        dense(angles, label)


def check_device(label: str, tensor: Tensor, backend_name: str) -> None:
    if backend_name not in (REFERENCE, TRITON) and tensor.device.type != "cpu":
        raise ValueError(f"{label} is on {tensor.device}; {backend_name} kernels take CPU tensors")


def check_dtype(label: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPE_NUMBERS:
        raise TypeError(f"{label} must be float32, bfloat16 or float16, got {tensor.dtype}")


def check(label: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{label} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{label} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{label} is on {tensor.device}, expected {device}")


def token_stride(label: str, rows: Tensor) -> int:
    """Elements from one token to the next, in rows whose heads and elements are dense."""
    token_stride, head_stride, element_stride = rows.stride()
    if rows.numel() > 0 and (element_stride != 1 or (rows.shape[1] > 1 and head_stride != rows.shape[2])):
        raise ValueError(f"{label} must have dense heads and elements, got strides {rows.stride()}")
    return token_stride


def dense(tensor: Tensor, label: str) -> Tensor:
    if not tensor.is_contiguous():
        raise ValueError(f"{label} must be contiguous, got strides {tensor.stride()}")
    return tensor


def dense_blocks(label: str, tensor: Tensor) -> None:
    """The first dimension counts blocks, which may be any stride apart; the elements of each are dense."""
    if tensor.dim() == 0:
        raise ValueError(f"{label} must be [num_blocks, ...], got a scalar")
    if tensor.numel() > 0 and not tensor[0].is_contiguous():
        raise ValueError(f"{label} must have dense blocks, got strides {tensor.stride()}")


def checked_tables(label: str, tables: Tensor, num_seqs: int, device: torch.device) -> Tensor:
    if tables.dim() != 2:
        raise ValueError(f"{label} must be [num_seqs, max_blocks], got {list(tables.shape)}")
    check(label, tables, torch.int32, (num_seqs, tables.shape[1]), device)
    return dense(tables, label)


def checked_ragged(
    block_tables: Tensor, query_start_loc: Tensor, kv_lens: Tensor, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    num_seqs = kv_lens.numel()
    check("kv_lens", kv_lens, torch.int32, (num_seqs,), device)
    block_tables = checked_tables("block_tables", block_tables, num_seqs, device)
    check("query_start_loc", query_start_loc, torch.int32, (num_seqs + 1,), device)
    return block_tables, dense(query_start_loc, "query_start_loc"), dense(kv_lens, "kv_lens")


def checked_pairs(pairs: list[tuple[int, int]] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`[n, 2]`, contiguous."""
    array = np.asarray(pairs) if len(pairs) else np.empty((0, 2), np.int64)
    if array.dtype != np.int64:
        raise TypeError(f"pairs must be int64, got {array.dtype}")
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"pairs must be [n, 2], got {list(array.shape)}")
    return np.ascontiguousarray(array)
