"""Blocks of an int4 cache: what is written, how it reads back, and how far that is from what was meant."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvarto.kernels import quantize_blocks
from kvarto.kernels.kv_layout import int4_head_bytes, int4_parts, pack_int4, unpack_int4

_spec = importlib.util.spec_from_file_location("int4_batch", Path(__file__).with_name("int4_batch.py"))
sys.modules["int4_batch"] = int4_batch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(int4_batch)
Block, expected_block, random_residual = int4_batch.Block, int4_batch.expected_block, int4_batch.random_residual

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS, LAYERS = 2, 3


def written(residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The residual's blocks, layer 1, quantized into shuffled blocks of layer 2 of a cache: the cache, where each block
    is in it, and the bytes there, `[num_blocks, num_kv_heads, int4_head_bytes]`."""
    num_blocks, _, _, num_kv_heads, block_size, head_dim = residual.shape
    cache = torch.full((num_blocks + 2, LAYERS, num_kv_heads, int4_head_bytes(block_size, head_dim)), 255,
                       dtype=torch.uint8)
    blocks = torch.randperm(num_blocks + 2)[:num_blocks]
    quantize_blocks(residual, 1, torch.arange(num_blocks), cache, 2, blocks)
    return cache, blocks, cache[blocks, 2]


def read(block: Tensor, block_size: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """K and V, `[num_kv_heads, block_size, head_dim]` float64, of a block's bytes."""
    parts = int4_parts(block, block_size, head_dim)
    keys = (unpack_int4(parts.key_codes).double() - parts.key_zeros.unsqueeze(-2)) * parts.key_scales.unsqueeze(-2)
    values = unpack_int4(parts.value_codes).double() - unpack_int4(parts.value_zeros).unsqueeze(-1)
    return keys, values * parts.value_scales.unsqueeze(-1)


def test_codes_are_unpacked_as_they_were_packed() -> None:
    codes = torch.randint(16, (3, 5, 24)).to(torch.uint8)
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)


def test_an_int4_block_has_the_bytes_of_its_parts() -> None:
    block = Block.random(HEADS, 32, 80)
    assert block.bytes().shape == (HEADS, int4_head_bytes(32, 80))
    for got, expected in zip(read(block.bytes(), 32, 80), block.read(), strict=True):
        assert torch.equal(got, expected.transpose(0, 1))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("block_size", "head_dim"), [(8, 8), (16, 64), (32, 80), (64, 96), (128, 256), (16, 40)])
def test_every_byte_is_that_of_the_formula(block_size: int, head_dim: int, dtype: torch.dtype) -> None:
    residual = random_residual(dtype, HEADS, block_size, head_dim)
    _, _, found = written(residual)
    for block, got in zip(residual[:, 1], found, strict=True):
        assert torch.equal(got, expected_block(*block).bytes())


@pytest.mark.usefixtures("backend")
def test_ties_go_to_even_codes_and_what_fits_sixteen_codes_is_kept() -> None:
    residual = torch.zeros(1, 2, 2, 1, 8, 8)
    residual[0, 1, 1, 0, 0] = torch.tensor([0.0, 15.0, 0.5, 1.5, 2.5, 13.5, 14.5, 7.0])
    residual[0, 1, 1, 0, 1] = torch.tensor([-7.0, 8.0, -6.0, -1.0, 0.0, 1.0, 2.0, 3.0])
    _, values = read(written(residual)[2][0], 8, 8)
    assert values[0, 0].tolist() == [0, 15, 0, 2, 2, 14, 14, 7]
    assert torch.equal(values[0, 1], residual[0, 1, 1, 0, 1].double())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_half_a_step_at_most(dtype: torch.dtype) -> None:
    residual = random_residual(dtype, HEADS, num_blocks=20)
    _, _, found = written(residual)
    parts = int4_parts(found, 16, 24)
    keys, values = residual[:, 1].double().unbind(1)
    # Each over 15: the second of a channel's is 1/120 of its largest magnitude.
    ranges = (torch.maximum(keys.amax(-2) - keys.amin(-2), keys.abs().amax(-2) / 8),
              values.amax(-1).clamp(min=0) - values.amin(-1).clamp(max=0))
    for got, meant, scale, span, dim in zip(read(found, 16, 24), (keys, values),
                                            (parts.key_scales, parts.value_scales), ranges, (-2, -1), strict=True):
        # The quotients of float32, of 128 steps at most, err by 2^-24 of themselves.
        assert ((got - meant).abs() <= scale.double().unsqueeze(dim) * (0.5 + 2.0**-16)).all()
        # And no scale is coarser than it must be: the next of bfloat16 is 2^-7 away, and two operations were rounded.
        assert (scale.double() <= span / 15 * (1 + 2.0**-7) * (1 + 2.0**-22)).all()


