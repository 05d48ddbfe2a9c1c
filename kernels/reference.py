"""The ops in plain torch, on any device: slow, short and clear. What each op means is said in `ops.py`.

Inputs have passed the checks of `ops.py` for shapes, dtypes and devices; what is checked here are the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kv_layout import (
    FP8,
    INT4,
    INT4_LARGEST_CODE,
    INT4_LARGEST_ZERO,
    LARGEST_CODE,
    codes_and_scales,
    int4_parts,
    pack_int4,
    quantized,
    unpack_int4,
    widen,
)
from .mask import CAUSAL, FarSinks, Mask, Residual


def write_kv(key: Tensor, value: Tensor, cache: Tensor, layer: int, slot_mapping: Tensor) -> None:
    num_blocks, block_size = cache.shape[0], cache.shape[4]
    bad = (slot_mapping < 0) | (slot_mapping >= num_blocks * block_size)
    if bad.any():
        raise ValueError(f"slot_mapping: the slot of token {int(bad.nonzero()[0, 0])} is outside the cache")
    block_ids, offsets = slot_mapping // block_size, slot_mapping % block_size
    for side, rows in enumerate((key, value)):
        if not quantized(cache.dtype):
            cache[block_ids, layer, side, :, offsets] = rows
            continue
        codes, scales = codes_and_scales(cache)
        new_codes, new_scales = quantize(rows.float(), cache.dtype)
        codes[block_ids, layer, side, :, offsets] = new_codes
        scales[block_ids, layer, side, :, offsets] = new_scales


def quantize(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes `[..., head_dim]` of the dtype and scales `[...]` of float32 rows `[..., head_dim]`; see `kv_layout.py`."""
    largest = LARGEST_CODE[dtype]
    scales = rows.abs().amax(-1) / largest
    scales = scales.masked_fill(~rows.isfinite().all(-1), float("nan"))
    parts = torch.where((scales > 0).unsqueeze(-1), rows / scales.unsqueeze(-1), 0.0).clamp(-largest, largest)
    return (parts.round().to(dtype) if dtype == torch.int8 else _to_fp8(parts)), scales


def _to_fp8(parts: Tensor) -> Tensor:
    """The E3M4 codes nearest to float32 numbers from -31 to 31."""
    magnitudes = parts.abs()
    mantissas, exponents = magnitudes.frexp()  # mantissas from 1/2 to 1: 16 to 32 steps, of which 32 carry
    normal, small = (mantissas * 32).round() + 16 * (exponents + 1), (magnitudes * 2.0**6).round()
    return torch.where(magnitudes < 2.0**-2, small, normal).to(FP8) | parts.signbit().to(FP8) << 7


def quantize_blocks(
    residual: Tensor, residual_layer: int, residual_blocks: Tensor, cache: Tensor, layer: int, blocks: Tensor
) -> None:
    limits = torch.tensor([len(residual), len(cache)], device=blocks.device)
    named = torch.stack((residual_blocks, blocks), 1)
    bad = ((named < 0) | (named >= limits)).any(1)
    if bad.any():
        raise ValueError(f"blocks: entry {int(bad.nonzero()[0, 0])} names a block outside its cache")
    parts = int4_parts(cache, *residual.shape[4:])
    keys, values = residual[residual_blocks, residual_layer].float().unbind(1)
    channels = keys.transpose(-1, -2)
    codes, scales, zeros = _quantize_int4(channels, channels.amin(-1), channels.amax(-1))
    parts.key_codes[blocks, layer] = pack_int4(codes.transpose(-1, -2))
    parts.key_scales[blocks, layer], parts.key_zeros[blocks, layer] = scales, zeros.to(torch.int8)
    codes, scales, zeros = _quantize_int4(values, values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0))
    parts.value_codes[blocks, layer] = pack_int4(codes)
    parts.value_scales[blocks, layer], parts.value_zeros[blocks, layer] = scales, pack_int4(zeros.to(INT4))


