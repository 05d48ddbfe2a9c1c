"""paged_attention against dense float64 attention, and the independence of a query from all but what it sees."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kvarto.kernels import FarSinks, Mask, paged_attention

_spec = importlib.util.spec_from_file_location("attention_batch", Path(__file__).with_name("attention_batch.py"))
sys.modules["attention_batch"] = attention_batch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(attention_batch)
assert_close_to_dense, make_batch = attention_batch.assert_close_to_dense, attention_batch.make_batch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows held, queries of this step): lone tokens, edges of blocks, tiles and chunks, prefills, chunks and decodes.
RAGGED = [(1, 1), (15, 15), (16, 1), (17, 17), (33, 2), (64, 1), (129, 100), (513, 1), (1030, 20), (40, 0), (260, 130)]


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
def test_bits_do_not_depend_on_the_other_heads(dtype: torch.dtype) -> None:
    batch = make_batch(RAGGED, dtype, (6, 3))
    together = batch.run()
    for head in range(3):
        ours = slice(2 * head, 2 * head + 2)
        alone = replace(
            batch,
            queries=[query[:, ours] for query in batch.queries],
            keys=[rows[:, head : head + 1] for rows in batch.keys],
            values=[rows[:, head : head + 1] for rows in batch.values],
            cache=batch.cache[:, :, :, head : head + 1].contiguous(),
        )
        assert torch.equal(alone.run(), together[:, ours])


@pytest.mark.usefixtures("native_backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 72, 80])
def test_bits_do_not_depend_on_how_a_prefill_is_cut(head_dim: int, dtype: torch.dtype) -> None:
    whole = make_batch([(700, 700)], dtype, head_dim=head_dim)
    expected = whole.run()
    cuts = [0, 1, 2, 33, 300, 511, 512, 513, 699, 700]
    pieces = [whole.only(0, first, last).run() for first, last in pairwise(cuts)]
    assert torch.equal(torch.cat(pieces), expected)


@pytest.mark.usefixtures("native_backend")
def test_bits_do_not_depend_on_the_block_size() -> None:
    batch = make_batch(RAGGED, torch.bfloat16, block_size=8)
    assert torch.equal(batch.run(), batch.in_blocks(128, torch.bfloat16).run())


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
        ({"cache": torch.zeros(5, 2, 2, 2, 16, 64, dtype=torch.int8)}, ValueError, "got 60 .torch.int8 rows of 64"),
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


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"mask": Mask(4)}, ValueError, "need a mask with a window and sinks"),
        ({"mask": Mask(None, 3)}, ValueError, "need a mask with a window and sinks"),
        ({"query": torch.zeros(3, 2, 64)}, ValueError, "far_sinks.query must have shape"),
        ({"query": torch.zeros(3, 4, 64, dtype=torch.float16)}, TypeError, "far_sinks.query must be torch.float32"),
        ({"query": torch.zeros(3, 64, 4).transpose(1, 2)}, ValueError, "far_sinks.query must have dense"),
        ({"sin": None}, ValueError, "come together"),
        ({"cos": torch.zeros(2, 32)}, ValueError, "far_sinks.cos must have shape"),
        ({"sin": torch.zeros(3, 16)}, ValueError, "far_sinks.sin must have shape"),
        ({"cos": torch.zeros(3, 33)}, ValueError, r"far_sinks.cos must be \[3, up to head_dim / 2 = 32\]"),
        ({"cos": torch.zeros(3, 32, dtype=torch.float64)}, TypeError, "far_sinks.cos must be torch.float32"),
        ({"cos": torch.zeros(32, 3).t()}, ValueError, "far_sinks.cos must be contiguous"),
    ],
)
def test_bad_far_sinks_are_refused_by_name(wrong: dict[str, object], error: type[Exception], message: str) -> None:
    far = FarSinks(torch.zeros(3, 4, 64), torch.zeros(3, 32), torch.zeros(3, 32))
    mask = wrong.get("mask", Mask(4, 3))
    far = replace(far, **{name: value for name, value in wrong.items() if name != "mask"})
    with pytest.raises(error, match=message):
        paged_attention(**_arguments(), mask=mask, far_sinks=far)  # type: ignore[arg-type]
