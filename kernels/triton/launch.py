"""From tensors to grids: the ops of `ops.py` on Triton kernels. Shapes and dtypes have been checked there.

Nothing here waits for the device: values of block tables, lengths and slots are trusted, and what the host does not
know (which sequences decode, how long they are) the kernels look up.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from ..kv_layout import SCALE_BYTES, quantized
from ..mask import CAUSAL, FarSinks, Mask, Residual
from .available import interpreted
from .cache import copy_blocks_kernel, write_kv_kernel, write_quantized_kv_kernel
from .configs import COPY_CHUNK_WORDS, MAX_DECODE_HEADS, MAX_SPLITS, WRITE_CHUNK, TileConfig, config_for
from .decode import MIN_SPLIT_TOKENS, decode_kernel, reduce_kernel
from .int4 import decode_int4_kernel, prefill_int4_kernel
from .masks import FarTensors, MaskConstants, ResidualTensors, bound
from .prefill import prefill_kernel
from .quantize_int4 import quantize_blocks_kernel


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer of a paged cache, as the kernels address it: block b's keys begin `b * block_stride` after `key`.

    `key`, `value`: any tensors of the cache's dtype that begin where block 0's do. `block_stride`: in elements.
    """

    key: Tensor
    value: Tensor
    block_stride: int
    num_blocks: int
    num_kv_heads: int
    block_size: int
    head_dim: int

    @classmethod
    def of(cls, cache: Tensor, layer: int) -> LayerCache:
        """`cache`: as in `ops.write_kv`."""
        num_blocks, _, _, num_kv_heads, block_size, row_elements = cache.shape
        head_dim = row_elements - SCALE_BYTES if quantized(cache.dtype) else row_elements
        return cls(cache[:, layer, 0], cache[:, layer, 1], cache.stride(0), num_blocks, num_kv_heads, block_size,
                   head_dim)

    @classmethod
    def int4(cls, cache: Tensor, layer: int, residual: LayerCache) -> LayerCache:
        """`cache`: as in `int4_ops.quantize_blocks`, beside that residual. K and V both begin where a head does."""
        return cls(cache[:, layer], cache[:, layer], cache.stride(0), len(cache), residual.num_kv_heads,
                   residual.block_size, residual.head_dim)

    @property
    def quantized(self) -> bool:
        return self.key.element_size() == 1


