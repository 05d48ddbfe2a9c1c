"""Ragged batches with their dense truth, laid out in blocks amid what must not be read. For the tests beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvarto.kernels import CAUSAL, FarSinks, Mask, backend, paged_attention
from kvarto.kernels.kv_layout import FP8, codes_and_scales, quantized, row_elements, widen

FLOAT32_UNIT = 2.0**-24
FP8_VALUES = torch.tensor(
    [m / 64 for m in range(16)] + [2.0 ** (e - 3) * (1 + m / 16) for e in range(1, 8) for m in range(16)],
    dtype=torch.float64,
)
"""Of the codes without a sign, in order."""


@dataclass(frozen=True)
class Batch:
    """Rows that some query of a sequence sees are in its blocks. All else is NaN: slots, whole blocks, block 0."""

    queries: list[Tensor]  # per sequence [num_queries, num_heads, head_dim]
    keys: list[Tensor]  # per sequence [kv_len, num_kv_heads, head_dim], as the cache holds them
    values: list[Tensor]
    cache: Tensor
    block_tables: Tensor
    mask: Mask = CAUSAL
    far_queries: list[Tensor] | None = None
    cos: Tensor | None = None  # [num_sinks, half]
    sin: Tensor | None = None

    layer = 1

    def run(self) -> Tensor:
        starts = [0]
        for query in self.queries:
            starts.append(starts[-1] + len(query))
        far = None if self.far_queries is None else FarSinks(torch.cat(self.far_queries), self.cos, self.sin)
        return paged_attention(
            torch.cat(self.queries),
            self.cache,
            self.layer,
            self.block_tables,
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor([len(rows) for rows in self.keys], dtype=torch.int32),
            self.scale,
            self.mask,
            far,
        )

    @property
    def scale(self) -> float:
        return float(self.queries[0].shape[2]) ** -0.5

    def only(self, seq: int, first: int = 0, last: int | None = None) -> Batch:
        """One sequence alone as of its step that ran queries [first, last) of it; rows behind are not yet held."""
        last = len(self.queries[seq]) if last is None else last
        kv_len = len(self.keys[seq]) - (len(self.queries[seq]) - last)
        return replace(
            self,
            queries=[self.queries[seq][first:last]],
            far_queries=None if self.far_queries is None else [self.far_queries[seq][first:last]],
            keys=[self.keys[seq][:kv_len]],
            values=[self.values[seq][:kv_len]],
            block_tables=self.block_tables[seq : seq + 1],
        )

    def in_blocks(self, block_size: int, dtype: torch.dtype) -> Batch:
        """The same rows in fresh blocks of another size, shuffled; of a quantized dtype, as close as it comes."""
        num_kv_heads, head_dim = self.keys[0].shape[1:]
        num_blocks = sum(-(-len(rows) // block_size) for rows in self.keys) + 3
        cache = torch.full(
            (num_blocks, 3, 2, num_kv_heads, block_size, row_elements(dtype, head_dim)), -1, dtype=torch.int8
        )
        cache = cache.view(dtype) if quantized(dtype) else torch.full(cache.shape, torch.nan, dtype=dtype)
        unused = (torch.randperm(num_blocks - 1, dtype=torch.int32) + 1).tolist()
        # Entries of blocks without a seen row: the null block, or, past the rows and in every other sequence, no block.
        tables = torch.full((len(self.keys), max(map(len, self.keys)) // block_size + 2), 2**31 - 1, dtype=torch.int32)
        dense = {"keys": list(self.keys), "values": list(self.values)}
        for seq, kv_len in enumerate(map(len, self.keys)):
            if seq % 2:
                tables[seq, : kv_len // block_size] = 0
            seen = dense_mask(self.mask, kv_len, len(self.queries[seq])).any(0).nonzero()[:, 0]
            for entry in (seen // block_size).unique().tolist():
                tables[seq, entry] = unused.pop()
            block_ids, offsets = tables[seq, seen // block_size].long(), seen % block_size
            for side, name in enumerate(dense):
                rows = dense[name][seq]
                if quantized(dtype):
                    codes, scales = quantize(rows.float(), dtype)
                    held_codes, held_scales = codes_and_scales(cache)
                    held_codes[block_ids, self.layer, side, :, offsets] = codes[seen]
                    held_scales[block_ids, self.layer, side, :, offsets] = scales[seen]
                    dense[name][seq] = widen(codes).double() * scales.double()[..., None]
                else:
                    cache[block_ids, self.layer, side, :, offsets] = rows[seen]
        return replace(self, cache=cache, block_tables=tables, **dense)


def quantize(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of float32 rows, by the formula of the contract."""
    scales = rows.abs().amax(-1) / (31.0 if dtype == FP8 else 127.0)
    parts = rows / scales[..., None]
    return nearest_fp8(parts) if dtype == FP8 else parts.round().to(dtype), scales


def nearest_fp8(parts: Tensor) -> Tensor:
    """The codes of the nearest of all values, of even code where two are as near."""
    magnitudes, middles = parts.double().abs(), (FP8_VALUES[1:] + FP8_VALUES[:-1]) / 2
    codes = torch.bucketize(magnitudes, middles)  # the lower where two are as near
    codes += (codes % 2 == 1) & (magnitudes == middles[codes.clamp(max=len(middles) - 1)])
    return (codes + 0x80 * parts.signbit()).to(FP8)


