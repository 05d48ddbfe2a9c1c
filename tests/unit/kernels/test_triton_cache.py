"""The Triton kernels that write: rows into slots, blocks from pool to pool; each arrives and nothing else changes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from kvarto.kernels.kv_layout import FP8, SCALE_BYTES, codes_and_scales
from kvarto.kernels.triton import launch

_spec = importlib.util.spec_from_file_location("attention_batch", Path(__file__).with_name("attention_batch.py"))
sys.modules["attention_batch"] = attention_batch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(attention_batch)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_kv_heads", "head_dim", "block_size"), [(2, 24, 16), (1, 80, 128), (9, 128, 32)])
def test_rows_land_in_their_slots_and_nowhere_else(
    num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    cache = torch.full((6, 3, 2, num_kv_heads, block_size, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    slots = torch.tensor([6 * block_size - 1, 0, 2 * block_size + 7], device=DEVICE)
    width = num_kv_heads * head_dim
    fused = torch.randn(3, 2 * width + 10, device=DEVICE).to(dtype)  # K and V as slices of one projection
    key, value = (fused[:, first:first + width].unflatten(1, (-1, head_dim)) for first in (0, width + 4))
    launch.write_kv(key, value, launch.LayerCache.of(cache, 2), slots)
    for token, slot in enumerate(slots.tolist()):
        for side, rows in enumerate((key, value)):
            written = cache[slot // block_size, 2, side, :, slot % block_size]
            assert torch.equal(written, rows[token])
            written.fill_(torch.nan)
    assert cache.isnan().all()


def quantized_cache(cache_dtype: torch.dtype, head_dim: int) -> torch.Tensor:
    """Every byte -1: no code that is written here is that, nor any scale."""
    shape = (4, 3, 2, 5, 16, head_dim + SCALE_BYTES)
    return torch.full(shape, -1, dtype=torch.int8, device=DEVICE).view(cache_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("head_dim", [24, 256])
def test_rows_are_quantized_into_their_slots_and_nowhere_else(
    head_dim: int, cache_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    cache = quantized_cache(cache_dtype, head_dim)
    slots = torch.randperm(64)[:40].to(DEVICE)
    sizes = 2.0 ** torch.randint(-8, 9, (2, 40, 5, 1)) * torch.rand(head_dim) ** 4  # in a row and between rows
    key, value = (torch.randn(2, 40, 5, head_dim) * sizes).to(dtype)
    launch.write_kv(key.to(DEVICE), value.to(DEVICE), launch.LayerCache.of(cache, 2), slots)
    codes, scales = (part[:, 2] for part in codes_and_scales(cache))
    for side, rows in enumerate((key, value)):
        expected_codes, expected_scales = attention_batch.quantize(rows.float(), cache_dtype)
        at = (slots // 16, side, slice(None), slots % 16)
        assert torch.equal(codes[at].cpu(), expected_codes)
        assert torch.equal(scales[at].cpu(), expected_scales)
        codes[at], scales[at] = -1 if cache_dtype == torch.int8 else 255, torch.tensor(-1).int().view(torch.float32)
    assert (cache.view(torch.int8) == -1).all()


@pytest.mark.parametrize("cache_dtype", [torch.int8, FP8], ids=str)
def test_codes_halfway_between_two_are_even(cache_dtype: torch.dtype) -> None:
    largest = 31.0 if cache_dtype == FP8 else 127.0  # of which the scale becomes 1
    rows = torch.arange(-256, 256).view(2, 1, 256) / (128 if cache_dtype == FP8 else 4)
    rows[..., 0] = largest
    cache = quantized_cache(cache_dtype, 256)
    launch.write_kv(*(rows.expand(2, 5, 256).contiguous().to(DEVICE) for _ in range(2)),
                    launch.LayerCache.of(cache, 0), torch.tensor([7, 63], device=DEVICE))
    codes, scales = (part.cpu() for part in codes_and_scales(cache))
    written = torch.stack([codes[0, 0, 1, 4, 7], codes[3, 0, 1, 4, 15]])
    assert torch.equal(written, attention_batch.quantize(rows[:, 0], cache_dtype)[0])
    assert scales[3, 0, 1, 4, 15] == 1


@pytest.mark.parametrize("cache_dtype", [torch.int8, FP8], ids=str)
def test_rows_of_zeros_have_scale_0_and_rows_that_are_not_finite_have_none(cache_dtype: torch.dtype) -> None:
    rows = torch.ones(4, 5, 24)
    rows[0], rows[1, :, 3], rows[2, :, 23] = 0.0, torch.inf, torch.nan
    cache = quantized_cache(cache_dtype, 24)
    launch.write_kv(rows.to(DEVICE), rows.to(DEVICE), launch.LayerCache.of(cache, 0), torch.arange(4, device=DEVICE))
    codes, scales = (part[0, 0, :, :, :4].cpu() for part in codes_and_scales(cache))
    assert not codes[:, :, 0].any()
    assert not scales[:, :, 0].any()
    assert scales[:, :, 1:3].isnan().all()
    assert scales[:, :, 3].isfinite().all()


def test_rows_without_a_slot_in_the_cache_are_dropped() -> None:
    cache = torch.zeros(2, 1, 2, 1, 16, 16, device=DEVICE)
    rows = torch.ones(3, 1, 16, device=DEVICE)
    launch.write_kv(rows, rows, launch.LayerCache.of(cache, 0), torch.tensor([-1, 32, 5], device=DEVICE))
    assert cache.sum() == 2 * 16
    assert cache[0, 0, :, 0, 5].all()


@pytest.mark.parametrize("size", [1, 37, 4096, 9_991])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_named_blocks_arrive_and_the_others_stay(size: int, dtype: torch.dtype) -> None:
    source = torch.randint(1, 200, (9, size), device=DEVICE).to(dtype)
    destination = torch.zeros(12, size, dtype=dtype, device=DEVICE)
    pairs = np.array([(8, 0), (0, 11), (3, 4), (3, 5), (1, 9)])
    launch.copy_blocks(source, destination, pairs)
    expected = torch.zeros_like(destination)
    expected[pairs[:, 1]] = source[pairs[:, 0]]
    assert torch.equal(destination, expected)


def test_blocks_of_any_shape_stride_and_offset_are_copied_in_place() -> None:
    wide = torch.randn(5, 3, 2, 8, 7, device=DEVICE)
    source, destination = wide[:, 1:], torch.zeros(10, 2, 2, 8, 7, device=DEVICE)[1::2]
    launch.copy_blocks(source, destination, np.array([[4, 1], [0, 4]]))
    assert torch.equal(destination[[1, 4]], source[[4, 0]])
    assert not destination[[0, 2, 3]].any()


def test_blocks_go_through_a_staging_buffer_to_another_pool() -> None:
    source = torch.randn(6, 2, 40, device=DEVICE)
    destination = torch.zeros(4, 2, 40, device=DEVICE)
    staging = launch.gather_blocks(source, np.array([5, 0, 3]))
    assert torch.equal(staging, source[[5, 0, 3]])
    launch.scatter_blocks(staging, destination, np.array([1, 3, 0]))
    assert torch.equal(destination[[1, 3, 0]], source[[5, 0, 3]])
    assert not destination[2].any()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_blocks_go_to_and_from_pinned_host_memory() -> None:
    device, host = torch.randn(6, 64, device=DEVICE), torch.zeros(4, 64, pin_memory=True)
    launch.copy_blocks(device, host, np.array([(5, 1), (2, 3)]))
    torch.cuda.synchronize()
    assert torch.equal(host[[1, 3]], device[[5, 2]].cpu())
    launch.copy_blocks(host, device, np.array([(1, 0)]))
    assert torch.equal(device[0], device[5])


@pytest.mark.parametrize("pair", [(-1, 0), (4, 0), (0, -1), (0, 3)])
def test_block_outside_its_pool_is_refused_before_anything_is_copied(pair: tuple[int, int]) -> None:
    destination = torch.zeros(3, 4, device=DEVICE)
    with pytest.raises(ValueError, match="pair 1 names a block outside"):
        launch.copy_blocks(torch.ones(4, 4, device=DEVICE), destination, np.array([(3, 2), pair]))
    assert not destination.any()