def write_kv(key: Tensor, value: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """As `ops.write_kv`, but rows whose slot is outside the cache are dropped."""
    num_tokens, num_heads, head_dim = slot_mapping.numel(), cache.num_kv_heads, cache.head_dim
    if num_tokens == 0:
        return
    tensors = (key, value, cache.key, cache.value, slot_mapping, cache.num_blocks * cache.block_size)
    strides = (key.stride(0), value.stride(0), cache.block_stride)
    with launching_on(key.device):
        if cache.quantized:
            heads = heads_per_write(head_dim)
            write_quantized_kv_kernel[num_tokens, triton.cdiv(num_heads, heads)](
                *tensors, num_heads, *strides, BLOCK_SIZE=cache.block_size, HEAD_DIM=head_dim, HEADS=heads)
        else:
            row_size = num_heads * head_dim
            write_kv_kernel[num_tokens, triton.cdiv(row_size, WRITE_CHUNK)](
                *tensors, row_size, *strides, BLOCK_SIZE=cache.block_size, HEAD_DIM=head_dim, CHUNK=WRITE_CHUNK)


def paged_attention(query: Tensor, cache: LayerCache, block_tables: Tensor, query_start_loc: Tensor, kv_lens: Tensor,
                    scale: float, mask: Mask = CAUSAL, far_sinks: FarSinks | None = None,
                    max_query_len: int | None = None, residual: Residual | None = None) -> Tensor:
    """As `ops.paged_attention`. `max_query_len`: of the longest sequence, where the host knows it; kernels that
    it shows to have nothing to do are not launched."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if query.numel() == 0:
        return out
    padded_dim = max(16, triton.next_power_of_2(cache.head_dim))
    batch = _Batch(query, out, cache, block_tables, query_start_loc, kv_lens, scale, *bound(mask, far_sinks),
                   None if residual is None else _residual_tensors(residual))
    with launching_on(query.device):
        backend, arch = current_target()
        int4 = "" if residual is None else " int4"
        _decode(batch, config_for("decode" + int4, backend, arch, padded_dim, query.element_size()))
        if max_query_len is None or max_query_len > 1:
            _prefill(batch, config_for("prefill" + int4, backend, arch, padded_dim, query.element_size()))
    return out


def quantize_blocks(residual: LayerCache, residual_blocks: Tensor, cache: LayerCache, blocks: Tensor) -> None:
    """As `int4_ops.quantize_blocks`, but what names a block outside its cache is dropped."""
    if not blocks.numel():
        return
    half_tile = int(triton.next_power_of_2(cache.head_dim // 2))
    with launching_on(blocks.device):
        quantize_blocks_kernel[blocks.numel(), cache.num_kv_heads](
            residual.key, residual.value, cache.key, residual_blocks, blocks, residual.num_blocks, cache.num_blocks,
            residual.block_stride, cache.block_stride, BLOCK_SIZE=cache.block_size, HEAD_DIM=cache.head_dim,
            HALF_TILE=half_tile, num_warps=quantize_warps(cache.block_size * half_tile))


def _residual_tensors(residual: Residual) -> ResidualTensors:
    layer = LayerCache.of(residual.cache, residual.layer)
    return ResidualTensors(layer.key, layer.value, residual.block_tables, layer.block_stride)


def quantize_warps(elements: int) -> int:
    """For tiles of so many."""
    return 4 if elements <= 4096 else 8


class _Batch(NamedTuple):
    """The arguments of `paged_attention` and its result, for both kernels."""

    query: Tensor
    out: Tensor
    cache: LayerCache
    block_tables: Tensor
    query_start_loc: Tensor
    kv_lens: Tensor
    scale: float
    mask: MaskConstants
    far: FarTensors | None
    residual: ResidualTensors | None

    @property
    def rows(self) -> tuple[Tensor, Tensor | ResidualTensors]:
        """Where K and V are: what the kernels differ in."""
        return (self.cache.key, self.cache.value if self.residual is None else self.residual)

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.cache.num_kv_heads


def _decode(batch: _Batch, config: TileConfig) -> None:
    query, out, cache, block_tables, query_start_loc, kv_lens, scale, mask, far, residual = batch
    num_seqs, num_heads = kv_lens.numel(), query.shape[1]
    heads = even_share(batch.group, MAX_DECODE_HEADS)
    num_splits = splits_for(block_tables.shape[1] * cache.block_size)
    partial = torch.empty((num_seqs, num_heads, num_splits, cache.head_dim), dtype=torch.float32, device=query.device)
    lse = torch.empty((num_seqs, num_heads, num_splits), dtype=torch.float32, device=query.device)
    kernel = decode_kernel if residual is None else decode_int4_kernel
    kernel[num_splits, cache.num_kv_heads * triton.cdiv(batch.group, heads), num_seqs](
        query, *batch.rows, block_tables, query_start_loc, kv_lens, partial, lse,
        query.stride(0), cache.block_stride, block_tables.stride(0), scale, far,
        GROUP=batch.group, HEADS=heads, BLOCK_SIZE=cache.block_size, HEAD_DIM=cache.head_dim, TILE_N=config.tile_n,
        NUM_SPLITS=num_splits, MASK=mask, num_warps=config.num_warps, num_stages=config.num_stages)
    reduce_kernel[num_heads, num_seqs](
        partial, lse, out, query_start_loc, kv_lens, HEAD_DIM=cache.head_dim, TILE_N=config.tile_n,
        NUM_SPLITS=num_splits, MASK=mask, INT4_BLOCK_SIZE=None if residual is None else cache.block_size)


def _prefill(batch: _Batch, config: TileConfig) -> None:
    query, out, cache, block_tables, query_start_loc, kv_lens, scale, mask, far, residual = batch
    num_tokens, num_seqs = query.shape[0], kv_lens.numel()
    heads = even_share(batch.group, config.rows)
    num_tiles = num_tokens // (config.rows // heads) + num_seqs
    kernel = prefill_kernel if residual is None else prefill_int4_kernel
    kernel[num_tiles, cache.num_kv_heads * triton.cdiv(batch.group, heads)](
        query, out, *batch.rows, block_tables, query_start_loc, kv_lens, num_seqs,
        query.stride(0), cache.block_stride, block_tables.stride(0), scale, far,
        GROUP=batch.group, HEADS=heads, ROWS=config.rows, BLOCK_SIZE=cache.block_size, HEAD_DIM=cache.head_dim,
        TILE_N=config.tile_n, MASK=mask, num_warps=config.num_warps, num_stages=config.num_stages)


def even_share(group: int, most: int) -> int:
    """Heads per tile when a group is divided evenly among as few tiles of at most `most` as it takes."""
    return -(-group // -(-group // most))


def heads_per_write(head_dim: int) -> int:
    """KV heads whose rows one program quantizes: a power of two."""
    return max(1, WRITE_CHUNK // max(16, int(triton.next_power_of_2(head_dim))))


def splits_for(max_rows: int) -> int:
    """Splits that a sequence of so many rows may need: a power of two. Fewer than MAX_SPLITS change no bit."""
    return min(MAX_SPLITS, int(triton.next_power_of_2(-(-max_rows // MIN_SPLIT_TOKENS.value))))


def copy_blocks(source: Tensor, destination: Tensor, pairs: npt.NDArray[np.int64]) -> None:
    """As `ops.copy_blocks`; besides, either tensor may be in pinned host memory. The copy is queued, not awaited.

    Raises:
        ValueError: a block outside its tensor.
    """
    bad = ((pairs < 0) | (pairs >= (source.shape[0], destination.shape[0]))).any(1)
    if bad.any():
        raise ValueError(f"pairs: pair {int(bad.argmax())} names a block outside its tensor")
    device = destination.device if source.device.type == "cpu" else source.device
    words = [_as_words(tensor, source, destination) for tensor in (source, destination)]
    num_words = words[0].shape[1]
    if not len(pairs) or not num_words:
        return
    on_device = torch.from_numpy(pairs).to(device, non_blocking=True)
    with launching_on(device):
        copy_blocks_kernel[len(pairs), triton.cdiv(num_words, COPY_CHUNK_WORDS)](
            *words, on_device, num_words, words[0].stride(0), words[1].stride(0), CHUNK=COPY_CHUNK_WORDS)


def gather_blocks(source: Tensor, block_ids: npt.NDArray[np.int64]) -> Tensor:
    """Blocks of a pool, one after another in a staging buffer of its device, which one memcpy takes to the host."""
    staging = torch.empty((len(block_ids), *source.shape[1:]), dtype=source.dtype, device=source.device)
    copy_blocks(source, staging, np.stack([block_ids, np.arange(len(block_ids))], 1))
    return staging


def scatter_blocks(staging: Tensor, destination: Tensor, block_ids: npt.NDArray[np.int64]) -> None:
    """The way back: `destination[block_ids[i]] = staging[i]`."""
    copy_blocks(staging, destination, np.stack([np.arange(len(block_ids)), block_ids], 1))


def _as_words(tensor: Tensor, *both: Tensor) -> Tensor:
    """`[num_blocks, num_words]` of the widest integers that fit the blocks of both tensors."""
    item_bytes = tensor.element_size()
    block_elements = tensor[0].numel() if len(tensor) else 0
    flat = tensor.as_strided((len(tensor), block_elements), (tensor.stride(0), 1))
    lengths = [block_elements, *(length for x in both for length in (x.stride(0), x.storage_offset()))]
    for word in (torch.int64, torch.int32, torch.int16):
        if all(length * item_bytes % word.itemsize == 0 for length in lengths):
            return flat.view(word)
    return flat.view(torch.int8)


def current_target() -> tuple[str, str]:
    """(cuda | hip | interpreter, architecture) of the current device."""
    if interpreted():
        return "interpreter", ""
    target = triton.runtime.driver.active.get_current_target()
    return str(target.backend), str(target.arch)


def launching_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