def dense_mask(mask: Mask, kv_len: int, num_queries: int) -> Tensor:
    """`[num_queries, kv_len]`: which rows a query sees."""
    row, query_row = torch.arange(kv_len), torch.arange(kv_len - num_queries, kv_len)[:, None]
    seen = row <= query_row
    return seen if mask.window is None else seen & ((row > query_row - mask.window) | (row < mask.num_sinks))


def make_batch(
    lens: list[tuple[int, int]],
    dtype: torch.dtype,
    heads: tuple[int, int] = (9, 3),
    head_dim: int = 64,
    block_size: int = 16,
    mask: Mask = CAUSAL,
    far_sinks: str = "",
    cache_dtype: torch.dtype | None = None,
) -> Batch:
    """`lens`: (rows held, queries of this step). `far_sinks`: "", "query", or "query and keys" for turned keys too."""
    num_heads, num_kv_heads = heads
    angles = torch.randn(mask.num_sinks, max(1, head_dim // 3)) * 3 if far_sinks == "query and keys" else None
    return Batch(
        queries=[torch.randn(queries, num_heads, head_dim).to(dtype) * 2 for _, queries in lens],
        keys=[torch.randn(kv_len, num_kv_heads, head_dim).to(dtype) for kv_len, _ in lens],
        values=[torch.randn(kv_len, num_kv_heads, head_dim).to(dtype) for kv_len, _ in lens],
        cache=torch.empty(0),
        block_tables=torch.empty(0),
        mask=mask,
        far_queries=[torch.randn(q, num_heads, head_dim).to(dtype) * 2 for _, q in lens] if far_sinks else None,
        cos=None if angles is None else angles.cos(),
        sin=None if angles is None else angles.sin(),
    ).in_blocks(block_size, cache_dtype or dtype)


def dense_scores(batch: Batch, seq: int) -> tuple[Tensor, float]:
    """`[num_heads, num_queries, kv_len]` float64, before cap and mask, and the largest sum of magnitudes of a dot."""
    query, keys, mask = batch.queries[seq].double(), batch.keys[seq].double(), batch.mask
    group = query.shape[1] // keys.shape[1]
    keys = keys.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) * batch.scale
    largest = torch.einsum("qhd,khd->hqk", query.abs(), keys.abs()).amax().item() if len(query) else 0.0
    if batch.far_queries is not None:
        assert mask.window is not None
        sinks = keys[: mask.num_sinks]
        if batch.cos is not None and batch.sin is not None:
            half = batch.cos.shape[1]
            # A complex number per pair, times e^(-i angle).
            turn = torch.complex(batch.cos.double(), -batch.sin.double())[: len(sinks), None]
            pairs = torch.complex(sinks[..., :half], sinks[..., half : 2 * half]) * turn
            sinks = torch.cat([pairs.real, pairs.imag, sinks[..., 2 * half :]], -1)
        far_query = batch.far_queries[seq].double()
        far_scores = torch.einsum("qhd,khd->hqk", far_query, sinks) * batch.scale
        for i, p in enumerate(range(len(keys) - len(query), len(keys))):
            far = max(0, min(mask.num_sinks, p - mask.window + 1))
            scores[:, i, :far] = far_scores[:, i, :far]
        if len(query):
            # Turning adds two products where there was one element.
            largest = max(largest, 2 * torch.einsum("qhd,khd->hqk", far_query.abs(), sinks.abs()).amax().item())
    return scores, largest * batch.scale


def assert_close_to_dense(batch: Batch, out: Tensor) -> None:
    """Within what float32 accumulation and one rounding to the dtype may cost, and one of the weights where a backend
    multiplies bf16."""
    dtype, head_dim = batch.queries[0].dtype, batch.queries[0].shape[2]
    rounds_weights = batch.cache.dtype == torch.bfloat16 and backend() == "native-avx512-bf16"
    begin = 0
    for seq, (query, keys, values) in enumerate(zip(batch.queries, batch.keys, batch.values, strict=True)):
        got = out[begin : begin + len(query)].double()
        begin += len(query)
        v = values.double().repeat_interleave(query.shape[1] // keys.shape[1], 1).transpose(0, 1)
        scores, largest_dot = dense_scores(batch, seq)
        score_error = (head_dim + 16) * FLOAT32_UNIT * largest_dot
        if (cap := batch.mask.soft_cap) is not None:
            scores = cap * (scores / cap).tanh()
            score_error += 8 * FLOAT32_UNIT * cap
        seen = dense_mask(batch.mask, len(keys), len(query))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        expected = (weights @ v).transpose(0, 1)
        # Scores err by so much, weights relatively by twice that; V is summed over len(keys) rows.
        relative = 2 * score_error + (len(keys) + 64) * FLOAT32_UNIT
        bound = v.abs().amax() * relative + torch.finfo(dtype).eps / 2 * expected.abs() + FLOAT32_UNIT
        if rounds_weights:
            bound += torch.finfo(torch.bfloat16).eps / 2 * (1 + relative) * (weights @ v.abs()).transpose(0, 1)
        assert ((got - expected).abs() <= bound).all()
