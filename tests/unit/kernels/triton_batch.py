"""A ragged batch for the Triton kernels: laid out in blocks amid NaN, and its attention in dense float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvarto.kernels.triton.available import interpreted
from kvarto.kernels.triton.launch import CAUSAL, LayerCache, Mask, paged_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on which, without a GPU, kernels are interpreted
FLOAT32_UNIT = 2.0**-24
NOWHERE = 2**31 - 1
"""An entry of a block table that no kernel may follow."""


@dataclass(frozen=True)
class Batch:
    """Per sequence queries `[num_queries, num_heads, head_dim]`, keys and values `[kv_len, num_kv_heads, head_dim]`."""

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    block_size: int = 16
    mask: Mask = CAUSAL

    @classmethod
    def random(cls, lens: list[tuple[int, int]], dtype: torch.dtype, heads: tuple[int, int] = (6, 2),
               head_dim: int = 64, block_size: int = 16, mask: Mask = CAUSAL) -> Batch:
        """`lens`: (rows held, queries of this step) of each sequence. `heads`: of queries, of KV."""
        return cls(
            [torch.randn(queries, heads[0], head_dim).to(dtype) * 2 for _, queries in lens],
            [torch.randn(kv_len, heads[1], head_dim).to(dtype) for kv_len, _ in lens],
            [torch.randn(kv_len, heads[1], head_dim).to(dtype) for kv_len, _ in lens],
            block_size, mask)

    @property
    def scale(self) -> float:
        return float(self.queries[0].shape[2]) ** -0.5

    def only(self, seq: int) -> Batch:
        return Batch(self.queries[seq:seq + 1], self.keys[seq:seq + 1], self.values[seq:seq + 1], self.block_size,
                     self.mask)

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
        shape = (len(block_ids), 3, 2, num_kv_heads, self.block_size, head_dim)
        cache = torch.full(shape, torch.nan, dtype=self.keys[0].dtype)
        width = max((entry for _, entry in entries), default=0) + 2
        tables = torch.full((len(self.keys), width), NOWHERE, dtype=torch.int32)
        for block_id, (seq, entry) in zip(block_ids.tolist(), entries, strict=False):
            rows = slice(entry * self.block_size, (entry + 1) * self.block_size)
            seen = self.visible(seq).any(0)[rows]
            if seen.any():
                tables[seq, entry] = block_id
                for side, dense in enumerate((self.keys[seq][rows], self.values[seq][rows])):
                    cache[block_id, 1, side, :, :len(dense)] = dense.masked_fill(~seen[:, None, None], torch.nan) \
                        .transpose(0, 1)
        return cache, tables

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All queries, query_start_loc and kv_lens."""
        starts = torch.tensor([0, *(len(query) for query in self.queries)]).cumsum(0).int()
        kv_lens = torch.tensor([len(rows) for rows in self.keys], dtype=torch.int32)
        return torch.cat(self.queries), starts, kv_lens

    def run(self, max_query_len: int | None = None) -> Tensor:
        query, starts, kv_lens, cache, tables = (x.to(DEVICE) for x in (*self.tensors(), *self.in_blocks()))
        layer = LayerCache.of(cache, 1)
        return paged_attention(query, layer, tables, starts, kv_lens, self.scale, self.mask, max_query_len).cpu()

    def assert_close(self, out: Tensor) -> None:
        """Within what accumulation in float32, weights rounded to the dtype and one rounding of the result may cost."""
        for seq, got in enumerate(out.split([len(query) for query in self.queries])):
            self._assert_sequence_close(seq, got.double())

    def _assert_sequence_close(self, seq: int, got: Tensor) -> None:
        q, k, v = (x[seq].double().transpose(0, 1) for x in (self.queries, self.keys, self.values))
        dtype, (num_heads, _, head_dim), kv_len = self.queries[seq].dtype, q.shape, k.shape[1]
        k, v = (x.repeat_interleave(num_heads // len(x), 0) for x in (k, v))
        scores = q @ k.transpose(1, 2) * self.scale
        if self.mask.soft_cap is not None:
            scores = self.mask.soft_cap * torch.tanh(scores / self.mask.soft_cap)
        weights = scores.masked_fill(~self.visible(seq), -torch.inf).softmax(-1)
        expected = (weights @ v).transpose(0, 1)
        # Scores err by so much, weights relatively by twice that; the sums run over kv_len rows.
        largest_dot = (q.abs() @ k.abs().transpose(1, 2)).amax() * self.scale if q.numel() else 0.0
        relative = 2 * (head_dim + 16) * FLOAT32_UNIT * largest_dot + (kv_len + 64) * FLOAT32_UNIT
        bound = v.abs().amax() * (relative + FLOAT32_UNIT)
        # The interpreter makes bfloat16 by truncation.
        unit = torch.finfo(dtype).eps / (1 if interpreted() and dtype == torch.bfloat16 else 2)
        if dtype != torch.float32:  # weights are rounded for the tensor cores; the smallest lose all of themselves
            lost = kv_len * torch.finfo(dtype).smallest_normal * unit
            bound = bound + unit * (weights @ v.abs()).transpose(0, 1) + lost * v.abs().amax()
        bound = bound + unit * (expected.abs() + bound)
        assert ((got - expected).abs() <= bound).all()
