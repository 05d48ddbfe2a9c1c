"""paged_attention against dense float64 attention, and the independence of a query from all but what it sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kvarto.kernels import paged_attention

FLOAT32_UNIT = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows held, queries of this step): lone tokens, edges of blocks, tiles and chunks, prefills, chunks and decodes.
RAGGED = [(1, 1), (15, 15), (16, 1), (17, 17), (33, 2), (64, 1), (129, 100), (513, 1), (1030, 20), (40, 0), (260, 130)]


@dataclass(frozen=True)
class Batch:
    """A ragged batch: its dense truth, and the same laid out in blocks amid NaN."""

    queries: list[Tensor]  # per sequence [num_queries, num_heads, head_dim]
    keys: list[Tensor]  # per sequence [kv_len, num_kv_heads, head_dim]
    values: list[Tensor]
    cache: Tensor
    block_tables: Tensor

    layer = 1

    def run(self) -> Tensor:
        starts = [0]
        for query in self.queries:
            starts.append(starts[-1] + len(query))
        return paged_attention(
            torch.cat(self.queries),
            self.cache,
            self.layer,
            self.block_tables,
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor([len(rows) for rows in self.keys], dtype=torch.int32),
            self.scale,
        )

    @property
    def scale(self) -> float:
        return float(self.cache.shape[5]) ** -0.5

    def only(self, seq: int, first: int = 0, last: int | None = None) -> Batch:
        """One sequence alone as of its step that ran queries [first, last) of it; rows behind are not yet held."""
        last = len(self.queries[seq]) if last is None else last
        kv_len = len(self.keys[seq]) - (len(self.queries[seq]) - last)
        return replace(
            self,
            queries=[self.queries[seq][first:last]],
            keys=[self.keys[seq][:kv_len]],
            values=[self.values[seq][:kv_len]],
            block_tables=self.block_tables[seq : seq + 1],
        )

    def in_blocks(self, block_size: int) -> Batch:
        """The same rows in fresh blocks of another size, shuffled; whatever no sequence holds is NaN."""
        num_kv_heads, head_dim = self.keys[0].shape[1:]
        needed = [-(-len(rows) // block_size) for rows in self.keys]
        num_blocks = sum(needed) + 3
        cache = torch.full((num_blocks, 3, 2, num_kv_heads, block_size, head_dim), torch.nan, dtype=self.keys[0].dtype)
        unused = torch.randperm(num_blocks, dtype=torch.int32).tolist()
        # Entries that no row reaches name no block at all.
        tables = torch.full((len(needed), max(needed) + 1), 2**31 - 1, dtype=torch.int32)
        for seq, count in enumerate(needed):
            for entry in range(count):
                tables[seq, entry] = block_id = unused.pop()
                rows = slice(entry * block_size, (entry + 1) * block_size)
                for side, dense in enumerate((self.keys[seq][rows], self.values[seq][rows])):
                    cache[block_id, self.layer, side, :, : len(dense)] = dense.transpose(0, 1)
        return replace(self, cache=cache, block_tables=tables)


def make_batch(
    lens: list[tuple[int, int]],
    dtype: torch.dtype,
    heads: tuple[int, int] = (9, 3),
    head_dim: int = 64,
    block_size: int = 16,
) -> Batch:
    num_heads, num_kv_heads = heads
    return Batch(
        queries=[torch.randn(queries, num_heads, head_dim).to(dtype) * 2 for _, queries in lens],
        keys=[torch.randn(kv_len, num_kv_heads, head_dim).to(dtype) for kv_len, _ in lens],
        values=[torch.randn(kv_len, num_kv_heads, head_dim).to(dtype) for kv_len, _ in lens],
        cache=torch.empty(0, 0, 0, 0, 0, head_dim),
        block_tables=torch.empty(0),
    ).in_blocks(block_size)


def assert_close_to_dense(batch: Batch, out: Tensor) -> None:
    """Within what float32 accumulation and one rounding to the dtype may cost."""
    dtype, head_dim = batch.queries[0].dtype, batch.cache.shape[5]
    begin = 0
    for query, keys, values in zip(batch.queries, batch.keys, batch.values, strict=True):
        got = out[begin : begin + len(query)].double()
        begin += len(query)
        group = query.shape[1] // keys.shape[1]
        q, k, v = (x.double().transpose(0, 1) for x in (query, keys, values))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        seen = torch.arange(len(keys))[None, :] <= torch.arange(len(query))[:, None] + len(keys) - len(query)
        scores = (q @ k.transpose(1, 2) * batch.scale).masked_fill(~seen, -torch.inf)
        expected = (scores.softmax(-1) @ v).transpose(0, 1)
        # Scores err by so much, weights relatively by twice that; V is summed over len(keys) rows.
        largest_dot = (q.abs() @ k.abs().transpose(1, 2)).amax() * batch.scale if len(query) else 0.0
        relative = 2 * (head_dim + 8) * FLOAT32_UNIT * largest_dot + (len(keys) + 64) * FLOAT32_UNIT
        bound = v.abs().amax() * relative + torch.finfo(dtype).eps / 2 * expected.abs() + FLOAT32_UNIT
        assert ((got - expected).abs() <= bound).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"),
    [
        ((9, 3), 64, 16),
        ((4, 4), 64, 128),
        ((8, 1), 128, 64),
        ((6, 2), 80, 16),
        ((2, 1), 256, 32),
        ((5, 5), 72, 8),
        ((71, 1), 8, 16),
    ],
)
def test_ragged_batch_equals_dense_attention(
    heads: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    batch = make_batch(RAGGED, dtype, heads, head_dim, block_size)
    out = batch.run()
    assert out.dtype == dtype
    assert out.shape == (sum(queries for _, queries in RAGGED), heads[0], head_dim)
    assert_close_to_dense(batch, out)


@pytest.mark.usefixtures("backend")
def test_large_scores_do_not_overflow() -> None:
    batch = make_batch([(300, 3)], torch.float32)
    batch = replace(batch, queries=[batch.queries[0] * 40])
    assert_close_to_dense(batch, batch.run())


@pytest.mark.usefixtures("backend")
def test_batch_without_sequences_is_empty() -> None:
    cache = torch.zeros(1, 2, 2, 1, 16, 64)
    empty, start = torch.empty(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    out = paged_attention(torch.empty(0, 2, 64), cache, 0, empty.view(0, 4), start, empty, 1.0)
    assert out.shape == (0, 2, 64)


@pytest.mark.usefixtures("backend")
def test_query_may_be_a_slice_of_a_fused_projection() -> None:
    batch = make_batch([(20, 3)], torch.float32)
    fused = torch.cat([batch.queries[0].flatten(1), torch.full((3, 100), torch.nan)], 1)
    sliced = replace(batch, queries=[fused[:, : 9 * 64].unflatten(1, (9, 64))])
    assert torch.equal(sliced.run(), batch.run())


@pytest.mark.usefixtures("native_backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [((9, 3), 64), ((8, 1), 80), ((2, 2), 128)])
def test_bits_do_not_depend_on_the_batch_or_the_threads(
    heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    batch = make_batch(RAGGED, dtype, heads, head_dim)
    together = batch.run()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(batch.run(), together)
        alone = [batch.only(seq).run() for seq in range(len(RAGGED))]
        assert torch.equal(torch.cat(alone), together)


@pytest.mark.usefixtures("native_backend")
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_how_a_prefill_is_cut(dtype: torch.dtype) -> None:
    whole = make_batch([(700, 700)], dtype)
    expected = whole.run()
    cuts = [0, 1, 2, 33, 300, 511, 512, 513, 699, 700]
    pieces = [whole.only(0, first, last).run() for first, last in pairwise(cuts)]
    assert torch.equal(torch.cat(pieces), expected)


@pytest.mark.usefixtures("native_backend")
def test_bits_do_not_depend_on_the_block_size() -> None:
    batch = make_batch(RAGGED, torch.bfloat16, block_size=8)
    assert torch.equal(batch.run(), batch.in_blocks(128).run())


def _arguments() -> dict[str, object]:
    return {
        "query": torch.zeros(3, 4, 64),
        "cache": torch.zeros(5, 2, 2, 2, 16, 64),
        "layer": 1,
        "block_tables": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 1, 3], dtype=torch.int32),
        "kv_lens": torch.tensor([17, 2], dtype=torch.int32),
        "scale": 0.125,
    }


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"query": torch.zeros(3, 4, 32)}, ValueError, "query must be"),
        ({"query": torch.zeros(3, 3, 64)}, ValueError, "a multiple of 2 KV heads"),
        ({"query": torch.zeros(3, 4, 64, dtype=torch.bfloat16)}, TypeError, "query must be torch.float32"),
        ({"query": torch.zeros(3, 64, 4).transpose(1, 2)}, ValueError, "query must have dense"),
        ({"query": torch.zeros(3, 4, 64, device="meta")}, ValueError, "query is on meta"),
        ({"cache": torch.zeros(5, 2, 2, 2, 16, 64, dtype=torch.float64)}, TypeError, "cache must be float32"),
        ({"cache": torch.zeros(5, 2, 2, 16, 64)}, ValueError, "cache must be"),
        ({"cache": torch.zeros(5, 2, 2, 2, 24, 64)}, ValueError, "block_size must be one of"),
        ({"cache": torch.zeros(5, 2, 2, 2, 16, 60)}, ValueError, "head_dim must be a multiple of 8"),
        ({"cache": torch.zeros(5, 2, 2, 16, 2, 64).transpose(3, 4)}, ValueError, "cache must be contiguous"),
        ({"layer": 2}, ValueError, "layer must be in"),
        ({"block_tables": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "block_tables must be torch.int32"),
        ({"block_tables": torch.zeros(3, 2, dtype=torch.int32)}, ValueError, "block_tables must have shape"),
        ({"block_tables": torch.tensor([[0, 1], [5, 3]], dtype=torch.int32)}, ValueError, "sequence 1 names a block"),
        ({"block_tables": torch.tensor([[0, -1], [2, 3]], dtype=torch.int32)}, ValueError, "sequence 0 names a block"),
        ({"query_start_loc": torch.tensor([0, 3], dtype=torch.int32)}, ValueError, "query_start_loc must have shape"),
        ({"query_start_loc": torch.tensor([0, 4, 3], dtype=torch.int32)}, ValueError, "query_start_loc|kv_lens"),
        ({"query_start_loc": torch.tensor([0, 1, 2], dtype=torch.int32)}, ValueError, "query_start_loc must"),
        ({"query_start_loc": torch.tensor([1, 1, 3], dtype=torch.int32)}, ValueError, "query_start_loc must"),
        ({"kv_lens": torch.tensor([17, 1], dtype=torch.int32)}, ValueError, "kv_lens: sequence 1"),
        ({"kv_lens": torch.tensor([33, 2], dtype=torch.int32)}, ValueError, "kv_lens: sequence 0"),
    ],
)
def test_bad_input_is_refused_by_name(wrong: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        paged_attention(**(_arguments() | wrong))  # type: ignore[arg-type]
