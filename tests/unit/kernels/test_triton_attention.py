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


def test_decode_of_a_sequence_does_not_depend_on_the_others() -> None:
    batch = Batch.random(DECODES, torch.bfloat16)
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
