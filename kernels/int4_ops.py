"""The op that int4 caches have beside those of `ops.py`: blocks out of the residual, quantized."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .backends import backend, native_library, triton_launch
from .checks import DTYPE_NUMBERS, INT4_NUMBER, REFERENCE, TRITON, check, checked_residual, dense
from .native.library import NativeQuantization, native_cache
from .recording import submit


def quantize_blocks(
    residual: Tensor, residual_layer: int, residual_blocks: Tensor, cache: Tensor, layer: int, blocks: Tensor
) -> None:
    """Quantize whole blocks of one layer: block `residual_blocks[i]` of the residual into block `blocks[i]` of a cache.

    The codes are those of `kv_layout.py` bit for bit on every backend.

    Args:
        residual: `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, contiguous; float32, bfloat16 or
            float16; block_size and head_dim as in `write_kv`.
        residual_layer: index into its layers.
        residual_blocks: `[n]` int64, contiguous; may be empty.
        cache: `[num_blocks, num_layers, num_kv_heads, int4_head_bytes(block_size, head_dim)]` uint8, contiguous.
        layer: index into its layers.
        blocks: `[n]` int64, contiguous, each named once.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, layout, device, layer, or a block outside its cache (nothing is written then; Triton
            drops that block instead, because the host does not wait for the device).
    """
    name = backend(cache.device.type)
    shape = checked_residual(residual, residual_layer, cache, layer, name)
    check("blocks", blocks, torch.int64, (blocks.numel(),), cache.device)
    check("residual_blocks", residual_blocks, torch.int64, (blocks.numel(),), cache.device)
    dense(blocks, "blocks")
    dense(residual_blocks, "residual_blocks")
    if name == REFERENCE:
        reference.quantize_blocks(residual, residual_layer, residual_blocks, cache, layer, blocks)
        return
    if name == TRITON:
        launch = triton_launch()
        source = launch.LayerCache.of(residual, residual_layer)
        launch.quantize_blocks(source, residual_blocks, launch.LayerCache.int4(cache, layer, source), blocks)
        return
    library = native_library()
    call = NativeQuantization(
        native_cache(residual, shape, DTYPE_NUMBERS[residual.dtype]),
        native_cache(cache, shape, INT4_NUMBER),
        residual_blocks.data_ptr(),
        blocks.data_ptr(),
        blocks.numel(),
        residual_layer,
        layer,
        library.isas[name],
        torch.get_num_threads(),
    )
    submit(library.quantize_blocks, call)
