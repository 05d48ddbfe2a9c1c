"""paged_attention under windows, sinks and soft caps: against dense float64 attention, and row for row at the edges."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kvarto.kernels import Mask
from kvarto.kernels.kv_layout import FP8

_spec = importlib.util.spec_from_file_location("attention_batch", Path(__file__).with_name("attention_batch.py"))
sys.modules["attention_batch"] = attention_batch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(attention_batch)
assert_close_to_dense, make_batch = attention_batch.assert_close_to_dense, attention_batch.make_batch

# (rows held, queries of this step): windows that begin and end inside and at the edges of blocks, tiles and chunks.
RAGGED = [(1, 1), (15, 15), (33, 2), (64, 1), (70, 70), (129, 100), (513, 1), (650, 140), (40, 0), (1100, 3), (601, 1)]
MASKS = [
    Mask(window=1),
    Mask(window=32),
    Mask(window=100, num_sinks=4),
    Mask(window=512, num_sinks=33),
    Mask(window=20, num_sinks=600),
    Mask(window=2000, num_sinks=4),
    Mask(num_sinks=4, soft_cap=2.0),
    Mask(window=37, num_sinks=5, soft_cap=30.0),
]
FAR_SINKS = ["", "query", "query and keys"]
CACHE_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, FP8]
SHAPES = [((9, 3), 64, 16), ((2, 2), 128, 128), ((8, 1), 80, 64), ((5, 5), 72, 8), ((32, 1), 8, 32)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("mask", "far_sinks"),
    [(mask, far) for mask in MASKS for far in FAR_SINKS if not far or (mask.window and mask.num_sinks)],
    ids=str,
)
def test_masked_batch_equals_dense_attention(mask: Mask, far_sinks: str) -> None:
    batch = make_batch(RAGGED, torch.float32, mask=mask, far_sinks=far_sinks)
    assert_close_to_dense(batch, batch.run())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head_dim", "block_size"), SHAPES)
def test_masks_hold_for_every_shape_and_dtype(
    heads: tuple[int, int], head_dim: int, block_size: int, cache_dtype: torch.dtype
) -> None:
    dtype = torch.bfloat16 if cache_dtype.itemsize == 1 else cache_dtype
    mask = Mask(window=45, num_sinks=6, soft_cap=20.0)
    batch = make_batch(RAGGED, dtype, heads, head_dim, block_size, mask, "query and keys", cache_dtype)
    assert_close_to_dense(batch, batch.run())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("window", [1, 7, 32, 100])
def test_each_query_sees_its_window_and_the_sinks_and_not_one_row_more(window: int) -> None:
    """With equal scores a result is the mean of V over the rows that are seen."""
    kv_len, num_queries, num_sinks = 140, 120, 3
    batch = make_batch([(kv_len, num_queries)], torch.float32, (1, 1), 8, mask=Mask(window, num_sinks))
    numbers = torch.arange(kv_len, dtype=torch.float32)[:, None, None].expand(-1, 1, 8) ** 2
    batch = replace(batch, keys=[torch.zeros_like(batch.keys[0])], values=[numbers]).in_blocks(16, torch.float32)
    out = batch.run()[:, 0, 0]
    for i, p in enumerate(range(kv_len - num_queries, kv_len)):
        seen = [j for j in range(p + 1) if j > p - window or j < num_sinks]
        assert out[i].item() == pytest.approx(sum(j * j for j in seen) / len(seen), rel=1e-5)


@pytest.mark.usefixtures("backend")
def test_far_sinks_begin_right_behind_the_window() -> None:
    """The far query makes a sink win over everything, the query proper makes rows equal."""
    kv_len, window, num_sinks = 40, 10, 5
    batch = make_batch([(kv_len, kv_len)], torch.float32, (1, 1), 8, mask=Mask(window, num_sinks), far_sinks="query")
    numbers = torch.arange(kv_len, dtype=torch.float32)[:, None, None].expand(-1, 1, 8)
    batch = replace(
        batch,
        queries=[torch.zeros(kv_len, 1, 8)],
        far_queries=[torch.full((kv_len, 1, 8), 100.0)],
        keys=[torch.ones(kv_len, 1, 8)],
        values=[numbers],
    ).in_blocks(16, torch.float32)
    out = batch.run()[:, 0, 0]
    for p in range(kv_len):
        far = [j for j in range(num_sinks) if j <= p - window]
        seen = far or range(max(0, p - window + 1), p + 1)
        assert out[p].item() == pytest.approx(sum(seen) / len(seen), rel=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
def test_a_row_that_is_not_finite_spoils_just_the_queries_that_see_it(cache_dtype: torch.dtype) -> None:
    batch = make_batch([(200, 200)], torch.float32 if cache_dtype.itemsize == 1 else cache_dtype, mask=Mask(20, 2),
                       cache_dtype=cache_dtype)
    clean = batch.run()
    spoilt = 50
    batch.cache[batch.block_tables[0, spoilt // 16], batch.layer, 1].view(torch.int8).flatten(1)[:] = -1
    out = batch.run()
    rows = torch.arange(200)
    # The row's whole block is spoilt.
    sees = (rows >= 48) & (rows < 48 + 16 + 20 - 1)
    assert torch.equal(out.isfinite().all(-1).all(-1), ~sees)
    assert torch.equal(out[~sees], clean[~sees])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e4, 1e30])
def test_soft_cap_is_right_for_tiny_and_huge_scores(magnitude: float) -> None:
    batch = make_batch([(70, 3)], torch.float32, mask=Mask(soft_cap=5.0))
    batch = replace(batch, queries=[batch.queries[0] * magnitude])
    # Far out the slope is 0, whatever the scores' own error; the bound of the oracle is for the steep part.
    out = batch.run()
    assert out.isfinite().all()
    if magnitude <= 1:
        assert_close_to_dense(batch, out)
        return
    scores, _ = attention_batch.dense_scores(batch, 0)
    seen = attention_batch.dense_mask(batch.mask, 70, 3)
    steep = ((scores.abs() < 100) & seen).any(-1).transpose(0, 1)
    capped = (5.0 * scores.sign()).masked_fill(~seen, -torch.inf)
    values = batch.values[0].double().repeat_interleave(3, 1).transpose(0, 1)
    expected = (capped.softmax(-1) @ values).transpose(0, 1)
    assert not steep.all()
    assert (out - expected)[~steep].abs().max() < 1e-5


@pytest.mark.usefixtures("native_backend")
@pytest.mark.parametrize("mask", [Mask(100, 4), Mask(37, 40, 20.0), Mask(600)], ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8, FP8], ids=str)
def test_bits_do_not_depend_on_the_batch_the_threads_or_the_cuts(cache_dtype: torch.dtype, mask: Mask) -> None:
    far_sinks = "query and keys" if mask.num_sinks else ""
    batch = make_batch([*RAGGED, (700, 700)], torch.bfloat16, mask=mask, far_sinks=far_sinks, cache_dtype=cache_dtype)
    together = batch.run()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        alone = [batch.only(seq).run() for seq in range(len(batch.keys))]
        assert torch.equal(torch.cat(alone), together)
    cuts = [0, 1, 2, 33, 300, 511, 512, 513, 699, 700]
    pieces = [batch.only(len(RAGGED), first, last).run() for first, last in pairwise(cuts)]
    assert torch.equal(torch.cat(pieces), alone[-1])


@pytest.mark.usefixtures("native_backend")
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8, FP8], ids=str)
def test_bits_do_not_depend_on_the_block_size(cache_dtype: torch.dtype) -> None:
    batch = make_batch(RAGGED, torch.float32, block_size=8, mask=Mask(70, 9), cache_dtype=cache_dtype)
    assert torch.equal(batch.run(), batch.in_blocks(128, cache_dtype).run())
