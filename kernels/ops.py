"""The op set: what each op means, the checks that stand before every backend, and the choice of a backend.

The environment variable KVARTO_KERNELS, read at each call, chooses: `auto` (the default: on a GPU Triton, on a
processor the best native kernels; else torch), `reference`, or the name of a backend in `available_backends()`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
import os
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import reference
from .checks import (
    DTYPE_NUMBERS,
    REFERENCE,
    check,
    check_device,
    check_dtype,
    checked_cache,
    checked_pairs,
    dense,
    dense_blocks,
    token_stride,
)
from .native.library import NativeAttention, NativeBlockCopy, NativeCache, NativeLibrary, NativeLinear, load_library
from .triton import available as triton_available

TRITON = triton_available.NAME

# Keyed by the status of abi.h; {} is the offending sequence or token.
STATUS_MESSAGES = {
    2: "query_start_loc must start at 0, never decrease and end at num_tokens; wrong at sequence {}",
    3: "kv_lens: sequence {} holds fewer rows than it has queries, or more than its block table names",
    4: "block_tables: sequence {} names a block outside the cache",
    5: "slot_mapping: the slot of token {} is outside the cache",
    6: "pairs: pair {} names a block outside its tensor",
}


def available_backends(device_type: str = "cpu") -> tuple[str, ...]:
    """Every backend that runs on such devices, slowest first; a missing native library is warned about once."""
    if device_type != "cpu":
        return (REFERENCE, *([TRITON] if triton_available.runs_on(device_type) else ()))
    library = load_library()
    return (REFERENCE, *(library.isas if library else ()))


def backend(device_type: str = "cpu") -> str:
    """The backend that a call made now would use, on tensors of such a device ("cpu", "cuda").

    Returns:
        One of `triton`, `native-avx512-bf16`, `native-avx512`, `native-avx2`, `native-portable`, `torch-reference`.

    Raises:
        ValueError: KVARTO_KERNELS names a backend that is unknown or does not run here.
    """
    chosen = os.environ.get("KVARTO_KERNELS", "auto")
    if chosen in ("reference", REFERENCE):
        return REFERENCE
    if chosen == TRITON and triton_available.runs_on(device_type):
        return TRITON  # on a processor this is the interpreter, for tests
    if chosen == "auto" and device_type != "cpu":
        return available_backends(device_type)[-1]
    return _resolve(chosen, load_library())


@functools.cache
def _resolve(chosen: str, library: NativeLibrary | None) -> str:
    available: tuple[str, ...] = (REFERENCE, *(library.isas if library else ()))
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
        ValueError: a wrong shape, layout, device, layer, or a slot outside the cache (nothing is written then; Triton
            drops that row instead, because the host does not wait for the device).
    """
    name = backend(cache.device.type)
    shape, dtype, device = checked_cache(cache, layer, name), cache.dtype, cache.device
    expected = (slot_mapping.numel(), shape[3], shape[5])
    check("key", key, dtype, expected, device)
    check("value", value, dtype, expected, device)
    check("slot_mapping", slot_mapping, torch.int64, expected[:1], device)
    key_stride, value_stride = token_stride("key", key), token_stride("value", value)
    if name == REFERENCE:
        reference.write_kv(key, value, cache, layer, slot_mapping)
        return
    if name == TRITON:
        _triton().write_kv(key, value, _triton().LayerCache.of(cache, layer), dense(slot_mapping, "slot_mapping"))
        return
    library = _library()
    detail = ctypes.c_int64()
    status = library.write_kv(
        _native_cache(cache, shape),
        key.data_ptr(),
        value.data_ptr(),
        dense(slot_mapping, "slot_mapping").data_ptr(),
        expected[0],
        key_stride,
        value_stride,
        layer,
        DTYPE_NUMBERS[dtype],
        torch.get_num_threads(),
        detail,
    )
    _raise_for(status, detail.value)


