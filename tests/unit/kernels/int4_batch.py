"""Ragged batches over an int4 cache and its residual, with their dense truth. For the tests beside it."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvarto.kernels import CAUSAL, FarSinks, Mask, Residual, paged_attention

_spec = importlib.util.spec_from_file_location("attention_batch", Path(__file__).with_name("attention_batch.py"))
sys.modules["attention_batch"] = attention_batch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(attention_batch)

FLOAT32_UNIT = 2.0**-24
NOWHERE = 2**31 - 1
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Block:
    """K and V of a block of an int4 cache, one head behind another; bfloat16 scales as float64."""

    codes: npt.NDArray[np.uint8]  # [2, num_kv_heads, block_size, head_dim]
    key_scales: Array  # [num_kv_heads, head_dim]
    key_zeros: npt.NDArray[np.int8]
    value_scales: Array  # [num_kv_heads, block_size]
    value_zeros: npt.NDArray[np.uint8]  # 0 to 15

    @classmethod
    def random(cls, num_kv_heads: int, block_size: int, head_dim: int) -> Block:
        def scales(size: int) -> Array:
            return torch.rand(num_kv_heads, size).mul(0.3).bfloat16().double().numpy()

        codes = torch.randint(16, (2, num_kv_heads, block_size, head_dim)).to(torch.uint8).numpy()
        key_zeros = torch.randint(-3, 19, (num_kv_heads, head_dim)).to(torch.int8).numpy()
        value_zeros = torch.randint(16, (num_kv_heads, block_size)).to(torch.uint8).numpy()
        return cls(codes, scales(head_dim), key_zeros, scales(block_size), value_zeros)

    def read(self) -> tuple[Tensor, Tensor]:
        """K and V, `[block_size, num_kv_heads, head_dim]` float64."""
        keys = (self.codes[0] - self.key_zeros[:, None].astype(float)) * self.key_scales[:, None]
        values = (self.codes[1] - self.value_zeros[..., None].astype(float)) * self.value_scales[..., None]
        return torch.from_numpy(keys.swapaxes(0, 1)), torch.from_numpy(values.swapaxes(0, 1))

    def bytes(self) -> Tensor:
        """`[num_kv_heads, int4_head_bytes]`, by the words of the contract."""
        half, half_block = self.codes.shape[-1] // 2, self.codes.shape[-2] // 2
        heads = []
        for head in range(self.codes.shape[1]):
            packed = [codes[head, :, :half] + 16 * codes[head, :, half:] for codes in self.codes]
            scales = [torch.from_numpy(x[head]).bfloat16().view(torch.uint8).numpy()
                      for x in (self.key_scales, self.value_scales)]
            of_rows = self.value_zeros[head]
            zeros = [self.key_zeros[head].view(np.uint8), of_rows[:half_block] + 16 * of_rows[half_block:]]
            heads.append(np.concatenate([part.ravel() for part in (*packed, *scales, *zeros)]))
        return torch.from_numpy(np.stack(heads))


@dataclass(frozen=True)
class Int4Batch:
    """What some query sees is in the caches and all else NaN. Both hold different rows for one place in a sequence, so
    that it shows where a row was read."""

    before: attention_batch.Batch  # keys and values as the int4 cache has them, float64
    own: attention_batch.Batch  # as the residual has them, of the queries' dtype
    cache: Tensor
    residual: Tensor
    block_tables: Tensor
    residual_tables: Tensor
    block_size: int

    layer, residual_layer = 2, 1

    @classmethod
    def random(cls, lens: list[tuple[int, int]], dtype: torch.dtype, heads: tuple[int, int] = (9, 3),
               head_dim: int = 64, block_size: int = 16, mask: Mask = CAUSAL, far_sinks: str = "") -> Int4Batch:
        """Arguments as of `attention_batch.make_batch`."""
        own = attention_batch.make_batch(lens, dtype, heads, head_dim, block_size, mask, far_sinks)
        width = max(kv_len for kv_len, _ in lens) // block_size + 2
        num_blocks = sum(-(-kv_len // block_size) for kv_len, _ in lens) + 2
        sample = Block.random(heads[1], block_size, head_dim).bytes()
        cache = torch.full((num_blocks, 4, *sample.shape), 255, dtype=torch.uint8)  # scales of NaN
        residual = torch.full((num_blocks, 2, 2, heads[1], block_size, head_dim), torch.nan, dtype=dtype)
        tables = torch.full((2, len(lens), width), NOWHERE, dtype=torch.int32)
        unused = [(torch.randperm(num_blocks - 1) + 1).tolist() for _ in range(2)]
        keys, values = [], []
        for seq, (kv_len, num_queries) in enumerate(lens):
            if seq % 2:
                tables[:, seq] = 0  # the null block
            blocks = [Block.random(heads[1], block_size, head_dim) for _ in range(width)]
            for rows, read in zip((keys, values), zip(*(block.read() for block in blocks), strict=True), strict=True):
                rows.append(torch.cat(read)[:kv_len])
            in_own = is_own(kv_len, num_queries, block_size)
            seen = attention_batch.dense_mask(mask, kv_len, num_queries)
            for entry in range(-(-kv_len // block_size)):
                place = slice(entry * block_size, (entry + 1) * block_size)
                before, now = (rows.any(0)[place] for rows in (seen & ~in_own, seen & in_own))
                if before.any():
                    tables[0, seq, entry] = block_id = unused[0].pop()
                    blocks[entry].value_scales[:, ~before.numpy()] = np.nan
                    cache[block_id, cls.layer] = blocks[entry].bytes()
                if now.any():
                    tables[1, seq, entry] = block_id = unused[1].pop()
                    for side, rows in enumerate((own.keys[seq], own.values[seq])):
                        residual[block_id, cls.residual_layer, side, :, now.nonzero()[:, 0]] = \
                            rows[place][now].transpose(0, 1)
        return cls(replace(own, keys=keys, values=values), own, cache, residual, *tables, block_size)

    def run(self) -> Tensor:
        batch = self.own
        starts = torch.tensor([0, *map(len, batch.queries)]).cumsum(0).int()
        far = None if batch.far_queries is None else FarSinks(torch.cat(batch.far_queries), batch.cos, batch.sin)
        return paged_attention(
            torch.cat(batch.queries), self.cache, self.layer, self.block_tables, starts,
            torch.tensor([len(rows) for rows in batch.keys], dtype=torch.int32), batch.scale, batch.mask, far,
            Residual(self.residual, self.residual_layer, self.residual_tables))

    def only(self, seq: int, first: int = 0, last: int | None = None) -> Int4Batch:
        """As of `attention_batch.Batch`."""
        return replace(
            self, before=self.before.only(seq, first, last), own=self.own.only(seq, first, last),
            block_tables=self.block_tables[seq:seq + 1], residual_tables=self.residual_tables[seq:seq + 1])

    def assert_close(self, out: Tensor, tensor_cores: bool = False) -> None:
        """Within what float32 accumulation and one rounding to the dtype may cost; `tensor_cores`: and the rounding of
        what they multiply, keys and weights, to the dtype."""
        mask, dtype = self.own.mask, out.dtype
        unit = torch.finfo(dtype).eps  # twice what rounding costs: the interpreter truncates bfloat16
        for seq, got in enumerate(out.split([len(query) for query in self.own.queries])):
            kv_len, (num_queries, num_heads, head_dim) = len(self.own.keys[seq]), got.shape
            (before, largest), (now, own_largest) = (
                attention_batch.dense_scores(batch, seq) for batch in (self.before, self.own))
            in_own = is_own(kv_len, num_queries, self.block_size)
            scores = torch.where(in_own, now, before)
            per_term = (head_dim + 16) * FLOAT32_UNIT + (unit if tensor_cores else 0.0)
            error = per_term * max(largest, own_largest)
            if mask.soft_cap is not None:
                scores = mask.soft_cap * (scores / mask.soft_cap).tanh()
                error += 8 * FLOAT32_UNIT * mask.soft_cap
            seen = attention_batch.dense_mask(mask, kv_len, num_queries)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            expected, magnitude = torch.zeros(2, num_heads, num_queries, head_dim, dtype=torch.float64)
            for rows, chosen in ((self.before.values[seq], ~in_own), (self.own.values[seq].double(), in_own)):
                v = rows.repeat_interleave(num_heads // rows.shape[1], 1).transpose(0, 1)
                expected += (weights * chosen) @ v
                magnitude += (weights * chosen) @ v.abs()
            relative = 2 * error + (kv_len + 64) * FLOAT32_UNIT
            largest_value = max(float(v.abs().amax()) for v in (self.before.values[seq], self.own.values[seq]))
            bound = largest_value * relative + FLOAT32_UNIT
            if tensor_cores:
                bound = bound + unit * magnitude + kv_len * torch.finfo(dtype).smallest_normal * unit * largest_value
            bound = bound + unit / (1 if tensor_cores else 2) * (expected.abs() + bound)
            assert ((got.double().transpose(0, 1) - expected).abs() <= bound).all()


def is_own(kv_len: int, num_queries: int, block_size: int) -> Tensor:
    """`[num_queries, kv_len]`: which rows come no earlier than the block that the query stands in."""
    own = torch.arange(kv_len - num_queries, kv_len) // block_size * block_size
    return torch.arange(kv_len) >= own[:, None]


def random_residual(dtype: torch.dtype, num_kv_heads: int, block_size: int = 16, head_dim: int = 24,
                    num_blocks: int = 4) -> Tensor:
    """Of many magnitudes and offsets, in a row, in a channel and between heads; row 0 is negative throughout, row 1
    positive."""
    shape = (num_blocks, 2, 2, num_kv_heads, block_size, head_dim)
    magnitudes = 2.0 ** torch.randint(-6, 7, (*shape[:4], 1, 1)) * torch.rand(head_dim) ** 4
    offsets = torch.randn(*shape[:4], 1, head_dim) * torch.randint(4, (head_dim,)) ** 3
    rows = (torch.randn(shape) + offsets) * magnitudes
    rows[..., :2, :] = rows[..., :2, :].abs() + 1e-3
    rows[..., 0, :] *= -1
    return rows.to(dtype)


def by_the_formula(vectors: npt.NDArray[np.float32], with_zero: bool) -> tuple[npt.NDArray[np.uint8], Array, Array]:
    """Codes, scales and zeros of finite float32 `[..., n]`, step by step in float32; `with_zero`: as rows of values,
    whose ranges have a 0 in them, and not as channels of keys."""
    low, high = vectors.min(-1, keepdims=True), vectors.max(-1, keepdims=True)
    if with_zero:
        low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    exact = (high - low) / np.float32(15)
    if not with_zero:
        exact = np.maximum(exact, np.maximum(abs(low), abs(high)) / np.float32(120))
    near = torch.from_numpy(exact).bfloat16()
    up = torch.where(near.float() < torch.from_numpy(exact), near.nextafter(torch.tensor(torch.inf).bfloat16()), near)
    scale = up.float().numpy()
    with np.errstate(all="ignore"):
        zero = np.where(scale > 0, np.rint(-low / scale), 0)
        if not with_zero:
            zero = np.clip(zero, -128, 127)
        codes = np.where(scale > 0, np.clip(np.rint(vectors / scale) + zero, 0, 15), 0)
    return codes.astype(np.uint8), scale[..., 0].astype(float), zero[..., 0]


def expected_block(keys: Tensor, values: Tensor) -> Block:
    """`[num_kv_heads, block_size, head_dim]` each."""
    key_codes, key_scales, key_zeros = by_the_formula(keys.float().numpy().swapaxes(-1, -2), with_zero=False)
    value_codes, value_scales, value_zeros = by_the_formula(values.float().numpy(), with_zero=True)
    assert value_zeros.min() >= 0 and value_zeros.max() <= 15
    return Block(np.stack([key_codes.swapaxes(-1, -2), value_codes]), key_scales, key_zeros.astype(np.int8),
                 value_scales, value_zeros.astype(np.uint8))
