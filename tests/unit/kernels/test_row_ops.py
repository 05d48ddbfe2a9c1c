"""Norms, rotary positions and gated activations against float64, and the independence of a token from the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvarto.kernels import activate, best_tokens, gated, rms_norm, rotate, take_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("backend")


def assert_close(out: Tensor, expected: Tensor, roundings: float) -> None:
    """Within so many roundings to out's dtype, beside the float32 arithmetic."""
    bound = (roundings * torch.finfo(out.dtype).eps / 2 + 64 * 2.0**-24) * expected.abs() + 1e-6
    assert ((out.double() - expected).abs() <= bound).all()


def exact_norm(x: Tensor, weight: Tensor, plus_one: bool) -> Tensor:
    x, weight = x.double(), weight.double() + plus_one
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("shape", [(1, 576), (40, 576), (3, 7), (5, 4, 80), (300, 72)])
def test_norm_equals_float64(shape: tuple[int, ...], plus_one: bool, dtype: torch.dtype) -> None:
    x, weight = (torch.randn(shape) * 3).to(dtype), torch.randn(shape[-1]).to(dtype)
    assert_close(rms_norm(x, weight, 1e-5, plus_one=plus_one), exact_norm(x, weight, plus_one), 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_writes_where_it_is_told_to_and_over_its_input(dtype: torch.dtype) -> None:
    fused, weight = torch.randn(6, 7, 40).to(dtype), torch.randn(40).to(dtype)
    before, elsewhere = fused.clone(), torch.zeros(6, 9, 40, dtype=dtype)
    expected = rms_norm(fused[:, 2:5], weight, 1e-5)
    assert rms_norm(fused[:, 2:5], weight, 1e-5, out=elsewhere[:, 1:4]).data_ptr() == elsewhere[:, 1:].data_ptr()
    rms_norm(fused[:, 2:5], weight, 1e-5, out=fused[:, 2:5])
    assert torch.equal(elsewhere, torch.nn.functional.pad(expected, (0, 0, 1, 5)))
    assert torch.equal(fused, torch.cat((before[:, :2], expected, before[:, 5:]), dim=1))
    with pytest.raises(ValueError, match="out"):
        rms_norm(fused, weight, 1e-5, out=elsewhere)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_adds_what_is_to_be_added_in_place_first(dtype: torch.dtype) -> None:
    x, addend, weight = torch.randn(9, 100).to(dtype), torch.randn(9, 100).to(dtype), torch.randn(100).to(dtype)
    both = x + addend
    out = rms_norm(x, weight, 1e-5, addend=addend)
    assert torch.equal(x, both)
    assert torch.equal(out, rms_norm(both, weight, 1e-5))


def test_norm_reads_heads_where_they_lie() -> None:
    qkv, weight = torch.randn(6, 5, 16), torch.randn(16)
    before = qkv.clone()
    assert torch.equal(rms_norm(qkv[:, 1:4], weight, 1e-5), rms_norm(qkv[:, 1:4].contiguous(), weight, 1e-5))
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "turning"), [(64, 64), (80, 80), (64, 16), (24, 10)])
def test_rotation_equals_float64_and_leaves_the_rest(head_dim: int, turning: int, dtype: torch.dtype) -> None:
    qkv, angles = torch.randn(50, 7, head_dim).to(dtype), torch.rand(50, turning // 2) * 6
    before, half = qkv.clone(), turning // 2
    rotate(qkv[:, :5], angles.cos(), angles.sin())
    cos, sin = angles.cos().double().unsqueeze(1), angles.sin().double().unsqueeze(1)
    first, second = before[:, :5, :half].double(), before[:, :5, half:turning].double()
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    error = (qkv[:, :5, :turning].double() - expected).abs()
    # Where the two products cancel, each has been rounded to float32.
    assert (error <= torch.finfo(dtype).eps / 2 * expected.abs() + 2.0**-21).all()
    assert torch.equal(qkv[:, :5, turning:], before[:, :5, turning:])
    assert torch.equal(qkv[:, 5:], before[:, 5:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "gelu_new", "gelu", "relu"])
def test_gate_equals_float64(activation: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(6, 70) * 4, torch.randn(6, 70)], dim=1)
    x[0, :6] = torch.tensor([0.0, -0.0, 90.0, -90.0, 1e4, -1e4])
    x = x.to(dtype)
    gate, up = x.double().chunk(2, dim=1)
    expected = activate(gate, activation) * up
    # Far below 0 the activations cancel to what float32 leaves of them.
    bound = 1.1 * torch.finfo(dtype).eps * expected.abs() + 1e-6 * (1 + up.abs()) + 3e-6 * gate.abs() * up.abs()
    assert ((gated(x, activation).double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_token_do_not_depend_on_the_others_or_the_threads(dtype: torch.dtype) -> None:
    x, weight, angles = torch.randn(300, 144).to(dtype), torch.randn(144).to(dtype), torch.rand(300, 24)

    def run(rows: slice) -> list[Tensor]:
        heads = x[rows].clone().view(-1, 3, 48)
        rotate(heads, angles[rows].cos(), angles[rows].sin())
        return [rms_norm(x[rows], weight, 1e-6), heads, gated(x[rows], "silu"), gated(x[rows], "gelu_new")]

    alone = [torch.cat(parts) for parts in zip(*(run(slice(i, i + 1)) for i in range(300)), strict=True)]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert all(torch.equal(*pair) for pair in zip(run(slice(None)), alone, strict=True))


def test_bad_input_is_refused_by_name() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    with pytest.raises(ValueError, match="weight must have shape"):
        rms_norm(x, torch.randn(7), 1e-5)
    with pytest.raises(TypeError, match="weight must be"):
        rms_norm(x, weight.bfloat16(), 1e-5)
    with pytest.raises(ValueError, match="addend must be contiguous"):
        rms_norm(x, weight, 1e-5, addend=torch.randn(8, 4).T)
    with pytest.raises(TypeError, match="x must be float32"):
        rms_norm(x.double(), weight, 1e-5)
    heads, angles = torch.randn(4, 2, 8), torch.randn(4, 4)
    with pytest.raises(ValueError, match="up to head_dim / 2"):
        rotate(heads, torch.randn(4, 5), torch.randn(4, 5))
    with pytest.raises(ValueError, match="sin must have shape"):
        rotate(heads, angles, torch.randn(3, 4))
    with pytest.raises(ValueError, match="heads must have dense"):
        rotate(heads.transpose(1, 2), torch.randn(4, 1), torch.randn(4, 1))
    with pytest.raises(ValueError, match="2 \\* dim"):
        gated(torch.randn(4, 7), "silu")
    with pytest.raises(ValueError, match="activation must be one of"):
        activate(x, "swish")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 49152), (40, 330), (2, 1024), (5, 1057), (1, 17), (70, 3000)])
