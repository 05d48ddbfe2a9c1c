"""A ragged batch for the Triton kernels: laid out in blocks amid NaN, and its attention in dense float64."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kvarto.kernels.kv_layout import codes_and_scales, quantized, row_elements, widen
from kvarto.kernels.mask import CAUSAL, FarSinks, Mask
from kvarto.kernels.triton.available import interpreted
from kvarto.kernels.triton.launch import LayerCache, paged_attention

_spec = importlib.util.spec_from_file_location("attention_batch", Path(__file__).with_name("attention_batch.py"))
sys.modules["attention_batch"] = attention_batch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(attention_batch)
quantize = attention_batch.quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on which, without a GPU, kernels are interpreted
FLOAT32_UNIT = 2.0**-24
NOWHERE = 2**31 - 1
"""An entry of a block table that no kernel may follow."""


@dataclass(frozen=True)
class Batch:
    """Per sequence queries `[num_queries, num_heads, head_dim]`, keys and values `[kv_len, num_kv_heads, head_dim]`.

    `far_queries`: those that meet far sinks, or empty. `angles`: `[num_sinks, half]` by which the keys of far sinks are
    turned back, or None. `cache_dtype`: of the cache, in which keys and values may be quantized.
    """

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    cache_dtype: torch.dtype
    block_size: int = 16
    mask: Mask = CAUSAL
    far_queries: list[Tensor] | tuple[()] = ()
    angles: Tensor | None = None

    @classmethod
    def random(cls, lens: list[tuple[int, int]], dtype: torch.dtype, heads: tuple[int, int] = (6, 2),
               head_dim: int = 64, block_size: int = 16, mask: Mask = CAUSAL,
               cache_dtype: torch.dtype | None = None) -> Batch:
        """`lens`: (rows held, queries of this step) of each sequence. `heads`: of queries, of KV."""
        return cls(
            [torch.randn(queries, heads[0], head_dim).to(dtype) * 2 for _, queries in lens],
            [torch.randn(kv_len, heads[1], head_dim).to(dtype) for kv_len, _ in lens],
            [torch.randn(kv_len, heads[1], head_dim).to(dtype) for kv_len, _ in lens],
            cache_dtype or dtype, block_size, mask)

    def with_far_sinks(self, rotary: int | None) -> Batch:
        """`rotary`: elements of a far sink's key that are turned back; None: it stays."""
        angles = None if rotary is None else torch.randn(self.mask.num_sinks, rotary // 2) * 3
        return replace(self, far_queries=[torch.randn_like(query) * 2 for query in self.queries], angles=angles)

    @property
    def scale(self) -> float:
        return float(self.queries[0].shape[2]) ** -0.5

    def only(self, seq: int) -> Batch:
        one = slice(seq, seq + 1)
        return replace(self, queries=self.queries[one], keys=self.keys[one], values=self.values[one],
                       far_queries=self.far_queries[one])

    def held(self, rows: Tensor) -> Tensor:
        """Rows as they read back from the cache, float64."""
        if not quantized(self.cache_dtype):
            return rows.double()
        codes, scales = quantize(rows.float(), self.cache_dtype)
        return widen(codes).double() * scales.double()[..., None]

    def visible(self, seq: int) -> Tensor:
        """`[num_queries, kv_len]`: which rows each query sees."""
        num_queries, kv_len = len(self.queries[seq]), len(self.keys[seq])
        positions = torch.arange(kv_len - num_queries, kv_len)[:, None]
        rows = torch.arange(kv_len)
        seen = rows <= positions
        if self.mask.window is not None:
            seen &= (rows > positions - self.mask.window) | (rows < self.mask.num_sinks)
        return seen

    def in_blocks(self) -> tuple[Tensor, Tensor]:
        """A cache, the rows shuffled in blocks of its layer 1, and its tables. What no query sees is NaN or nowhere."""
        num_kv_heads, head_dim = self.keys[0].shape[1:]
        entries = [(seq, entry) for seq, rows in enumerate(self.keys)
                   for entry in range(-(-len(rows) // self.block_size))]
        block_ids = torch.randperm(len(entries) + 3, dtype=torch.int32)
        cache = torch.full((len(block_ids), 3, 2, num_kv_heads, self.block_size,
                            row_elements(self.cache_dtype, head_dim)), -1, dtype=torch.int8)  # scales of NaN
        cache = cache.view(self.cache_dtype) if quantized(self.cache_dtype) else \
            torch.full(cache.shape, torch.nan, dtype=self.cache_dtype)
        width = max((entry for _, entry in entries), default=0) + 2
        tables = torch.full((len(self.keys), width), NOWHERE, dtype=torch.int32)
        for block_id, (seq, entry) in zip(block_ids.tolist(), entries, strict=False):
            rows = slice(entry * self.block_size, (entry + 1) * self.block_size)
            seen = self.visible(seq).any(0)[rows].nonzero()[:, 0]
            if len(seen):
                tables[seq, entry] = block_id
            for side, dense in enumerate((self.keys[seq][rows][seen], self.values[seq][rows][seen])):
                if quantized(self.cache_dtype):
                    for part, new in zip(codes_and_scales(cache), quantize(dense.float(), self.cache_dtype),
                                         strict=True):
                        part[block_id, 1, side, :, seen] = new.transpose(0, 1)
                else:
                    cache[block_id, 1, side, :, seen] = dense.transpose(0, 1)
        return cache, tables

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All queries, query_start_loc and kv_lens."""
        starts = torch.tensor([0, *(len(query) for query in self.queries)]).cumsum(0).int()
        kv_lens = torch.tensor([len(rows) for rows in self.keys], dtype=torch.int32)
        return torch.cat(self.queries), starts, kv_lens

    def run(self, max_query_len: int | None = None) -> Tensor:
        query, starts, kv_lens, cache, tables = (x.to(DEVICE) for x in (*self.tensors(), *self.in_blocks()))
        far = None
        if self.far_queries:
            wide = torch.cat([torch.cat(self.far_queries), torch.full((len(query), 1, query.shape[2]), torch.nan)], 1)
            far = FarSinks(wide.to(query)[:, :-1], *(() if self.angles is None else (
                self.angles.cos().to(DEVICE), self.angles.sin().to(DEVICE))))
        layer = LayerCache.of(cache, 1)
        return paged_attention(query, layer, tables, starts, kv_lens, self.scale, self.mask, far, max_query_len).cpu()

    def assert_close(self, out: Tensor) -> None:
        """Within what accumulation in float32, weights rounded to the dtype and one rounding of the result may cost."""
        for seq, got in enumerate(out.split([len(query) for query in self.queries])):
            self._assert_sequence_close(seq, got.double())

    def _scores(self, seq: int) -> tuple[Tensor, float]:
        """`[num_heads, num_queries, kv_len]`, and how much their terms sum to at most, signs aside."""
        query, keys = self.queries[seq].double(), self.held(self.keys[seq])
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
        scores = torch.einsum("qhd,khd->hqk", query, keys)
        terms = torch.einsum("qhd,khd->hqk", query.abs(), keys.abs())
        if self.far_queries:
            query, keys = self.far_queries[seq].double(), keys[:self.mask.num_sinks]
            if self.angles is not None:
                half = self.angles.shape[1]
                turn = torch.polar(torch.ones_like(self.angles).double(), -self.angles.double())[:len(keys), None]
                pairs = torch.complex(keys[..., :half], keys[..., half:2 * half]) * turn
                keys = torch.cat([pairs.real, pairs.imag, keys[..., 2 * half:]], -1)
            positions = torch.arange(len(self.keys[seq]) - len(query), len(self.keys[seq]))[:, None]
            far = torch.arange(len(keys)) <= positions - self.mask.window
            sinks = scores[..., :len(keys)]
            sinks[:] = torch.where(far, torch.einsum("qhd,khd->hqk", query, keys), sinks)
            terms[..., :len(keys)] += 2 * torch.einsum("qhd,khd->hqk", query.abs(), keys.abs())
        return scores * self.scale, float(terms.amax() * self.scale) if terms.numel() else 0.0

    def _assert_sequence_close(self, seq: int, got: Tensor) -> None:
        dtype, (_, num_heads, head_dim), kv_len = self.queries[seq].dtype, self.queries[seq].shape, len(self.keys[seq])
        v = self.held(self.values[seq]).transpose(0, 1)
        v = v.repeat_interleave(num_heads // len(v), 0)
        scores, largest_dot = self._scores(seq)
        if self.mask.soft_cap is not None:
            scores = self.mask.soft_cap * torch.tanh(scores / self.mask.soft_cap)
        weights = scores.masked_fill(~self.visible(seq), -torch.inf).softmax(-1)
        expected = (weights @ v).transpose(0, 1)
        # The interpreter makes bfloat16 by truncation.
        unit = torch.finfo(dtype).eps / (1 if interpreted() and dtype == torch.bfloat16 else 2)
        # Scores err by so much, weights relatively by twice that; the sums run over kv_len rows.
        turned = unit**2 if self.angles is not None and dtype != torch.float32 else 0.0
        relative = 2 * ((head_dim + 16) * FLOAT32_UNIT + turned) * largest_dot + (kv_len + 64) * FLOAT32_UNIT
        bound = v.abs().amax() * (relative + FLOAT32_UNIT)
        if dtype != torch.float32:  # weights are rounded for the tensor cores; the smallest lose all of themselves
            lost = kv_len * torch.finfo(dtype).smallest_normal * unit
            bound = bound + unit * (weights @ v.abs()).transpose(0, 1) + lost * v.abs().amax()
        bound = bound + unit * (expected.abs() + bound)
        assert ((got - expected).abs() <= bound).all()
