"""The ops in plain torch, on any device: slow, short and clear. What each op means is said in `ops.py`.

Inputs have passed the checks of `ops.py` for shapes, dtypes and devices; what is checked here are the values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def write_kv(key: Tensor, value: Tensor, cache: Tensor, layer: int, slot_mapping: Tensor) -> None:
    num_blocks, block_size = cache.shape[0], cache.shape[4]
    bad = (slot_mapping < 0) | (slot_mapping >= num_blocks * block_size)
    if bad.any():
        raise ValueError(f"slot_mapping: the slot of token {int(bad.nonzero()[0, 0])} is outside the cache")
    block_ids, offsets = slot_mapping // block_size, slot_mapping % block_size
    cache[block_ids, layer, 0, :, offsets] = key
    cache[block_ids, layer, 1, :, offsets] = value


def copy_blocks(source: Tensor, destination: Tensor, pairs: Tensor) -> None:
    limits = torch.tensor([source.shape[0], destination.shape[0]], device=pairs.device)
    bad = ((pairs < 0) | (pairs >= limits)).any(1)
    if bad.any():
        raise ValueError(f"pairs: pair {int(bad.nonzero()[0, 0])} names a block outside its tensor")
    destination[pairs[:, 1]] = source[pairs[:, 0]]


def paged_attention(
    query: Tensor,
    cache: Tensor,
    layer: int,
    block_tables: Tensor,
    query_start_loc: Tensor,
    kv_lens: Tensor,
    scale: float,
) -> Tensor:
    block_size = cache.shape[4]
    starts, lens = query_start_loc.tolist(), kv_lens.tolist()
    _check_ragged(starts, lens, query.shape[0], block_tables.shape[1] * block_size)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for seq, kv_len in enumerate(lens):
        begin, end = starts[seq], starts[seq + 1]
        if begin == end:
            continue
        block_ids = block_tables[seq, : -(-kv_len // block_size)].long()
        if ((block_ids < 0) | (block_ids >= cache.shape[0])).any():
            raise ValueError(f"block_tables: sequence {seq} names a block outside the cache")
        # [num_blocks, 2, num_kv_heads, block_size, head_dim] -> [2, num_kv_heads, kv_len, head_dim]
        rows = cache[block_ids, layer].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :kv_len].float()
        out[begin:end] = _attend(query[begin:end].float(), rows[0], rows[1], scale).to(query.dtype)
    return out


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads, kv_len, _ = keys.shape
    grouped = query.view(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim).permute(1, 2, 0, 3)
    scores = grouped @ keys.unsqueeze(1).transpose(-1, -2) * scale  # [num_kv_heads, group, num_queries, kv_len]
    positions = torch.arange(kv_len, device=query.device)
    hidden = positions > positions[kv_len - num_queries :, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return (weights @ values.unsqueeze(1)).permute(2, 0, 1, 3).reshape(query.shape)


def _check_ragged(starts: list[int], lens: list[int], num_tokens: int, max_rows: int) -> None:
    if starts[0] != 0 or starts[-1] != num_tokens:
        raise ValueError(f"query_start_loc must run from 0 to {num_tokens} tokens, got {starts[0]} to {starts[-1]}")
    for seq, kv_len in enumerate(lens):
        num_queries = starts[seq + 1] - starts[seq]
        if num_queries < 0:
            raise ValueError(f"query_start_loc decreases at sequence {seq}")
        if not num_queries <= kv_len <= max_rows:
            raise ValueError(
                f"kv_lens: sequence {seq} holds {kv_len} rows, "
                f"outside [{num_queries} (its queries), {max_rows} (its block table)]"
            )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x.float(), weight.float(), bias).to(x.dtype)
