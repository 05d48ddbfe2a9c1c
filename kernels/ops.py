"""The op set on a paged KV cache: what each op means, and the checks that stand before every backend."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import reference
from .backends import backend, native_library, triton_launch
from .checks import (
    CACHE_DTYPE_NUMBERS,
    DTYPE_NUMBERS,
    INT4_NUMBER,
    REFERENCE,
    TRITON,
    check,
    check_device,
    check_far_sinks,
    check_query,
    check_residual_tables,
    check_row_dtype,
    checked_cache,
    checked_pairs,
    checked_ragged,
    checked_residual,
    dense,
    dense_blocks,
    token_stride,
)
from .mask import CAUSAL, FarSinks, Mask, Residual
from .native.library import NativeAttention, NativeBlockCopy, NativeCache, NativeCacheWrite, native_cache
from .recording import empty, submit

# Wider than any sequence is long: the kernels know no other absence of a window.
NO_WINDOW = 2**31


def write_kv(key: Tensor, value: Tensor, cache: Tensor, layer: int, slot_mapping: Tensor) -> None:
    """Write one row of K and of V per token into the slots of a layer, quantized if the cache is.

    Args:
        key, value: `[num_tokens, num_kv_heads, head_dim]`, of the cache's dtype, or, for a quantized cache, both of
            float32, bfloat16 or float16. Tokens may be any stride apart (a slice of a fused projection); heads and
            elements must be dense.
        cache: `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, contiguous; float32, bfloat16 or
            float16, or quantized as in `kv_layout.py`; head_dim a multiple of 8 up to 256; block_size 8, 16, 32, 64
            or 128.
        layer: index into the cache's layers.
        slot_mapping: `[num_tokens]` int64, contiguous; slot = block_id * block_size + offset. Where two tokens
            name one slot, either may win.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, layout, device, layer, or a slot outside the cache (nothing is written then; Triton
            drops that row instead, because the host does not wait for the device).
    """
    name = backend(cache.device.type)
    shape, device = checked_cache(cache, layer, name), cache.device
    expected = (slot_mapping.numel(), shape.num_kv_heads, shape.head_dim)
    check_row_dtype("key", key, cache)
    check("key", key, key.dtype, expected, device)
    check("value", value, key.dtype, expected, device)
    check("slot_mapping", slot_mapping, torch.int64, expected[:1], device)
    key_stride, value_stride = token_stride("key", key), token_stride("value", value)
    if name == REFERENCE:
        reference.write_kv(key, value, cache, layer, slot_mapping)
        return
    if name == TRITON:
        launch = triton_launch()
        launch.write_kv(key, value, launch.LayerCache.of(cache, layer), dense(slot_mapping, "slot_mapping"))
        return
    library = native_library()
    call = NativeCacheWrite(
        native_cache(cache, shape, CACHE_DTYPE_NUMBERS[cache.dtype]),
        key.data_ptr(),
        value.data_ptr(),
        dense(slot_mapping, "slot_mapping").data_ptr(),
        expected[0],
        key_stride,
        value_stride,
        layer,
        DTYPE_NUMBERS[key.dtype],
        library.isas[name],
        torch.get_num_threads(),
    )
    submit(library.write_kv, call)


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
        triton_launch().copy_blocks(source, destination, checked)
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
    submit(native_library().copy_blocks, call)


def paged_attention(
    query: Tensor,
    cache: Tensor,
    layer: int,
    block_tables: Tensor,
    query_start_loc: Tensor,
    kv_lens: Tensor,
    scale: float,
    mask: Mask = CAUSAL,
    far_sinks: FarSinks | None = None,
    residual: Residual | None = None,
) -> Tensor:
    """Attention of a flat ragged batch, prefill chunks and decodes together, over a paged cache.

    Query i of the n of a sequence stands at row `kv_len - n + i` and sees what `mask` shows it from there. Query head h
    reads KV head `h // (num_heads // num_kv_heads)`. Rows that no query of a sequence sees (slots past its kv_len, rows
    behind its window) may hold anything, and what a query does not see has no part in its result.

    On the native backends the bits of a query's result depend only on that query and on the rows it sees: not on
    the batch, the chunking of the prefill, the blocks and (but for int4) block_size, or the number of threads. With
    Triton this holds of decodes (sequences with one query), not of chunks.

    Args:
        query: `[num_tokens, num_heads, head_dim]`, of the cache's dtype, or, for a quantized cache, of float32,
            bfloat16 or float16; tokens may be any stride apart.
        cache: as in `write_kv`; this step's K and V are already in it. Or, with a residual, int4 (`kv_layout.py`): the
            blocks before those that queries stand in; blocks of the step that later queries of it see are in it too.
        layer: index into the cache's layers.
        block_tables: `[num_seqs, max_blocks]` int32; entries of blocks without a row that is seen are not looked at.
        query_start_loc: `[num_seqs + 1]` int32, from 0 to num_tokens; a sequence may have no query.
        kv_lens: `[num_seqs]` int32, rows held, this step's included.
        scale: factor of the scores, usually `head_dim ** -0.5`.
        mask: window, sinks and soft cap of the scores.
        far_sinks: how sinks behind the window are scored, if unlike other rows.
        residual: of an int4 cache, where the blocks that queries stand in are; this step's K and V are already in it.

    Returns:
        `[num_tokens, num_heads, head_dim]` of query's dtype, contiguous; computed in float32.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, layout, device, layer, far_sinks without a window and sinks, or values that
            contradict one another (Triton trusts the values, because the host does not wait for the device).
    """
    name = backend(cache.device.type)
    if residual is None:
        shape = checked_cache(cache, layer, name)
    else:
        shape = checked_residual(residual.cache, residual.layer, cache, layer, name)
    check_query(query, cache if residual is None else residual.cache, shape)
    if far_sinks is not None:
        check_far_sinks(far_sinks, mask, query)
    ragged = checked_ragged(block_tables, query_start_loc, kv_lens, cache.device)
    if residual is not None:
        check_residual_tables(residual, block_tables)
    if name == REFERENCE:
        return reference.paged_attention(query, cache, layer, *ragged, scale, mask, far_sinks, residual)
    if name == TRITON:
        launch = triton_launch()
        if residual is None:
            rows = launch.LayerCache.of(cache, layer)
        else:
            rows = launch.LayerCache.int4(cache, layer, launch.LayerCache.of(residual.cache, residual.layer))
        attended: Tensor = launch.paged_attention(query, rows, *ragged, scale, mask, far_sinks, residual=residual)
        return attended
    out, library = empty(query.shape, query.dtype), native_library()
    number = CACHE_DTYPE_NUMBERS[cache.dtype] if residual is None else INT4_NUMBER
    call = native_attention(query, native_cache(cache, shape, number), layer, ragged, scale, mask, far_sinks, out)
    if residual is not None:
        call.residual = native_cache(residual.cache, shape, CACHE_DTYPE_NUMBERS[residual.cache.dtype])
        call.residual_tables, call.residual_layer = residual.block_tables.data_ptr(), residual.layer
    call.isa = library.isas[name]
    submit(library.paged_attention, call)
    return out


def native_attention(
    query: Tensor,
    cache: NativeCache,
    layer: int,
    ragged: tuple[Tensor, Tensor, Tensor],
    scale: float,
    mask: Mask,
    far: FarSinks | None,
    out: Tensor,
) -> NativeAttention:
    far_query = query if far is None else far.query
    angles = () if far is None or far.cos is None or far.sin is None else (far.cos, far.sin)
    cos, sin = (each.data_ptr() for each in angles) if angles else (None, None)
    block_tables = ragged[0]
    return NativeAttention(
        cache=cache,
        query=query.data_ptr(),
        far_query=far_query.data_ptr(),
        cos=cos,
        sin=sin,
        out=out.data_ptr(),
        block_tables=block_tables.data_ptr(),
        query_start_loc=ragged[1].data_ptr(),
        kv_lens=ragged[2].data_ptr(),
        num_tokens=query.shape[0],
        num_seqs=block_tables.shape[0],
        max_blocks=block_tables.shape[1],
        num_heads=query.shape[1],
        query_stride=query.stride(0),
        far_query_stride=far_query.stride(0),
        num_angles=angles[0].shape[1] if angles else 0,
        layer=layer,
        window=mask.window or NO_WINDOW,
        num_sinks=mask.num_sinks,
        scale=scale,
        soft_cap=mask.soft_cap or 0.0,
        dtype=DTYPE_NUMBERS[query.dtype],
        num_threads=torch.get_num_threads(),
    )
