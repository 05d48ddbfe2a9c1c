"""KV sparsity on a paged cache: how much attention rows receive, and the compaction of those that are kept.

H2O (Zhang et al. 2023) sums what all queries give, SnapKV (Li et al. 2024) what the last of a prompt give, TOVA (Oren
et al. 2024) looks at the newest query alone. Which rows to keep then is the caller's choice, per layer and KV head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import sparsity_reference
from .backends import backend, native_library, triton_launch
from .checks import (
    CACHE_DTYPE_NUMBERS,
    REFERENCE,
    TRITON,
    check,
    check_query,
    checked_cache,
    checked_ragged,
    checked_tables,
    dense,
)
from .mask import Mask
from .native.library import NativeCompaction, NativeScores, native_cache
from .ops import native_attention
from .recording import submit


def attention_scores(
    query: Tensor,
    cache: Tensor,
    layer: int,
    block_tables: Tensor,
    query_start_loc: Tensor,
    kv_lens: Tensor,
    num_scored: Tensor,
    scale: float,
    soft_cap: float | None = None,
) -> Tensor:
    """The attention that each row receives from the last queries of its sequence: the causal softmax of their scores,
    summed over these queries and over the query heads of each KV head.

    Scores are those of `paged_attention` without a window. The bits of a sequence's result do not depend on the batch,
    nor, on the native backends, on the blocks and block_size or the number of threads. Only K is read, and none of it
    for a sequence without scored queries.

    Args:
        query, cache, layer, block_tables, query_start_loc, kv_lens, scale: as in `paged_attention`.
        num_scored: `[num_seqs]` int32, how many of a sequence's queries are scored, from its last one back: from 0 to
            all of them.
        soft_cap: as in `Mask`.

    Returns:
        `[num_seqs, num_kv_heads, max_blocks * block_size]` float32, contiguous: of row j at j. 0 at rows that the
        sequence does not hold, and throughout where num_scored is 0.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, layout, device, layer, soft_cap, or values that contradict one another (Triton trusts
            the values, because the host does not wait for the device).
    """
    name = backend(cache.device.type)
    shape = checked_cache(cache, layer, name)
    check_query(query, cache, shape)
    ragged = checked_ragged(block_tables, query_start_loc, kv_lens, cache.device)
    check("num_scored", num_scored, torch.int32, kv_lens.shape, cache.device)
    dense(num_scored, "num_scored")
    mask = Mask(soft_cap=soft_cap)
    if name == REFERENCE:
        return sparsity_reference.attention_scores(query, cache, layer, *ragged, num_scored, scale, soft_cap)
    if name == TRITON:
        launch = triton_launch("sparsity_launch")
        received: Tensor = launch.attention_scores(query, cache, layer, *ragged, num_scored, scale, soft_cap)
        return received
    out = torch.zeros(kv_lens.numel(), shape.num_kv_heads, block_tables.shape[1] * shape.block_size)
    library = native_library()
    source = native_cache(cache, shape, CACHE_DTYPE_NUMBERS[cache.dtype])
    attention = native_attention(query, source, layer, ragged, scale, mask, None, out)
    attention.isa = library.isas[name]
    call = NativeScores(attention=attention, num_scored=num_scored.data_ptr(), out=out.data_ptr())
    submit(library.attention_scores, call)
    return out


def compact_rows(
    cache: Tensor, layer: int, rows: Tensor, source_tables: Tensor, target_tables: Tensor, num_kept: Tensor
) -> None:
    """Copy the rows that each KV head of a layer keeps, K and V, to the beginning of fresh blocks: for i < num_kept[s],
    row i of the target table of sequence s becomes, in head h, row `rows[s, h, i]` of its source table.

    Row i of a table is at offset `i % block_size` of the block `table[i // block_size]`. No block may be in a source
    table and in a target table, nor in two target tables; of blocks that are not full the rest stays as it is.

    Args:
        cache, layer: as in `write_kv`.
        rows: `[num_seqs, num_kv_heads, max_kept]` int32.
        source_tables: `[num_seqs, max_source_blocks]` int32; entries of blocks without a kept row are not looked at.
        target_tables: `[num_seqs, max_target_blocks]` int32; entries past the kept rows are not looked at.
        num_kept: `[num_seqs]` int32, at most max_kept; what `rows` holds past it is not looked at.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, layout, device, layer, or a count, row or block out of range (nothing is copied then;
            Triton trusts the values, because the host does not wait for the device).
    """
    name = backend(cache.device.type)
    shape, device, num_seqs = checked_cache(cache, layer, name), cache.device, num_kept.numel()
    check("num_kept", num_kept, torch.int32, (num_seqs,), device)
    max_kept = rows.shape[-1] if rows.dim() == 3 else 0
    check("rows", rows, torch.int32, (num_seqs, shape.num_kv_heads, max_kept), device)
    chosen = (
        dense(rows, "rows"),
        checked_tables("source_tables", source_tables, num_seqs, device),
        checked_tables("target_tables", target_tables, num_seqs, device),
        dense(num_kept, "num_kept"),
    )
    if name == REFERENCE:
        sparsity_reference.compact_rows(cache, layer, *chosen)
        return
    if name == TRITON:
        triton_launch("sparsity_launch").compact_rows(cache, layer, *chosen)
        return
    call = NativeCompaction(
        native_cache(cache, shape, CACHE_DTYPE_NUMBERS[cache.dtype]),
        *(each.data_ptr() for each in chosen),
        num_seqs,
        max_kept,
        source_tables.shape[1],
        target_tables.shape[1],
        layer,
        torch.get_num_threads(),
    )
    submit(native_library().compact_rows, call)
