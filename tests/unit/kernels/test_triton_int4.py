"""The Triton kernels of int4 caches: against dense float64, and their codes against those of the formula."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from kvarto.kernels import Mask, quantize_blocks
from kvarto.kernels.kv_layout import int4_head_bytes, int4_parts, unpack_int4
from kvarto.kernels.triton.available import interpreted

_spec = importlib.util.spec_from_file_location("int4_batch", Path(__file__).with_name("int4_batch.py"))
sys.modules["int4_batch"] = int4_batch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(int4_batch)
Int4Batch = int4_batch.Int4Batch

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RAGGED = [(1, 1), (15, 15), (16, 1), (17, 17), (33, 2), (64, 1), (40, 0), (97, 33), (300, 1), (600, 1)]


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARTO_KERNELS", "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"),
    [((6, 2), 64, 16), ((3, 3), 64, 128), ((6, 2), 80, 8), ((4, 1), 96, 64), ((2, 1), 128, 32), ((2, 2), 256, 16),
     ((71, 1), 8, 16)])
def test_ragged_batch_equals_dense_attention(
    heads: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    batch = Int4Batch.random(RAGGED, dtype, heads, head_dim, block_size)
    out = batch.run()
    assert out.dtype == dtype
    batch.assert_close(out, tensor_cores=True)


@pytest.mark.parametrize("far_sinks", ["", "query", "query and keys"])
@pytest.mark.parametrize("mask", [Mask(1, 3), Mask(20, 5, 5.0), Mask(33, 40), Mask(140, 4), Mask(2, 50)], ids=str)
@pytest.mark.parametrize(("block_size", "dtype"), [(16, torch.float32), (128, torch.bfloat16), (8, torch.float16)])
def test_windows_sinks_and_caps_equal_dense_attention_and_read_nothing_else(
    block_size: int, dtype: torch.dtype, mask: Mask, far_sinks: str
) -> None:
    lens = [(20, 20), (33, 2), (141, 1), (280, 1), (150, 60), (40, 0)]
    batch = Int4Batch.random(lens, dtype, (3, 1), 24, block_size, mask, far_sinks)
    batch.assert_close(batch.run(), tensor_cores=True)


@pytest.mark.parametrize("mask", [Mask(), Mask(300, 4)], ids=str)
def test_decode_of_a_sequence_does_not_depend_on_the_others(mask: Mask) -> None:
    lens = [(1, 1), (16, 1), (17, 1), (257, 1), (600, 1)]
    batch = Int4Batch.random(lens, torch.bfloat16, (4, 2), mask=mask, far_sinks="query" if mask.window else "")
    assert torch.equal(torch.cat([batch.only(seq).run() for seq in range(len(lens))]), batch.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("block_size", "head_dim"), [(8, 8), (16, 64), (32, 80), (128, 96)])
def test_every_byte_of_a_block_is_that_of_the_formula(block_size: int, head_dim: int, dtype: torch.dtype) -> None:
    residual = int4_batch.random_residual(dtype, 2, block_size, head_dim)
    residual[0, 1, :, 0] = 0.0
    cache = torch.full((5, 3, 2, int4_head_bytes(block_size, head_dim)), 255, dtype=torch.uint8)
    blocks = torch.tensor([4, 0, 3, 1])
    quantize_blocks(residual, 1, torch.arange(4), cache, 2, blocks)
    for block, got in zip(residual[:, 1], cache[blocks, 2], strict=True):
        assert torch.equal(got, int4_batch.expected_block(*block).bytes())
    cache[blocks, 2] = 255
    assert (cache == 255).all()


@pytest.mark.parametrize("spoiler", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_reads_as_nan_and_spoils_nothing_else(spoiler: float) -> None:
    residual = torch.randn(1, 1, 2, 1, 16, 24)
    residual[0, 0, :, 0, 3, 15] = spoiler
    cache = torch.zeros(1, 1, 1, int4_head_bytes(16, 24), dtype=torch.uint8)
    quantize_blocks(residual, 0, torch.tensor([0]), cache, 0, torch.tensor([0]))
    parts = int4_parts(cache[0, 0, 0], 16, 24)
    assert parts.key_scales.isnan().nonzero().tolist() == [[15]]
    assert parts.value_scales.isnan().nonzero().tolist() == [[3]]
    assert parts.key_zeros[15] == 0 and unpack_int4(parts.value_zeros)[3] == 0
    assert not unpack_int4(parts.key_codes)[:, 15].any() and not unpack_int4(parts.value_codes)[3].any()


def test_what_names_a_block_outside_its_cache_is_dropped() -> None:
    cache = torch.full((3, 1, 1, int4_head_bytes(16, 24)), 255, dtype=torch.uint8)
    residual = torch.zeros(2, 1, 1 + 1, 1, 16, 24)
    quantize_blocks(residual, 0, torch.tensor([0, 2, -1, 1]), cache, 0, torch.tensor([3, 0, 1, 2]))
    assert (cache[:2] == 255).all()
    assert not cache[2].any()
