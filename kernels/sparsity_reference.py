"""The ops of `sparsity_ops.py` in plain torch, on any device; values are checked here, the rest was before."""

from __future__ import annotations

import torch
from torch import Tensor

from .kv_layout import codes_and_scales, quantized
from .reference import check_ragged, dots, read_rows


def attention_scores(
    query: Tensor,
    cache: Tensor,
    layer: int,
    block_tables: Tensor,
    query_start_loc: Tensor,
    kv_lens: Tensor,
    num_scored: Tensor,
    scale: float,
    soft_cap: float | None,
) -> Tensor:
    num_blocks, num_kv_heads, block_size = cache.shape[0], cache.shape[3], cache.shape[4]
    starts, lens, counts = query_start_loc.tolist(), kv_lens.tolist(), num_scored.tolist()
    max_rows = block_tables.shape[1] * block_size
    check_ragged(starts, lens, query.shape[0], max_rows)
    received = torch.zeros(len(lens), num_kv_heads, max_rows, device=cache.device)
    for seq, (kv_len, count) in enumerate(zip(lens, counts, strict=True)):
        end = starts[seq + 1]
        if not 0 <= count <= end - starts[seq]:
            raise ValueError(f"num_scored: sequence {seq} scores {count} of {end - starts[seq]} queries")
        if count == 0:
            continue
        rows = torch.arange(kv_len, device=cache.device)
        block_ids = block_tables[seq, rows // block_size].long()
        if ((block_ids < 0) | (block_ids >= num_blocks)).any():
            raise ValueError(f"block_tables: sequence {seq} names a block outside the cache")
        keys, _ = read_rows(cache, layer, block_ids, rows % block_size)
        scores = dots(query[end - count : end].float(), keys) * scale  # [num_kv_heads, group, count, kv_len]
        if soft_cap is not None:
            scores = soft_cap * (scores / soft_cap).tanh()
        unseen = rows > rows[kv_len - count :, None]
        received[seq, :, :kv_len] = scores.masked_fill(unseen, float("-inf")).softmax(-1).sum((1, 2))
    return received


def compact_rows(
    cache: Tensor, layer: int, rows: Tensor, source_tables: Tensor, target_tables: Tensor, num_kept: Tensor
) -> None:
    num_blocks, num_kv_heads, block_size = cache.shape[0], cache.shape[3], cache.shape[4]
    heads = torch.arange(num_kv_heads, device=cache.device)[:, None]
    moves = []
    for seq, count in enumerate(num_kept.tolist()):
        room = target_tables.shape[1] * block_size
        if not 0 <= count <= min(rows.shape[2], room):
            raise ValueError(f"num_kept: sequence {seq} keeps {count} of {rows.shape[2]} rows, with room for {room}")
        kept, places = rows[seq, :, :count], torch.arange(count, device=cache.device)
        if ((kept < 0) | (kept >= source_tables.shape[1] * block_size)).any():
            raise ValueError(f"rows: sequence {seq} keeps a row outside its source table")
        blocks = {"source": source_tables[seq, kept // block_size], "target": target_tables[seq, places // block_size]}
        for label, block_ids in blocks.items():
            if ((block_ids < 0) | (block_ids >= num_blocks)).any():
                raise ValueError(f"{label}_tables: sequence {seq} names a block outside the cache")
        moves.append((blocks["source"].long(), kept % block_size, blocks["target"].long(), places % block_size))
    for part in codes_and_scales(cache) if quantized(cache.dtype) else (cache,):
        for source, source_offsets, target, target_offsets in moves:
            part[target, layer, :, heads, target_offsets] = part[source, layer, :, heads, source_offsets]