def _quantize_int4(vectors: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[..., n]`, scales `[...]` bfloat16 and zeros `[...]` float32 of float32 vectors `[..., n]` and ranges."""
    # Where the range has a 0 in it, the first is never the smaller.
    largest = torch.maximum(high.abs(), low.abs())
    steps = torch.maximum((high - low) / INT4_LARGEST_CODE, largest / INT4_LARGEST_ZERO)
    scales = ((steps.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)  # up to the next of bfloat16
    scales = scales.masked_fill(~(steps.isfinite() & scales.isfinite()), float("nan"))
    used = scales > 0
    divisors = scales.where(used, 1.0)
    zeros = (-low / divisors).round().clamp(-128, 127).where(used, 0.0)
    codes = ((vectors / divisors.unsqueeze(-1)).round() + zeros.unsqueeze(-1)).clamp(0, INT4_LARGEST_CODE)
    return codes.where(used.unsqueeze(-1), 0.0).to(INT4), scales.bfloat16(), zeros


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
    mask: Mask = CAUSAL,
    far_sinks: FarSinks | None = None,
    residual: Residual | None = None,
) -> Tensor:
    block_size = (cache if residual is None else residual.cache).shape[4]
    starts, lens = query_start_loc.tolist(), kv_lens.tolist()
    check_ragged(starts, lens, query.shape[0], block_tables.shape[1] * block_size)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for seq, kv_len in enumerate(lens):
        begin, end = starts[seq], starts[seq + 1]
        if begin == end:
            continue
        rows = torch.arange(kv_len, device=cache.device)
        positions = rows[kv_len - (end - begin) :]
        seen = _seen(mask, rows, positions)
        held = [("block_tables", cache, layer, block_tables[seq], seen)]
        if residual is not None:
            own = rows >= (positions // block_size * block_size)[:, None]
            held = [
                ("block_tables", cache, layer, block_tables[seq], seen & ~own),
                ("residual.block_tables", residual.cache, residual.layer, residual.block_tables[seq], seen & own),
            ]
        parts = []
        for label, pool, pool_layer, table, seen_there in held:
            wanted = rows[seen_there.any(0)]
            block_ids = table[wanted // block_size].long()
            if ((block_ids < 0) | (block_ids >= len(pool))).any():
                raise ValueError(f"{label}: sequence {seq} names a block outside the cache")
            places = (block_ids, wanted % block_size)
            if pool.dim() == 4:
                keys_and_values = _read_int4(pool, pool_layer, *places, block_size, query.shape[2])
            else:
                keys_and_values = read_rows(pool, pool_layer, *places)
            parts.append((*keys_and_values, wanted.unsqueeze(0), seen_there[:, wanted]))
        keys, values, read, read_seen = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        far = None
        if far_sinks is not None:
            far = FarSinks(far_sinks.query[begin:end].float(), far_sinks.cos, far_sinks.sin)
        out[begin:end] = _attend(
            query[begin:end].float(), positions, keys, values, read[0], read_seen, scale, mask, far
        )
    return out


def _seen(mask: Mask, rows: Tensor, positions: Tensor) -> Tensor:
    """`[num_queries, num_rows]`."""
    causal = rows <= positions[:, None]
    if mask.window is None:
        return causal
    return causal & ((rows > positions[:, None] - mask.window) | (rows < mask.num_sinks))


def _read_int4(
    cache: Tensor, layer: int, block_ids: Tensor, offsets: Tensor, block_size: int, head_dim: int
) -> tuple[Tensor, Tensor]:
    """As `read_rows`, of an int4 cache."""
    parts = int4_parts(cache, block_size, head_dim)
    key_zeros, key_scales = parts.key_zeros[block_ids, layer].float(), parts.key_scales[block_ids, layer].float()
    keys = (unpack_int4(parts.key_codes[block_ids, layer, :, offsets]).float() - key_zeros) * key_scales
    rows = torch.arange(len(offsets), device=offsets.device)
    zeros = unpack_int4(parts.value_zeros[block_ids, layer])[rows, :, offsets].float().unsqueeze(-1)
    scales = parts.value_scales[block_ids, layer, :, offsets].float().unsqueeze(-1)
    values = (unpack_int4(parts.value_codes[block_ids, layer, :, offsets]).float() - zeros) * scales
    return keys.transpose(0, 1), values.transpose(0, 1)


def read_rows(cache: Tensor, layer: int, block_ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """K and V, `[num_kv_heads, num_rows, head_dim]` float32, of the rows at those offsets in those blocks."""
    if quantized(cache.dtype):
        codes, scales = codes_and_scales(cache)
        rows = widen(codes[block_ids, layer, :, :, offsets]) * scales[block_ids, layer, :, :, offsets].unsqueeze(-1)
    else:
        rows = cache[block_ids, layer, :, :, offsets].float()
    # [num_rows, 2, num_kv_heads, head_dim]
    keys, values = rows.permute(1, 2, 0, 3)
    return keys, values


def _attend(
    query: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    key_positions: Tensor,
    seen: Tensor,
    scale: float,
    mask: Mask,
    far_sinks: FarSinks | None,
) -> Tensor:
    num_queries, num_heads, head_dim = query.shape
    group = num_heads // keys.shape[0]
    scores = dots(query, keys) * scale  # [num_kv_heads, group, num_queries, num_rows]
    if mask.window is not None and far_sinks is not None:
        sinks, turned = key_positions < mask.num_sinks, keys
        if far_sinks.cos is not None and far_sinks.sin is not None:
            angles = key_positions[sinks]
            turned = keys.clone()
            turned[:, sinks] = _turn_back(keys[:, sinks], far_sinks.cos[angles], far_sinks.sin[angles])
        far = sinks & (key_positions <= positions[:, None] - mask.window)
        scores = torch.where(far, dots(far_sinks.query, turned) * scale, scores)
    if mask.soft_cap is not None:
        scores = mask.soft_cap * (scores / mask.soft_cap).tanh()
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    # A weight of 0 must not let in what is not finite.
    finite = values.isfinite()
    out = weights @ values.where(finite, 0.0).unsqueeze(1)
    spoilt = seen.float() @ (~finite).float() > 0  # [num_kv_heads, num_queries, head_dim]
    out = out.masked_fill(spoilt.unsqueeze(1), float("nan"))
    return out.permute(2, 0, 1, 3).reshape(num_queries, group * keys.shape[0], head_dim)


def dots(query: Tensor, keys: Tensor) -> Tensor:
    num_queries, _, head_dim = query.shape
    grouped = query.reshape(num_queries, keys.shape[0], -1, head_dim).permute(1, 2, 0, 3)
    return grouped @ keys.unsqueeze(1).transpose(-1, -2)


def _turn_back(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotated by the opposite of the angles; rotate-half convention, elements behind the rotary ones as they are."""
    half = cos.shape[1]
    first, second, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), -1)


def check_ragged(starts: list[int], lens: list[int], num_tokens: int, max_rows: int) -> None:
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
