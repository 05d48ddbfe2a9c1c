"""attention_scores against dense float64 softmax, and the independence of a sequence from all but its own."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvarto.kernels import Mask, attention_scores
from kvarto.kernels.kv_layout import FP8, codes_and_scales, quantized
from kvarto.kernels.triton import available

_spec = importlib.util.spec_from_file_location("attention_batch", Path(__file__).with_name("attention_batch.py"))
sys.modules["attention_batch"] = attention_batch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(attention_batch)
Batch, make_batch = attention_batch.Batch, attention_batch.make_batch
FLOAT32_UNIT = attention_batch.FLOAT32_UNIT

Ragged = tuple[list[tuple[int, int]], list[int]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows held, queries of this step), and how many of these are scored: none, the last, some, all; at edges of blocks,
# tiles and chunks.
RAGGED = [(1, 1), (15, 15), (16, 1), (17, 17), (33, 2), (64, 1), (129, 100), (40, 0), (513, 1), (600, 70), (20, 5)]
SCORED = [1, 15, 1, 9, 1, 1, 100, 0, 1, 33, 0]
# The interpreter is slow, and its tiles are smaller.
INTERPRETED_RAGGED = [(1, 1), (16, 1), (17, 17), (40, 0), (270, 1), (50, 24), (20, 5)]
INTERPRETED_SCORED = [1, 1, 9, 0, 1, 23, 0]


@pytest.fixture
def ragged(any_backend: str) -> Ragged:
    return (INTERPRETED_RAGGED, INTERPRETED_SCORED) if any_backend == available.NAME else (RAGGED, SCORED)


def without_values(batch: Batch) -> Batch:
    """All of V is NaN: it is not to be read."""
    parts = codes_and_scales(batch.cache) if quantized(batch.cache.dtype) else (batch.cache,)
    parts[-1][:, :, 1] = torch.nan
    return batch


def run(batch: Batch, scored: list[int]) -> Tensor:
    starts = torch.tensor([0, *map(len, batch.queries)]).cumsum(0).int()
    return attention_scores(
        torch.cat(batch.queries),
        batch.cache,
        batch.layer,
        batch.block_tables,
        starts,
        torch.tensor([len(rows) for rows in batch.keys], dtype=torch.int32),
        torch.tensor(scored, dtype=torch.int32),
        batch.scale,
        batch.mask.soft_cap,
    )


def assert_close_to_dense(batch: Batch, scored: list[int], received: Tensor) -> None:
    """Within what float32 may cost: dots, and sums over rows and queries."""
    block_size, head_dim, cap = batch.cache.shape[4], batch.queries[0].shape[2], batch.mask.soft_cap
    assert received.shape == (len(scored), batch.keys[0].shape[1], batch.block_tables.shape[1] * block_size)
    assert received.dtype == torch.float32
    for seq, (query, keys, count) in enumerate(zip(batch.queries, batch.keys, scored, strict=True)):
        assert (received[seq, :, len(keys) if count else 0 :] == 0).all()
        if count == 0:
            continue
        scores, largest = attention_batch.dense_scores(batch, seq)  # [num_heads, num_queries, kv_len]
        score_error = (head_dim + 16) * FLOAT32_UNIT * largest
        if cap is not None:
            scores = cap * (scores / cap).tanh()
            score_error += 8 * FLOAT32_UNIT * cap
        seen = attention_batch.dense_mask(Mask(), len(keys), len(query))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)[:, -count:]
        expected = weights.unflatten(0, (keys.shape[1], -1)).sum((1, 2))
        relative = 2 * score_error + (len(keys) + 64) * FLOAT32_UNIT
        num_summed = weights.shape[0] // keys.shape[1] * count
        bound = expected * (relative + num_summed * FLOAT32_UNIT) + num_summed * 2.0**-120
        assert ((received[seq, :, : len(keys)].double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"),
    [((9, 3), 64, 16), ((4, 4), 64, 128), ((8, 1), 128, 64), ((6, 2), 80, 16), ((5, 5), 72, 8), ((71, 1), 8, 32)],
)
def test_ragged_batch_equals_dense_softmax(
    ragged: Ragged, heads: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    lens, scored = ragged
    batch = without_values(make_batch(lens, dtype, heads, head_dim, block_size))
    assert_close_to_dense(batch, scored, run(batch, scored))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize(("heads", "head_dim", "block_size"), [((9, 3), 64, 16), ((6, 2), 80, 16), ((8, 1), 128, 64)])
def test_scores_of_a_quantized_cache_are_those_of_the_dequantized_rows(
    ragged: Ragged, heads: tuple[int, int], head_dim: int, block_size: int, cache_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    lens, scored = ragged
    batch = without_values(make_batch(lens, dtype, heads, head_dim, block_size, cache_dtype=cache_dtype))
    assert_close_to_dense(batch, scored, run(batch, scored))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8], ids=str)
def test_scores_are_capped_softly(
    ragged: Ragged, cache_dtype: torch.dtype
) -> None:
    lens, scored = ragged
    batch = make_batch(lens, torch.float32, mask=Mask(soft_cap=3.0), cache_dtype=cache_dtype)
    assert_close_to_dense(batch, scored, run(batch, scored))


@pytest.mark.usefixtures("any_backend")
def test_large_scores_do_not_overflow() -> None:
    batch = make_batch([(300, 3)], torch.float32)
    batch = replace(batch, queries=[batch.queries[0] * 40])
    assert_close_to_dense(batch, [2], run(batch, [2]))


@pytest.mark.usefixtures("any_backend")
def test_what_rows_receive_adds_up_to_the_queries_that_give() -> None:
    batch = make_batch([(270, 20)], torch.float32)
    assert torch.allclose(run(batch, [20]).sum(-1), torch.tensor(3 * 20.0))


@pytest.mark.usefixtures("any_backend")
def test_a_skipped_sequence_is_not_looked_at() -> None:
    batch = make_batch([(40, 3), (40, 3)], torch.float32)
    batch.block_tables[0] = 2**31 - 1
    received = run(batch, [0, 3])
    assert (received[0] == 0).all()
    assert torch.equal(received[1:], run(batch.only(1), [3]))


@pytest.mark.usefixtures("any_backend")
def test_earlier_queries_than_those_scored_have_no_part() -> None:
    batch = make_batch([(70, 30)], torch.float32)
    expected = run(batch, [4])
    spoilt = batch.queries[0].clone()
    spoilt[:26] = torch.nan
    assert torch.equal(run(replace(batch, queries=[spoilt]), [4]), expected)


@pytest.mark.usefixtures("any_backend")
def test_query_may_be_a_slice_of_a_fused_projection() -> None:
    batch = make_batch([(20, 3)], torch.float32)
    fused = torch.cat([batch.queries[0].flatten(1), torch.full((3, 100), torch.nan)], 1)
    sliced = replace(batch, queries=[fused[:, : 9 * 64].unflatten(1, (9, 64))])
    assert torch.equal(run(sliced, [2]), run(batch, [2]))


@pytest.mark.usefixtures("any_backend")
def test_batch_without_sequences_is_empty() -> None:
    cache = torch.zeros(1, 2, 2, 1, 16, 64)
    empty, start = torch.empty(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    received = attention_scores(torch.empty(0, 2, 64), cache, 0, empty.view(0, 4), start, empty, empty, 1.0)
    assert received.shape == (0, 1, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_of_a_sequence_does_not_depend_on_the_others(
    ragged: Ragged, dtype: torch.dtype
) -> None:
    lens, scored = ragged
    batch = make_batch(lens, dtype)
    together = run(batch, scored)
    for seq, count in enumerate(scored):
        assert torch.equal(run(batch.only(seq), [count])[0], together[seq])


@pytest.mark.usefixtures("native_backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [((9, 3), 64), ((8, 1), 80), ((2, 2), 128)])
def test_bits_do_not_depend_on_the_threads(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    lens, scored = [*RAGGED, (2100, 1), (1030, 300)], [*SCORED, 1, 300]
    batch = make_batch(lens, dtype, heads, head_dim)
    expected = run(batch, scored)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(run(batch, scored), expected)
        # Alone, a sequence of few tiles is cut among the threads.
        for seq in (9, 11):
            assert torch.equal(run(batch.only(seq), [scored[seq]])[0], expected[seq])


@pytest.mark.usefixtures("native_backend")
def test_bits_do_not_depend_on_the_block_size() -> None:
    batch = make_batch(RAGGED, torch.bfloat16, block_size=8)
    narrow, wide = run(batch, SCORED), run(batch.in_blocks(128, torch.bfloat16), SCORED)
    for seq, (kv_len, _) in enumerate(RAGGED):
        assert torch.equal(narrow[seq, :, :kv_len], wide[seq, :, :kv_len])


@pytest.mark.usefixtures("native_backend")
def test_scores_too_many_to_be_kept_are_computed_again_to_the_same_bits() -> None:
    batch = make_batch([(8000, 140)], torch.bfloat16, (2, 2))
    kept_floats = 1 << 21  # of scores.cpp
    assert kept_floats < 140 * 2 * 8000
    # With one query head per KV head, the sum over the queries is that of calls with one, which keep their scores.
    expected = sum(run(batch.only(0, 0, last), [1]) for last in range(1, 141))
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(run(batch, [140]), expected)


def _arguments() -> dict[str, object]:
    return {
        "query": torch.zeros(3, 4, 64),
        "cache": torch.zeros(5, 2, 2, 2, 16, 64),
        "layer": 1,
        "block_tables": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 1, 3], dtype=torch.int32),
        "kv_lens": torch.tensor([17, 2], dtype=torch.int32),
        "num_scored": torch.tensor([1, 2], dtype=torch.int32),
        "scale": 0.125,
    }


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"query": torch.zeros(3, 3, 64)}, ValueError, "a multiple of 2 KV heads"),
        ({"query": torch.zeros(3, 4, 64, dtype=torch.bfloat16)}, TypeError, "query must be torch.float32"),
        ({"query": torch.zeros(3, 64, 4).transpose(1, 2)}, ValueError, "query must have dense"),
        ({"cache": torch.zeros(5, 2, 2, 2, 16, 64, dtype=torch.float64)}, TypeError, "cache must be float32"),
        ({"layer": 2}, ValueError, "layer must be in"),
        ({"block_tables": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "block_tables must be torch.int32"),
        ({"block_tables": torch.zeros(4, dtype=torch.int32)}, ValueError, "block_tables must be"),
        ({"block_tables": torch.tensor([[0, 1], [5, 3]], dtype=torch.int32)}, ValueError, "sequence 1 names a block"),
        ({"block_tables": torch.tensor([[0, -1], [2, 3]], dtype=torch.int32)}, ValueError, "sequence 0 names a block"),
        ({"query_start_loc": torch.tensor([0, 3], dtype=torch.int32)}, ValueError, "query_start_loc must have shape"),
        ({"query_start_loc": torch.tensor([0, 1, 2], dtype=torch.int32)}, ValueError, "query_start_loc|num_scored"),
        ({"query_start_loc": torch.tensor([1, 2, 3], dtype=torch.int32)}, ValueError, "query_start_loc must"),
        ({"kv_lens": torch.tensor([17, 1], dtype=torch.int32)}, ValueError, "kv_lens: sequence 1"),
        ({"kv_lens": torch.tensor([33, 2], dtype=torch.int32)}, ValueError, "kv_lens: sequence 0"),
        ({"num_scored": torch.tensor([1, 3], dtype=torch.int32)}, ValueError, "num_scored: sequence 1"),
        ({"num_scored": torch.tensor([-1, 2], dtype=torch.int32)}, ValueError, "num_scored: sequence 0"),
        ({"num_scored": torch.tensor([1, 2])}, TypeError, "num_scored must be torch.int32"),
        ({"num_scored": torch.tensor([1], dtype=torch.int32)}, ValueError, "num_scored must have shape"),
        ({"num_scored": torch.tensor([1, 9, 2, 9], dtype=torch.int32)[::2]}, ValueError, "num_scored must be contig"),
        ({"soft_cap": 0.0}, ValueError, "soft_cap must be above 0"),
    ],
)
def test_bad_input_is_refused_by_name(wrong: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_scores(**(_arguments() | wrong))  # type: ignore[arg-type]
