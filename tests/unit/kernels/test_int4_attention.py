"""Attention over an int4 cache and its residual, against dense float64; and what a query's result depends on."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kvarto.kernels import Mask, Residual, paged_attention

_spec = importlib.util.spec_from_file_location("int4_batch", Path(__file__).with_name("int4_batch.py"))
sys.modules["int4_batch"] = int4_batch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(int4_batch)
Int4Batch = int4_batch.Int4Batch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RAGGED = [(1, 1), (15, 15), (16, 1), (17, 17), (33, 2), (64, 1), (129, 100), (513, 1), (1030, 20), (40, 0), (260, 130)]
SHAPES = [((9, 3), 64, 16), ((4, 4), 64, 128), ((8, 1), 128, 64), ((6, 2), 80, 16), ((2, 2), 96, 32), ((2, 1), 256, 32),
          ((5, 5), 72, 8), ((71, 1), 8, 16)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head_dim", "block_size"), SHAPES)
def test_ragged_batch_equals_dense_attention(
    heads: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    batch = Int4Batch.random(RAGGED, dtype, heads, head_dim, block_size)
    out = batch.run()
    assert out.dtype == dtype
    batch.assert_close(out)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("far_sinks", ["", "query", "query and keys"])
@pytest.mark.parametrize("mask", [Mask(1, 3), Mask(20, 5, 5.0), Mask(33, 40), Mask(140, 4), Mask(600, 600)], ids=str)
@pytest.mark.parametrize(("head_dim", "block_size", "dtype"),
                         [(64, 16, torch.bfloat16), (24, 128, torch.float32), (80, 8, torch.float16)])
def test_windows_sinks_and_caps_equal_dense_attention_and_read_nothing_else(
    head_dim: int, block_size: int, dtype: torch.dtype, mask: Mask, far_sinks: str
) -> None:
    lens = [(1, 1), (20, 20), (33, 2), (64, 31), (141, 1), (280, 1), (1100, 1), (150, 130), (40, 0), (700, 90)]
    batch = Int4Batch.random(lens, dtype, (4, 2), head_dim, block_size, mask, far_sinks)
    batch.assert_close(batch.run())


@pytest.mark.usefixtures("backend")
def test_soft_cap_without_a_window_equals_dense_attention() -> None:
    batch = Int4Batch.random([(60, 1), (60, 9)], torch.bfloat16, mask=Mask(soft_cap=3.0))
    batch.assert_close(batch.run())


MASKS = [(Mask(), ""), (Mask(100, 4), ""), (Mask(30, 20), "query and keys")]


@pytest.mark.usefixtures("native_backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mask", "far_sinks"), MASKS, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [((9, 3), 64), ((8, 1), 80), ((2, 2), 128)])
def test_bits_do_not_depend_on_the_batch_or_the_threads(
    heads: tuple[int, int], head_dim: int, mask: Mask, far_sinks: str, dtype: torch.dtype
) -> None:
    batch = Int4Batch.random(RAGGED, dtype, heads, head_dim, mask=mask, far_sinks=far_sinks)
    together = batch.run()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(batch.run(), together)
        assert torch.equal(torch.cat([batch.only(seq).run() for seq in range(len(RAGGED))]), together)


@pytest.mark.usefixtures("native_backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mask", "far_sinks"), MASKS, ids=str)
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (72, 8), (80, 128)])
def test_bits_do_not_depend_on_how_a_prefill_is_cut(
    head_dim: int, block_size: int, mask: Mask, far_sinks: str, dtype: torch.dtype
) -> None:
    whole = Int4Batch.random([(700, 700)], dtype, (9, 3), head_dim, block_size, mask, far_sinks)
    expected = whole.run()
    cuts = [0, 1, 2, 33, 128, 300, 511, 512, 513, 699, 700]
    assert torch.equal(torch.cat([whole.only(0, first, last).run() for first, last in pairwise(cuts)]), expected)


@pytest.mark.usefixtures("native_backend")
def test_bits_do_not_depend_on_the_other_heads() -> None:
    batch = Int4Batch.random(RAGGED, torch.bfloat16, (6, 3))
    together = batch.run()
    for head in range(3):
        ours = slice(2 * head, 2 * head + 2)
        own = replace(batch.own, queries=[query[:, ours] for query in batch.own.queries])
        alone = replace(batch, own=own, cache=batch.cache[:, :, head:head + 1].contiguous(),
                        residual=batch.residual[:, :, :, head:head + 1].contiguous())
        assert torch.equal(alone.run(), together[:, ours])


def _arguments() -> dict[str, object]:
    tables = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    return {
        "query": torch.zeros(3, 4, 64),
        "cache": torch.zeros(5, 2, 2, 1256, dtype=torch.uint8),
        "layer": 1,
        "block_tables": tables,
        "query_start_loc": torch.tensor([0, 1, 3], dtype=torch.int32),
        "kv_lens": torch.tensor([17, 18], dtype=torch.int32),
        "scale": 0.125,
        "residual": Residual(torch.zeros(5, 3, 2, 2, 16, 64), 2, tables),
    }


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"query": torch.zeros(3, 4, 64, dtype=torch.bfloat16)}, TypeError, "query must be torch.float32"),
        ({"query": torch.zeros(3, 3, 64)}, ValueError, "a multiple of 2 KV heads"),
        ({"cache": torch.zeros(5, 2, 2, 2, 16, 64)}, ValueError, "an int4 cache must be"),
        ({"cache": torch.zeros(5, 2, 2, 1255, dtype=torch.uint8)}, ValueError, r"num_layers, 2, 1256\], got"),
        ({"cache": torch.zeros(5, 2, 2, 1256, dtype=torch.int8)}, TypeError, "cache must be torch.uint8"),
        ({"cache": torch.zeros(2, 5, 2, 1256, dtype=torch.uint8).transpose(0, 1)}, ValueError, "cache must be contig"),
        ({"layer": 2}, ValueError, r"layer must be in \[0, 2\)"),
        ({"block_tables": torch.tensor([[0, 1], [5, 3]], dtype=torch.int32)}, ValueError, "^block_tables: sequence 1"),
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
        ({"layer": 3}, ValueError, r"layer must be in \[0, 3\)"),
        ({"cache": torch.zeros(5, 3, 2, 2, 16, 68, dtype=torch.int8)}, TypeError, "residual must be float32"),
        ({"cache": torch.zeros(5, 3, 2, 2, 32, 64)}, ValueError, "an int4 cache must be"),
        ({"block_tables": torch.zeros(2, 3, dtype=torch.int32)}, ValueError, "residual.block_tables must have shape"),
        ({"block_tables": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "residual.block_tables must be torch.int"),
        ({"block_tables": torch.tensor([[0, 1], [2, 5]], dtype=torch.int32)}, ValueError,
         "^residual.block_tables: sequence 1"),
    ],
)
def test_a_bad_residual_is_refused_by_name(wrong: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = _arguments()
    arguments["residual"] = replace(arguments["residual"], **wrong)  # type: ignore[type-var]
    with pytest.raises(error, match=message):
        paged_attention(**arguments)  # type: ignore[arg-type]
