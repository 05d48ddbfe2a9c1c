"""The Triton attention kernels against dense float64 attention, at the edges of blocks, tiles and splits."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
_spec = importlib.util.spec_from_file_location("triton_batch", Path(__file__).with_name("triton_batch.py"))
sys.modules["triton_batch"] = triton_batch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(triton_batch)
Batch, Mask = triton_batch.Batch, triton_batch.Mask
FP8 = triton_batch.attention_batch.FP8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows held, queries of this step). The decodes of 257 and 600 rows take two and three splits.
DECODES = [(1, 1), (16, 1), (17, 1), (33, 1), (257, 1), (600, 1)]
RAGGED = [(1, 1), (15, 15), (16, 1), (17, 17), (33, 2), (64, 1), (40, 0), (97, 33), (300, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"),
    [((3, 3), 64, 128), ((6, 2), 80, 16), ((4, 1), 96, 64), ((2, 1), 128, 32), ((2, 2), 256, 16), ((71, 1), 8, 16)])
def test_ragged_batch_equals_dense_attention(
    heads: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    batch = Batch.random(RAGGED, dtype, heads, head_dim, block_size)
    out = batch.run()
    assert out.dtype == dtype
    assert out.shape == (sum(queries for _, queries in RAGGED), heads[0], head_dim)
    batch.assert_close(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_decodes_over_several_splits_equal_dense_attention(block_size: int, dtype: torch.dtype) -> None:
    batch = Batch.random(DECODES, dtype, (4, 2), 64, block_size)
    batch.assert_close(batch.run(max_query_len=1))


def test_longest_sequence_that_fewer_splits_than_tiles_must_share() -> None:
    batch = Batch.random([(9_000, 1)], torch.float32, (1, 1), 16, 128)
    batch.assert_close(batch.run(max_query_len=1))


@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (12, 3), (40, 1)])
def test_any_group_of_heads_shares_its_rows(heads: tuple[int, int]) -> None:
    batch = Batch.random([(50, 1), (50, 7)], torch.float32, heads, 16)
    batch.assert_close(batch.run())


@pytest.mark.parametrize("mask", [Mask(), Mask(300, 4)], ids=str)
def test_decode_of_a_sequence_does_not_depend_on_the_others(mask: Mask) -> None:
    batch = Batch.random(DECODES, torch.bfloat16, mask=mask)
    if mask.window:
        batch = replace(batch, cache_dtype=FP8).with_far_sinks(64)
    alone = torch.cat([batch.only(seq).run() for seq in range(len(DECODES))])
    assert torch.equal(batch.run(), alone)


def test_large_scores_do_not_overflow() -> None:
    batch = Batch.random([(70, 1), (70, 3)], torch.float32)
    batch = replace(batch, queries=[query * 40 for query in batch.queries])
    batch.assert_close(batch.run())


@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize(("window", "num_sinks"), [(1, 0), (20, 0), (64, 4), (33, 40), (10_000, 4)])
def test_windows_sinks_and_soft_caps_equal_dense_attention_and_read_nothing_behind_the_window(
    window: int, num_sinks: int, soft_cap: float | None
) -> None:
    lens = [(1, 1), (20, 20), (33, 2), (150, 1), (600, 1), (150, 30)]
    batch = Batch.random(lens, torch.float32, mask=Mask(window, num_sinks, soft_cap))
    batch.assert_close(batch.run())


def test_soft_cap_without_a_window_equals_dense_attention() -> None:
    batch = Batch.random([(60, 1), (60, 9)], torch.bfloat16, mask=Mask(soft_cap=3.0))
    batch.assert_close(batch.run())


# Of the queries and of the cache.
QUANTIZED = [(torch.float32, torch.int8), (torch.float32, FP8), (torch.bfloat16, torch.int8), (torch.bfloat16, FP8),
             (torch.float16, torch.int8), (torch.float16, FP8)]


@pytest.mark.parametrize("rotary", [None, 24])
@pytest.mark.parametrize("mask", [Mask(1, 3), Mask(20, 5, 5.0), Mask(33, 40), Mask(140, 4)], ids=str)
def test_far_sinks_meet_their_own_queries(mask: Mask, rotary: int | None) -> None:
    lens = [(1, 1), (20, 20), (33, 2), (64, 31), (141, 1), (280, 1), (150, 30), (40, 0)]
    batch = Batch.random(lens, torch.float32, (4, 2), 24, mask=mask).with_far_sinks(rotary)
    batch.assert_close(batch.run())


def test_keys_that_are_turned_are_not_rounded_again() -> None:
    """A sink with the value 1 and the query's own row with 0: the result is the weight of the sink."""
    batch = Batch.random([(2, 1)], torch.float16, (1, 1), 16, mask=Mask(1, 1)).with_far_sinks(16)
    angles = torch.zeros(1, 8)
    angles[0, 0] = 1.0468  # the cosine lies between two numbers of float16
    far_query, keys, values = torch.zeros(1, 1, 16), torch.zeros(2, 1, 16), torch.zeros(2, 1, 16)
    far_query[0, 0, :2] = torch.tensor([2048.0, -1025.0])
    keys[0, 0, :2], values[0] = 1.0, 1.0
    batch = replace(batch, queries=[torch.zeros(1, 1, 16).half()], keys=[keys.half()], values=[values.half()],
                    far_queries=[far_query.half()], angles=angles)
    score = (2048.0 * angles[0, 0].double().cos() - 1025.0) * batch.scale
    assert (batch.run() - score.sigmoid()).abs().max() < 2.0**-10


@pytest.mark.parametrize(("heads", "head_dim", "block_size", "rotary"),
                         [((3, 3), 64, 8, 64), ((4, 1), 80, 128, 20), ((2, 1), 128, 64, None)])
@pytest.mark.parametrize(("dtype", "cache_dtype"), [(torch.bfloat16, None), (torch.float16, None), *QUANTIZED], ids=str)
def test_far_sinks_windows_and_caps_hold_for_every_shape_and_dtype(
    dtype: torch.dtype, cache_dtype: torch.dtype | None, heads: tuple[int, int], head_dim: int, block_size: int,
    rotary: int | None
) -> None:
    lens = [(1, 1), (45, 45), (46, 1), (128, 1), (300, 3)]
    batch = Batch.random(lens, dtype, heads, head_dim, block_size, Mask(45, 6, 20.0), cache_dtype)
    batch = batch.with_far_sinks(rotary)
    batch.assert_close(batch.run())


@pytest.mark.parametrize(("dtype", "cache_dtype"), QUANTIZED, ids=str)
@pytest.mark.parametrize(("heads", "head_dim", "block_size"), [((6, 2), 80, 16), ((4, 1), 64, 128), ((9, 1), 8, 8)])
def test_quantized_cache_is_attended_as_it_reads_back(
    heads: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    batch = Batch.random(RAGGED, dtype, heads, head_dim, block_size, cache_dtype=cache_dtype)
    batch.assert_close(batch.run())


@pytest.mark.parametrize("cache_dtype", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("magnitude", [2.0**-11, 2.0**14])
def test_values_of_any_size_that_float16_has_survive_their_codes(magnitude: float, cache_dtype: torch.dtype) -> None:
    """With one row, the result is that row."""
    batch = Batch.random([(1, 1)], torch.float16, cache_dtype=cache_dtype)
    batch = replace(batch, values=[batch.values[0].clamp(-3.9, 3.9) * magnitude])
    expected = batch.held(batch.values[0]).repeat_interleave(3, 1)
    assert ((batch.run() - expected).abs() <= 2.0**-10 * expected.abs() + 2.0**-25).all()