def copy_blocks(source: Tensor, destination: Tensor, pairs: list[tuple[int, int]] | npt.NDArray[np.int64]) -> None:
    """Copy whole blocks from one pool to another, or within one: `destination[d] = source[s]` for every (s, d).

    The copies may run in any order and at once: a destination must be named once, and not as a source when both
    tensors are one.

    Args:
        source, destination: `[num_blocks, ...]` of one dtype (any), device and shape of a block; elements of a block
            must be dense, blocks may be any stride apart.
        pairs: (block of source, block of destination), as a list or `[n, 2]` int64; may be empty.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, layout or device, or a block outside its tensor (nothing is copied then).
    """
    name = backend(source.device.type)
    dense_blocks("source", source)
    dense_blocks("destination", destination)
    check_device("source", source, name)
    check("destination", destination, source.dtype, (destination.shape[0], *source.shape[1:]), source.device)
    checked = checked_pairs(pairs)
    if not len(checked):
        return
    if name == REFERENCE:
        reference.copy_blocks(source, destination, torch.from_numpy(checked).to(source.device))
        return
    if name == TRITON:
        _triton().copy_blocks(source, destination, checked)
        return
    item_bytes = source.element_size()
    call = NativeBlockCopy(
        source.data_ptr(),
        destination.data_ptr(),
        checked.ctypes.data,
        len(checked),
        math.prod(source.shape[1:]) * item_bytes,
        source.shape[0],
        destination.shape[0],
        source.stride(0) * item_bytes,
        destination.stride(0) * item_bytes,
        torch.get_num_threads(),
    )
    detail = ctypes.c_int64()
    _raise_for(_library().copy_blocks(call, detail), detail.value)


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
    the batch, the chunking of the prefill, the blocks and block_size, or the number of threads. With Triton this holds
    of decodes (sequences with one query), not of chunks.

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
        ValueError: a wrong shape, layout, device, layer, or values that contradict one another (Triton trusts the
            values, because the host does not wait for the device).
    """
    name = backend(cache.device.type)
    shape, dtype, device = checked_cache(cache, layer, name), cache.dtype, cache.device
    query_shape = query.shape
    if len(query_shape) != 3 or query_shape[2] != shape[5] or query_shape[1] % shape[3] != 0:
        raise ValueError(
            f"query must be [num_tokens, a multiple of {shape[3]} KV heads, {shape[5]}], got {list(query_shape)}"
        )
    check("query", query, dtype, query_shape, device)
    query_stride = token_stride("query", query)
    num_seqs = kv_lens.numel()
    if block_tables.dim() != 2:
        raise ValueError(f"block_tables must be [num_seqs, max_blocks], got {list(block_tables.shape)}")
    max_blocks = block_tables.shape[1]
    check("kv_lens", kv_lens, torch.int32, (num_seqs,), device)
    check("block_tables", block_tables, torch.int32, (num_seqs, max_blocks), device)
    check("query_start_loc", query_start_loc, torch.int32, (num_seqs + 1,), device)
    if name == REFERENCE:
        return reference.paged_attention(query, cache, layer, block_tables, query_start_loc, kv_lens, scale)
    if name == TRITON:
        values = [dense(block_tables, "block_tables"), dense(query_start_loc, "query_start_loc")]
        values.append(dense(kv_lens, "kv_lens"))
        attended: Tensor = _triton().paged_attention(query, _triton().LayerCache.of(cache, layer), *values, scale)
        return attended
    library = _library()
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    detail = ctypes.c_int64()
    call = NativeAttention(
        _native_cache(cache, shape),
        query.data_ptr(),
        out.data_ptr(),
        dense(block_tables, "block_tables").data_ptr(),
        dense(query_start_loc, "query_start_loc").data_ptr(),
        dense(kv_lens, "kv_lens").data_ptr(),
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
    that `torch-reference` and `triton` hold the weight itself.
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
    name = backend(weight.device.type)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features], got {list(weight.shape)}")
    n, k = weight.shape
    check_dtype("weight", weight)
    check_device("weight", weight, name)
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(f"bias must be floating point, got {bias.dtype}")
        check("bias", bias, bias.dtype, (n,), weight.device)
        bias = bias.detach().float().contiguous()
    weight = weight.detach()
    if name in (REFERENCE, TRITON):
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
    check_dtype("x", x)
    if x.device != packed.data.device:
        raise ValueError(f"x is on {x.device}, the weight on {packed.data.device}")
    if packed.backend == REFERENCE:
        return reference.linear(x, packed.data, packed.bias)
    if packed.backend == TRITON:  # the vendor's matrix multiplication, through torch
        bias = None if packed.bias is None else packed.bias.to(x.dtype)
        return torch.nn.functional.linear(x, packed.data.to(x.dtype), bias)
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


def _triton() -> ModuleType:
    """What launches the Triton kernels; not imported before it is needed, since Triton may not be there."""
    return importlib.import_module(".triton.launch", __package__)


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