@pytest.mark.usefixtures("backend")
def test_zeros_read_as_zeros_and_what_is_not_finite_as_nan() -> None:
    residual = torch.randn(5, 2, 2, HEADS, 16, 24)
    residual[0, 1] = 0.0
    residual[1, 1, :, 0, 3, 5], residual[2, 1, :, 0, 3, 5] = torch.inf, torch.nan
    residual[3, 1, :, 0, 3, 5:7] = torch.tensor([3e38, -3e38])  # their difference is beyond float32
    residual[4, 1] = 1e-45
    _, _, found = written(residual)
    keys, values = read(found, 16, 24)
    assert not found[0].any()
    assert (keys[4] == 0).all() and (values[4] == 0).all()
    for block in (1, 2):
        assert keys[block, 0].isnan().any(0).nonzero().tolist() == [[5]] and keys[block, 0, :, 5].isnan().all()
    for block in (1, 2, 3):
        assert values[block, 0].isnan().any(1).nonzero().tolist() == [[3]] and values[block, 0, 3].isnan().all()
    assert keys[:, 1].isfinite().all() and values[:, 1].isfinite().all()


@pytest.mark.usefixtures("backend")
def test_a_row_of_values_of_one_sign_has_its_zero_at_an_end_of_the_codes() -> None:
    residual = torch.randn(1, 2, 2, 1, 16, 8)
    values = residual[0, 1, 1, 0]
    values[:] = 0.0
    values[2], values[3] = torch.arange(46.0, 61.0, 2), -torch.arange(46.0, 61.0, 2)
    values[5, 2], values[9, 3], values[13] = torch.nan, -torch.inf, torch.inf
    values[15] = torch.tensor([-15.0, 0, -4, -6, -2, -3, -1, -8])
    _, _, found = written(residual)
    parts = int4_parts(found[0, 0], 16, 8)
    assert parts.value_scales[[2, 3, 15]].tolist() == [4, 4, 1]
    assert parts.value_scales.isnan().nonzero()[:, 0].tolist() == [5, 9, 13]
    assert unpack_int4(parts.value_zeros).nonzero()[:, 0].tolist() == [3, 15]
    assert unpack_int4(parts.value_zeros)[[3, 15]].tolist() == [15, 15]
    assert not unpack_int4(parts.value_codes)[[0, 1, 5, 9, 13, 14]].any()
    assert unpack_int4(parts.value_codes)[15].tolist() == [0, 15, 11, 9, 13, 12, 14, 7]


@pytest.mark.usefixtures("backend")
def test_blocks_land_in_their_place_and_nowhere_else() -> None:
    cache, blocks, found = written(random_residual(torch.float32, HEADS))
    assert (found != 255).any(-1).all()
    cache[blocks, 2] = 255
    assert (cache == 255).all()
    quantize_blocks(torch.zeros(4, 2, 2, HEADS, 16, 24), 0, torch.empty(0).long(), cache, 0, torch.empty(0).long())
    assert (cache == 255).all()


@pytest.mark.usefixtures("native_backend")
def test_threads_share_blocks() -> None:
    residual = random_residual(torch.bfloat16, HEADS, 128, 64, 20)
    _, _, found = written(residual)
    torch.set_num_threads(3)
    assert torch.equal(written(residual)[2], found)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"residual": torch.zeros(4, 2, 2, 2, 16, 28, dtype=torch.int8)}, TypeError, "residual must be float32"),
        ({"residual": torch.zeros(4, 2, 2, 2, 12, 24)}, ValueError, "block_size must be one of"),
        ({"residual_layer": 2}, ValueError, r"layer must be in \[0, 2\)"),
        ({"cache": torch.zeros(3, 3, 2, 500, dtype=torch.uint8)}, ValueError, "an int4 cache must be"),
        ({"layer": -1}, ValueError, r"layer must be in \[0, 3\)"),
        ({"blocks": torch.tensor([0, 2], dtype=torch.int32)}, TypeError, "blocks must be torch.int64"),
        ({"blocks": torch.tensor([0])}, ValueError, "residual_blocks must have shape"),
        ({"blocks": torch.tensor([0, 3])}, ValueError, "blocks: entry 1 names"),
        ({"residual_blocks": torch.tensor([-1, 0])}, ValueError, "blocks: entry 0 names"),
    ],
)
def test_bad_input_is_refused_by_name_and_nothing_is_written(
    wrong: dict[str, object], error: type[Exception], message: str
) -> None:
    cache = torch.full((3, 3, 2, int4_head_bytes(16, 24)), 255, dtype=torch.uint8)
    arguments: dict[str, object] = {
        "residual": torch.zeros(4, 2, 2, 2, 16, 24), "residual_layer": 1, "residual_blocks": torch.tensor([1, 3]),
        "cache": cache, "layer": 2, "blocks": torch.tensor([0, 2])}
    with pytest.raises(error, match=message):
        quantize_blocks(**(arguments | wrong))  # type: ignore[arg-type]
    assert (cache == 255).all()
