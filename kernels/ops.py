"""The op set: what each op means, the checks that stand before every backend, and the choice of a backend.

The environment variable KVARTO_KERNELS, read at each call, chooses: `auto` (the default: the best native
kernels for this processor, else torch), `reference`, or the name of a backend in `available_backends()`.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .native.library import NativeAttention, NativeCache, NativeLibrary, NativeLinear, load_library

REFERENCE = "torch-reference"
MAX_HEAD_DIM = 256
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BLOCK_SIZES = (8, 16, 32, 64, 128)

# Keyed by the status of abi.h; {} is the offending sequence or token.
STATUS_MESSAGES = {
    2: "query_start_loc must start at 0, never decrease and end at num_tokens; wrong at sequence {}",
    3: "kv_lens: sequence {} holds fewer rows than it has queries, or more than its block table names",
    4: "block_tables: sequence {} names a block outside the cache",
    5: "slot_mapping: the slot of token {} is outside the cache",
}


def available_backends() -> tuple[str, ...]:
    """Every backend that runs here, slowest first; a missing native library is warned about once."""
    library = load_library()
    return (REFERENCE, *(library.isas if library else ()))


def backend() -> str:
    """The backend that a call made now would use.

    Returns:
        One of `native-avx512-bf16`, `native-avx512`, `native-avx2`, `native-portable`, `torch-reference`.

    Raises:
        ValueError: KVARTO_KERNELS names a backend that is unknown or does not run here.
    """
    return _resolve(os.environ.get("KVARTO_KERNELS", "auto"), load_library())


@functools.cache
def _resolve(chosen: str, library: NativeLibrary | None) -> str:
    available = (REFERENCE, *(library.isas if library else ()))
    if chosen in ("reference", REFERENCE):
        return REFERENCE
    if chosen == "auto":
        return available[-1]
    if chosen not in available:
        raise ValueError(f"KVARTO_KERNELS={chosen!r}; here it can be auto, {', '.join(available)}")
    return chosen


def write_kv(key: Tensor, value: Tensor, cache: Tensor, layer: int, slot_mapping: Tensor) -> None:
    """Write one row of K and of V per token into the slots of a layer.

    Args:
        key, value: `[num_tokens, num_kv_heads, head_dim]`, of the cache's dtype. Tokens may be any stride apart
            (a slice of a fused projection); heads and elements must be dense.
        cache: `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, contiguous; float32, bfloat16 or
            float16; head_dim a multiple of 8 up to 256; block_size 8, 16, 32, 64 or 128.
        layer: index into the cache's layers.
        slot_mapping: `[num_tokens]` int64, contiguous; slot = block_id * block_size + offset. Where two tokens
            name one slot, either may win.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, layout, device, layer, or a slot outside the cache (nothing is written then).
    """
    name = backend()
    shape, dtype, device = _checked_cache(cache, layer, name), cache.dtype, cache.device
    expected = (slot_mapping.numel(), shape[3], shape[5])
    _check("key", key, dtype, expected, device)
    _check("value", value, dtype, expected, device)
    _check("slot_mapping", slot_mapping, torch.int64, expected[:1], device)
    key_stride, value_stride = _token_stride("key", key), _token_stride("value", value)
    if name == REFERENCE:
        reference.write_kv(key, value, cache, layer, slot_mapping)
        return
    library = _library()
    detail = ctypes.c_int64()
    status = library.write_kv(
        _native_cache(cache, shape),
        key.data_ptr(),
        value.data_ptr(),
        _dense(slot_mapping, "slot_mapping").data_ptr(),
        expected[0],
        key_stride,
        value_stride,
        layer,
        DTYPE_NUMBERS[dtype],
        torch.get_num_threads(),
        detail,
    )
    _raise_for(status, detail.value)


def paged_attention(
    query: Tensor,
    cache: Tensor,
    layer: int,
    block_tables: Tensor,
    query_start_loc: Tensor,
    kv_lens: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of a flat ragged batch, prefill chunks and decodes together, over a paged cache.

    Query i of the n of a sequence sees its first `kv_len - n + i + 1` rows. Query head h reads KV head
    `h // (num_heads // num_kv_heads)`. Slots past a sequence's kv_len are never read, whatever they hold.

    On the native backends the bits of a query's result depend only on that query and on the rows it sees: not on
    the batch, the chunking of the prefill, the blocks and block_size, or the number of threads.

    Args:
        query: `[num_tokens, num_heads, head_dim]`, of the cache's dtype; tokens may be any stride apart.
        cache: as in `write_kv`; this step's K and V are already in it.
        layer: index into the cache's layers.
        block_tables: `[num_seqs, max_blocks]` int32; entries that kv_lens does not reach are not looked at.
        query_start_loc: `[num_seqs + 1]` int32, from 0 to num_tokens; a sequence may have no query.
        kv_lens: `[num_seqs]` int32, rows held, this step's included.
        scale: factor of the scores, usually `head_dim ** -0.5`.

    Returns:
        `[num_tokens, num_heads, head_dim]` of query's dtype, contiguous; computed in float32.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, layout, device, layer, or values that contradict one another.
    """
    name = backend()
    shape, dtype, device = _checked_cache(cache, layer, name), cache.dtype, cache.device
    query_shape = query.shape
    if len(query_shape) != 3 or query_shape[2] != shape[5] or query_shape[1] % shape[3] != 0:
        raise ValueError(
            f"query must be [num_tokens, a multiple of {shape[3]} KV heads, {shape[5]}], got {list(query_shape)}"
        )
    _check("query", query, dtype, query_shape, device)
    query_stride = _token_stride("query", query)
    num_seqs = kv_lens.numel()
    if block_tables.dim() != 2:
        raise ValueError(f"block_tables must be [num_seqs, max_blocks], got {list(block_tables.shape)}")
    max_blocks = block_tables.shape[1]
    _check("kv_lens", kv_lens, torch.int32, (num_seqs,), device)
    _check("block_tables", block_tables, torch.int32, (num_seqs, max_blocks), device)
    _check("query_start_loc", query_start_loc, torch.int32, (num_seqs + 1,), device)
    if name == REFERENCE:
        return reference.paged_attention(query, cache, layer, block_tables, query_start_loc, kv_lens, scale)
    library = _library()
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    detail = ctypes.c_int64()
    call = NativeAttention(
        _native_cache(cache, shape),
        query.data_ptr(),
        out.data_ptr(),
        _dense(block_tables, "block_tables").data_ptr(),
        _dense(query_start_loc, "query_start_loc").data_ptr(),
        _dense(kv_lens, "kv_lens").data_ptr(),
        query_shape[0],
        num_seqs,
        max_blocks,
        query_shape[1],
        query_stride,
        layer,
        scale,
        DTYPE_NUMBERS[dtype],
        library.isas[name],
        torch.get_num_threads(),
    )
    _raise_for(library.paged_attention(call, detail), detail.value)
    return out


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight in the order in which the backend that packed it reads it; made by `pack_linear`.

    It keeps its backend whatever KVARTO_KERNELS says later, and no reference to the original weight, except
    that `torch-reference` holds the weight itself.
    """

    data: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int
    backend: str

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Copy a weight into the layout of the current backend; its dtype, hence its size, stays (rows padded to 32).

    Args:
        weight: `[out_features, in_features]` float32, bfloat16 or float16; rows may be any stride apart.
        bias: `[out_features]` of any floating dtype, kept as float32.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, layout or device.
    """
    name = backend()
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features], got {list(weight.shape)}")
    n, k = weight.shape
    _check_dtype("weight", weight)
    _check_device("weight", weight, name)
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(f"bias must be floating point, got {bias.dtype}")
        _check("bias", bias, bias.dtype, (n,), weight.device)
        bias = bias.detach().float().contiguous()
    weight = weight.detach()
    if name == REFERENCE:
        return PackedLinear(weight, bias, n, k, name)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    library = _library()
    packed = torch.empty(library.packed_elements(n, k), dtype=weight.dtype)
    dtype_number, isa = DTYPE_NUMBERS[weight.dtype], library.isas[name]
    library.pack_linear(weight.data_ptr(), n, k, weight.stride(0), dtype_number, isa, packed.data_ptr())
    return PackedLinear(packed, bias, n, k, name)


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """`x @ weight.T + bias`, accumulated in float32.

    On the native backends every element is summed over in_features in order: the bits of a row do not depend on
    the other rows nor on the number of threads.

    Args:
        x: `[num_rows, in_features]` float32, bfloat16 or float16, not necessarily the weight's dtype; rows may be
            any stride apart.

    Returns:
        `[num_rows, out_features]` of x's dtype, contiguous.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, layout or device.
    """
    if x.dim() != 2 or x.shape[1] != packed.in_features:
        raise ValueError(f"x must be [num_rows, {packed.in_features}], got {list(x.shape)}")
    _check_dtype("x", x)
    if x.device != packed.data.device:
        raise ValueError(f"x is on {x.device}, the weight on {packed.data.device}")
    if packed.backend == REFERENCE:
        return reference.linear(x, packed.data, packed.bias)
    if x.stride(1) != 1 and x.numel() > 0:
        raise ValueError(f"x must have dense rows, got strides {x.stride()}")
    library = _library()
    out = torch.empty((x.shape[0], packed.out_features), dtype=x.dtype)
    call = NativeLinear(
        x.data_ptr(),
        packed.data.data_ptr(),
        None if packed.bias is None else packed.bias.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        packed.out_features,
        packed.in_features,
        x.stride(0),
        DTYPE_NUMBERS[x.dtype],
        DTYPE_NUMBERS[packed.data.dtype],
        library.isas[packed.backend],
        torch.get_num_threads(),
    )
    _raise_for(library.linear(call), 0)
    return out


def _library() -> NativeLibrary:
    library = load_library()
    if library is None:
        raise RuntimeError("the native kernels disappeared after a backend was chosen")
    return library


def _native_cache(cache: Tensor, shape: torch.Size) -> NativeCache:
    num_blocks, num_layers, _, num_kv_heads, block_size, head_dim = shape
    return NativeCache(cache.data_ptr(), num_blocks, num_layers, num_kv_heads, block_size, head_dim)


def _raise_for(status: int, detail: int) -> None:
    if status == 1:
        raise MemoryError("the native kernels could not get their working memory")
    if status != 0:
        raise ValueError(STATUS_MESSAGES[status].format(detail))


def _checked_cache(cache: Tensor, layer: int, backend_name: str) -> torch.Size:
    _check_dtype("cache", cache)
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
    _check_device("cache", cache, backend_name)
    return shape


def _check_device(label: str, tensor: Tensor, backend_name: str) -> None:
    if backend_name != REFERENCE and tensor.device.type != "cpu":
        raise ValueError(f"{label} is on {tensor.device}; {backend_name} kernels take CPU tensors")


def _check_dtype(label: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPE_NUMBERS:
        raise TypeError(f"{label} must be float32, bfloat16 or float16, got {tensor.dtype}")


def _check(label: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{label} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{label} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{label} is on {tensor.device}, expected {device}")


def _token_stride(label: str, rows: Tensor) -> int:
    """Elements from one token to the next, in rows whose heads and elements are dense."""
    token_stride, head_stride, element_stride = rows.stride()
    if rows.numel() > 0 and (element_stride != 1 or (rows.shape[1] > 1 and head_stride != rows.shape[2])):
        raise ValueError(f"{label} must have dense heads and elements, got strides {rows.stride()}")
    return token_stride


def _dense(tensor: Tensor, label: str) -> Tensor:
    if not tensor.is_contiguous():
        raise ValueError(f"{label} must be contiguous, got strides {tensor.stride()}")
    return tensor
