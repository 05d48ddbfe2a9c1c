"""Caches of one byte per element: what is written, how it reads back, and how far that is from what was meant."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvarto.kernels import copy_blocks, write_kv
from kvarto.kernels.kv_layout import FP8, SCALE_BYTES, codes_and_scales, quantized, row_elements, widen

_spec = importlib.util.spec_from_file_location("attention_batch", Path(__file__).with_name("attention_batch.py"))
sys.modules["attention_batch"] = attention_batch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(attention_batch)
assert_close_to_dense, make_batch = attention_batch.assert_close_to_dense, attention_batch.make_batch
FP8_VALUES = attention_batch.FP8_VALUES

INT8 = torch.int8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIM = 24
RAGGED = [(1, 1), (15, 15), (16, 1), (33, 2), (129, 100), (513, 1), (1030, 20), (40, 0)]


def empty_cache(dtype: torch.dtype, head_dim: int = HEAD_DIM) -> Tensor:
    """Every byte -1: codes that mean something, scales that are NaN."""
    return torch.full((6, 3, 2, 2, 16, head_dim + SCALE_BYTES), -1, dtype=torch.int8).view(dtype)


def written(key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales `[2, num_tokens, num_kv_heads, ...]` of rows that write_kv has put into a cache; the cache."""
    cache = empty_cache(dtype, key.shape[2])
    slots = torch.randperm(6 * 16)[: len(key)]
    write_kv(key, value, cache, 2, slots)
    codes, scales = codes_and_scales(cache)
    read = codes[slots // 16, 2, :, :, slots % 16].transpose(0, 1)
    return read, scales[slots // 16, 2, :, :, slots % 16].transpose(0, 1), cache


def rows(dtype: torch.dtype, head_dim: int = HEAD_DIM) -> Tensor:
    """`[40, 2, head_dim]` of many magnitudes, in a row and between rows."""
    magnitudes = 2.0 ** torch.randint(-12, 13, (40, 2, 1)) * torch.rand(head_dim) ** 4
    return (torch.randn(40, 2, head_dim) * magnitudes).to(dtype)


def test_all_fp8_codes_are_numbers() -> None:
    values = widen(torch.arange(256, dtype=FP8))
    assert torch.equal(values.double(), torch.cat([FP8_VALUES, -FP8_VALUES]))
    assert torch.equal(values.signbit(), torch.arange(256) >= 128)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", [INT8, FP8], ids=str)
@pytest.mark.parametrize("head_dim", [24, 64])
def test_codes_and_scales_are_those_of_the_formula(
    head_dim: int, cache_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    key, value = rows(dtype, head_dim), rows(dtype, head_dim)
    codes, scales, _ = written(key, value, cache_dtype)
    expected_codes, expected_scales = attention_batch.quantize(torch.stack([key, value]).float(), cache_dtype)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes, expected_codes)


@pytest.mark.usefixtures("backend")
def test_int8_codes_round_to_even_and_fp8_codes_cover_subnormals() -> None:
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127.0, 127.0]).repeat(1, 2, 1)
    codes, scales, _ = written(halves, halves, INT8)
    assert (scales == 1).all()
    assert codes[0, 0, 0].tolist() == [0, 2, 2, 0, -2, 126, -127, 127]
    step = 2.0**-6
    small = torch.tensor([31.0, step, 1.5 * step, 2.5 * step, -step / 2, 15.5 * step, -16.5 * step, 30.5])
    small = small.repeat(1, 2, 1)
    codes, scales, _ = written(small, small, FP8)
    assert (scales == 1).all()
    expected = torch.tensor([31.0, step, 2 * step, 2 * step, -0.0, 16 * step, -16 * step, 30.0])
    assert torch.equal(widen(codes[0, 0, 0]), expected)


@pytest.mark.usefixtures("backend")
def test_every_fp8_value_is_written_as_its_code() -> None:
    expected = torch.arange(256, dtype=FP8).view(2, 1, 1, 128).expand(2, 1, 2, 128)
    key, value = widen(expected)
    codes, scales, _ = written(key, value, FP8)
    assert (scales == 1).all()
    assert torch.equal(codes, expected)


@pytest.mark.usefixtures("backend")
def test_what_lies_halfway_between_fp8_values_and_right_beside_goes_to_the_nearest() -> None:
    middles = ((FP8_VALUES[1:] + FP8_VALUES[:-1]) / 2).float()
    below, above = middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(32.0))
    parts = torch.stack([below, middles, above, -middles]).view(4, 1, 127)
    parts = torch.cat([parts, torch.full((4, 1, 1), 31.0)], 2).repeat(1, 2, 1)
    codes, scales, _ = written(parts, parts, FP8)
    assert (scales == 1).all()
    assert torch.equal(codes[0], attention_batch.nearest_fp8(parts))
    even = (torch.arange(127) + 1) // 2 * 2
    assert torch.equal(codes[0, 1, 0, :127].int(), even.int())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("cache_dtype", [INT8, FP8], ids=str)