def test_the_best_token_is_the_first_of_the_largest(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # So few values that most are there many times.
    logits = (torch.randint(-9, 9, shape) - 20).to(dtype)
    values, ids = best_tokens(logits)
    expected = logits.double().amax(1)
    assert torch.equal(values.double(), expected)
    assert ids.tolist() == [row.tolist().index(best) for row, best in zip(logits.double(), expected, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_best_token_among_what_is_not_finite(dtype: torch.dtype) -> None:
    inf = float("inf")
    logits = torch.randn(6, 2500).to(dtype)
    logits[0, 2100] = torch.nan
    logits[0, 2400] = inf
    logits[1, 7] = inf
    logits[2] = -inf
    logits[3, 5:] = -inf
    logits[4, :2499] = -inf
    logits[5, 1000] = 90.0
    values, ids = best_tokens(logits)
    assert values[:3].tolist() == [inf, inf, -inf]
    assert ids[:3].tolist() == [2100, 7, 0]
    assert ids[3:].tolist() == [int(logits[3, :5].argmax()), 2499, 1000]
    assert torch.equal(values[3:], logits[[3, 4, 5], ids[3:]].float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 17, 576])
@pytest.mark.parametrize("scale", [1.0, 7.375])
def test_rows_of_a_table_are_taken_as_they_are_or_scaled_and_rounded_once(
    dim: int, dtype: torch.dtype, scale: float,
) -> None:
    table = torch.randn(50, dim).to(dtype)
    index = torch.randint(0, 50, (200,))
    assert torch.equal(take_rows(table, index, scale=scale), (table[index].double() * scale).to(dtype))
    shifted = take_rows(table, index + 3, first=23, partial=True, scale=scale)
    expected = take_rows(table, (index - 20).clamp(min=0), scale=scale)
    expected[index < 20] = 0
    assert torch.equal(shifted, expected)
    assert take_rows(table, index[:0]).shape == (0, dim)


@pytest.mark.parametrize("entry", [-1, 50, 2**40, -(2**63)])
def test_an_index_that_names_no_row_is_refused(entry: int) -> None:
    table, index = torch.randn(50, 4), torch.tensor([3, entry, 7])
    with pytest.raises(ValueError, match=r"index: .*(1 names no row|out of range|names no row)"):
        take_rows(table, index)
    assert take_rows(table, index, partial=True).isfinite().all()
    with pytest.raises(TypeError, match=r"index must be torch\.int64"):
        take_rows(table, index.int())
    with pytest.raises(ValueError, match="table must be contiguous"):
        take_rows(table.T, index)
