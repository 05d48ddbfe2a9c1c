"""Refuses bad tensors, by name, before a backend sees them: wrong dtypes are TypeErrors, the rest ValueErrors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .triton.available import NAME as TRITON

REFERENCE = "torch-reference"
MAX_HEAD_DIM = 256
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BLOCK_SIZES = (8, 16, 32, 64, 128)


def checked_cache(cache: Tensor, layer: int, backend_name: str) -> torch.Size:
    check_dtype("cache", cache)
    shape = cache.shape
    if len(shape) != 6 or shape[2] != 2:
        raise ValueError(
            f"cache must be [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], got {list(shape)}"
        )
    _, num_layers, _, _, block_size, head_dim = shape
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    if head_dim % 8 != 0 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}")
    if not cache.is_contiguous():
        raise ValueError(f"cache must be contiguous, got strides {cache.stride()}")
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer must be in [0, {num_layers}), got {layer}")
    check_device("cache", cache, backend_name)
    return shape


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


def checked_pairs(pairs: list[tuple[int, int]] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`[n, 2]`, contiguous."""
    array = np.asarray(pairs) if len(pairs) else np.empty((0, 2), np.int64)
    if array.dtype != np.int64:
        raise TypeError(f"pairs must be int64, got {array.dtype}")
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"pairs must be [n, 2], got {list(array.shape)}")
    return np.ascontiguousarray(array)