def test_rows_land_in_their_slots_and_nowhere_else(cache_dtype: torch.dtype) -> None:
    cache = empty_cache(cache_dtype)
    slots = torch.tensor([5 * 16 + 15, 0, 2 * 16 + 7])
    fused = torch.randn(3, 100)
    write_kv(fused[:, :48].unflatten(1, (2, 24)), fused[:, 50:98].unflatten(1, (2, 24)), cache, 2, slots)
    codes, scales = codes_and_scales(cache)
    assert scales[slots // 16, 2, :, :, slots % 16].isfinite().all()
    codes.view(INT8)[slots // 16, 2, :, :, slots % 16] = -1
    scales.view(torch.int32)[slots // 16, 2, :, :, slots % 16] = -1
    assert (cache.view(INT8) == -1).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("cache_dtype", [INT8, FP8], ids=str)
def test_error_is_half_a_step_at_most(cache_dtype: torch.dtype) -> None:
    key, value = rows(torch.float32), rows(torch.float32)
    codes, scales, _ = written(key, value, cache_dtype)
    x, scale = torch.stack([key, value]).double(), scales.double()[..., None]
    if cache_dtype == INT8:
        half_step = scale / 2
    else:  # 4 bits behind the leading one; below 2^-2 steps of 2^-6
        half_step = torch.maximum(x.abs() * 2.0**-5, scale * 2.0**-7)
    rounding = 2.0**-22 * x.abs().amax(-1, keepdim=True)  # of the scale and of the division
    assert ((widen(codes).double() * scale - x).abs() <= half_step + rounding).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("cache_dtype", [INT8, FP8], ids=str)
def test_zeros_read_as_zeros_and_what_is_not_finite_as_not_finite(cache_dtype: torch.dtype) -> None:
    key = torch.randn(6, 2, HEAD_DIM)
    key[0], key[1, :, 3], key[2, :, 4], key[3, :, 5] = 0.0, torch.inf, -torch.inf, torch.nan
    key[4], key[5, 0, 0] = 1e-45, 3e38
    codes, scales, _ = written(key, key, cache_dtype)
    read = widen(codes) * scales[..., None]
    assert (scales[:, 0] == 0).all()
    assert (codes[:, 0] == 0).all()
    assert not read[:, 1:4].isfinite().any()
    assert read[:, 4:].isfinite().all()
    assert (read[:, 4] == 0).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", [INT8, FP8], ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"), [((9, 3), 64, 16), ((8, 1), 128, 64), ((6, 2), 80, 16), ((5, 5), 72, 8)])
def test_attention_equals_that_over_the_dequantized_rows(
    heads: tuple[int, int], head_dim: int, block_size: int, cache_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    batch = make_batch(RAGGED, dtype, heads, head_dim, block_size, cache_dtype=cache_dtype)
    out = batch.run()
    assert out.dtype == dtype
    assert_close_to_dense(batch, out)


@pytest.mark.usefixtures("backend")
def test_every_fp8_code_is_read_as_its_value() -> None:
    """A lone row is its own attention: the codes of either sign, in two rows of V."""
    values = torch.stack([FP8_VALUES, -FP8_VALUES]).float().unsqueeze(1)
    batch = make_batch([(1, 1)] * 2, torch.float32, (1, 1), 128)
    batch = attention_batch.replace(batch, values=list(values.unsqueeze(1))).in_blocks(16, FP8)
    assert torch.equal(batch.run(), values)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("cache_dtype", [INT8, FP8], ids=str)
def test_the_largest_finite_rows_are_read_as_finite(cache_dtype: torch.dtype) -> None:
    batch = make_batch([(1, 1)], torch.float32, (1, 1), 16)
    values = [torch.full_like(batch.values[0], 3e38)]
    out = attention_batch.replace(batch, values=values).in_blocks(16, cache_dtype).run()
    assert torch.allclose(out, values[0])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("cache_dtype", [INT8, FP8], ids=str)
def test_a_written_row_that_is_not_finite_spoils_attention(cache_dtype: torch.dtype) -> None:
    batch = make_batch([(20, 1)], torch.float32, (2, 2), cache_dtype=cache_dtype)
    assert batch.run().isfinite().all()
    key, value = torch.zeros(2, 1, 2, 64)
    value[..., 7] = torch.inf
    slot = batch.block_tables[0, :1].long() * 16 + 5
    write_kv(key, value, batch.cache, batch.layer, slot)
    assert not batch.run().isfinite().any()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("cache_dtype", [INT8, FP8], ids=str)
def test_blocks_are_copied_codes_scales_and_all(cache_dtype: torch.dtype) -> None:
    _, _, cache = written(rows(torch.float32), rows(torch.float32), cache_dtype)
    copy = empty_cache(cache_dtype)
    copy_blocks(cache, copy, [(0, 5), (3, 1)])
    assert torch.equal(copy.view(INT8)[[5, 1]], cache.view(INT8)[[0, 3]])
    assert (copy.view(INT8)[[0, 2, 3, 4]] == -1).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("cache_dtype", [INT8, FP8], ids=str)
def test_bad_rows_are_refused_by_name(cache_dtype: torch.dtype) -> None:
    cache, slots, good = empty_cache(cache_dtype), torch.tensor([0]), torch.zeros(1, 2, HEAD_DIM)
    with pytest.raises(TypeError, match="key must be float32, bfloat16 or float16"):
        write_kv(good.to(cache_dtype), good, cache, 0, slots)
    with pytest.raises(TypeError, match=r"value must be torch.float32"):
        write_kv(good, good.half(), cache, 0, slots)
    with pytest.raises(ValueError, match="key must have shape"):
        write_kv(torch.zeros(1, 2, HEAD_DIM + SCALE_BYTES), good, cache, 0, slots)


def test_a_row_of_a_quantized_cache_has_room_for_its_scale() -> None:
    assert [row_elements(dtype, 64) for dtype in (INT8, FP8, torch.bfloat16)] == [68, 68, 64]
    assert [quantized(dtype) for dtype in (INT8, FP8, torch.bfloat16)] == [True, True, False]
