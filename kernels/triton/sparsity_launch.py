"""From tensors to grids: the ops of `sparsity_ops.py` on Triton kernels. Shapes and dtypes have been checked there.

As in `launch.py`, nothing here waits for the device.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .configs import WRITE_CHUNK, config_for
from .launch import LayerCache, current_target, even_share, launching_on, splits_for
from .sparsity import compact_rows_kernel, receive_kernel, score_sums_kernel

SCORED_ROWS = 32
"""Of a tile of scored queries by heads. One size for all, lest a lone query's bits depend on the batch."""


def attention_scores(query: Tensor, cache: Tensor, layer: int, block_tables: Tensor, query_start_loc: Tensor,
                     kv_lens: Tensor, num_scored: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """As `sparsity_ops.attention_scores`."""
    rows, (num_tokens, num_heads, head_dim) = LayerCache.of(cache, layer), query.shape
    num_seqs, max_rows = kv_lens.numel(), block_tables.shape[1] * rows.block_size
    received = torch.empty((num_seqs, rows.num_kv_heads, max_rows), dtype=torch.float32, device=query.device)
    if received.numel() == 0:
        return received
    group, num_splits = num_heads // rows.num_kv_heads, splits_for(max_rows)
    heads = even_share(group, SCORED_ROWS)
    lse = torch.empty((num_tokens, num_heads, num_splits), dtype=torch.float32, device=query.device)
    tensors = (query, rows.key, block_tables, query_start_loc, kv_lens, num_scored, lse)
    scalars = (query.stride(0), rows.block_stride, block_tables.stride(0), scale)
    with launching_on(query.device):
        padded_dim = max(16, triton.next_power_of_2(head_dim))
        config = config_for("decode", *current_target(), padded_dim, query.element_size())
        constants = dict(
            GROUP=group, ROWS=SCORED_ROWS, BLOCK_SIZE=rows.block_size, HEAD_DIM=head_dim,
            TILE_N=config.tile_n, NUM_SPLITS=num_splits, SOFT_CAP=soft_cap, num_warps=config.num_warps,
            num_stages=config.num_stages)
        num_tiles = num_tokens // (SCORED_ROWS // heads) + num_seqs
        score_sums_kernel[num_tiles, rows.num_kv_heads * triton.cdiv(group, heads), num_splits](
            *tensors, num_seqs, *scalars, **constants)
        receive_kernel[triton.cdiv(max_rows, config.tile_n), rows.num_kv_heads, num_seqs](
            *tensors, received, max_rows, *scalars, **constants)
    return received


def compact_rows(cache: Tensor, layer: int, rows: Tensor, source_tables: Tensor, target_tables: Tensor,
                 num_kept: Tensor) -> None:
    """As `sparsity_ops.compact_rows`."""
    held, (num_seqs, num_kv_heads, max_kept) = LayerCache.of(cache, layer), rows.shape
    if rows.numel() == 0 or target_tables.numel() == 0 or source_tables.numel() == 0:
        return
    per_program = rows_per_copy(held.head_dim)
    with launching_on(cache.device):
        compact_rows_kernel[triton.cdiv(max_kept, per_program), num_kv_heads, num_seqs](
            held.key, held.value, rows, source_tables, target_tables, num_kept, max_kept, held.block_stride,
            source_tables.stride(0), target_tables.stride(0), BLOCK_SIZE=held.block_size, HEAD_DIM=held.head_dim,
            ROWS=per_program)


def rows_per_copy(head_dim: int) -> int:
    """Rows of a head that one program copies: a power of two."""
    return max(1, WRITE_CHUNK // max(16, int(triton.next_power_of_2(head_dim))))
