"""linear against float64, and the independence of a row from the other rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvarto.kernels import linear, pack_linear

FLOAT32_UNIT = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(96, 64), (1, 1), (31, 7), (33, 300), (160, 576), (65, 129), (40, 1100)]  # (out_features, in_features)


def assert_close_to_float64(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Within what a float32 sum over in_features and one rounding to x's dtype may cost."""
    offset = torch.zeros(len(weight)).double() if bias is None else bias.double()
    expected = x.double() @ weight.double().T + offset
    magnitude = x.double().abs() @ weight.double().abs().T + offset.abs()
    summed = (weight.shape[1] + 1) * FLOAT32_UNIT * magnitude
    bound = summed + torch.finfo(x.dtype).eps / 2 * (expected.abs() + summed) + torch.finfo(x.dtype).smallest_normal
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_float64(backend: str, n: int, k: int, with_bias: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(n, k).to(dtype)
    bias = torch.randn(n).to(dtype) if with_bias else None
    packed = pack_linear(weight, bias)
    assert (packed.out_features, packed.in_features, packed.kind, packed.backend) == (n, k, dtype, backend)
    for num_rows in (0, 1, 2, 3, 4, 7, 17, 50, 200):
        x = torch.randn(num_rows, k).to(dtype)
        out = linear(x, packed)
        assert out.dtype == dtype
        assert out.shape == (num_rows, n)
        assert_close_to_float64(x, weight, bias, out)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("num_rows", [5, 40])
@pytest.mark.parametrize("k", [64, 129])
def test_float32_rows_may_meet_a_16_bit_weight(k: int, num_rows: int) -> None:
    weight, x = torch.randn(50, k).bfloat16(), torch.randn(num_rows, k)
    out = linear(x, pack_linear(weight))
    assert out.dtype == torch.float32
    assert_close_to_float64(x, weight, None, out)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_and_weights_are_read_in_place(dtype: torch.dtype) -> None:
    weight, x = torch.randn(40, 100).to(dtype)[:, 10:74], torch.randn(6, 91).to(dtype)[:, 21:85]
    assert_close_to_float64(x, weight, None, linear(x, pack_linear(weight)))
    columns = torch.randn(64, 40).to(dtype).T
    assert_close_to_float64(x, columns, None, linear(x, pack_linear(columns)))


@pytest.mark.usefixtures("native_backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(160, 576), (33, 300), (33, 1100), (33, 129)])
def test_bits_of_a_row_do_not_depend_on_the_others_or_the_threads(n: int, k: int, dtype: torch.dtype) -> None:
    packed = pack_linear(torch.randn(n, k).to(dtype), torch.randn(n))
    x = torch.randn(401, k).to(dtype)
    alone = torch.cat([linear(x[row : row + 1], packed) for row in range(len(x))])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for num_rows in (1, 2, 3, 5, 16, 17, 64, 401):
            assert torch.equal(linear(x[:num_rows], packed), alone[:num_rows])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [4096, 4097])
def test_outputs_larger_than_the_caches(n: int, dtype: torch.dtype) -> None:
    """17 or 34 MB: whole lines are written past the caches, and memory of more than 32 MiB is fresh."""
    weight, bias, x = torch.randn(n, 6).to(dtype), torch.randn(n), torch.randn(2100, 6).to(dtype)
    assert_close_to_float64(x, weight, bias, linear(x, pack_linear(weight, bias)))


@pytest.mark.usefixtures("backend")
def test_infinity_and_nan_reach_only_their_own_row() -> None:
    packed = pack_linear(torch.randn(40, 64).bfloat16())
    x = torch.randn(20, 64).bfloat16()
    expected = linear(x, packed)
    x[3, 5], x[7, 0] = torch.nan, torch.inf
    out = linear(x, packed)
    assert out[3].isnan().all()
    assert not out[7].isfinite().any()
    others = [row for row in range(20) if row not in (3, 7)]
    assert torch.allclose(out[others], expected[others])


def test_packed_weight_keeps_its_backend(native_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = pack_linear(torch.randn(33, 64).bfloat16()), torch.randn(2, 64).bfloat16()
    expected = linear(x, packed)
    monkeypatch.setenv("KVARTO_KERNELS", "reference")
    assert packed.backend == native_backend
    assert torch.equal(linear(x, packed), expected)


@pytest.mark.usefixtures("backend")
def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="weight must be"):
        pack_linear(torch.zeros(3))
    with pytest.raises(ValueError, match="weight must be"):
        pack_linear(torch.zeros(3, 0))
    with pytest.raises(TypeError, match="weight must be float32"):
        pack_linear(torch.zeros(3, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="bias must have shape"):
        pack_linear(torch.zeros(3, 4), torch.zeros(4))
    with pytest.raises(TypeError, match="bias must be floating"):
        pack_linear(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    packed = pack_linear(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="x must be"):
        linear(torch.zeros(2, 5), packed)
    with pytest.raises(TypeError, match="x must be float32"):
        linear(torch.zeros(2, 4, dtype=torch.float64), packed)
    with pytest.raises(ValueError, match="x is on meta"):
        linear(torch.zeros(2, 4, device="meta"), packed)
