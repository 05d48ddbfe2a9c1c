"""linear with weights of int8 and int4: against float64, the independence of rows, and what cannot be held."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize as ggml_quantize
from torch import Tensor

from kvarto.kernels import linear, pack_linear, quantize_weight
from kvarto.kernels.quantized_weight import GROUP, QuantizedWeight, quantize_rows

FLOAT32_UNIT = 2.0**-24
KINDS = ["int8", "int4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(96, 64), (1, 1), (31, 7), (33, 300), (160, 576), (65, 129), (40, 1120), (32, 4096)]


def assert_close_to_float64(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, out: Tensor) -> None:
    """Within what summing the groups in float32 and one rounding to x's dtype may cost: the products of a group are
    exact, both scales are multiplied before them, and an int4 group is added in two parts."""
    rows, values = quantize_rows(x.float()).double(), weight.dequantized().double()
    offset = torch.zeros(len(values)).double() if bias is None else bias.double()
    expected = rows @ values.T + offset
    # With its code and its min apart, as they are summed.
    apart = values.abs()
    if weight.mins is not None:
        mins = weight.mins.double().abs().unsqueeze(-1)
        apart = (weight.codes.double() * weight.scales.double().unsqueeze(-1) + mins).flatten(1)[:, : values.shape[1]]
    magnitude = rows.abs() @ apart.T + offset.abs()
    num_sums = 2 * weight.scales.shape[1] + 4
    summed = num_sums * FLOAT32_UNIT * magnitude
    bound = summed + torch.finfo(x.dtype).eps / 2 * (expected.abs() + summed) + torch.finfo(x.dtype).smallest_normal
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_float64(backend: str, n: int, k: int, with_bias: bool, kind: str, dtype: torch.dtype) -> None:
    weight, bias = quantize_weight(torch.randn(n, k), kind), torch.randn(n).to(dtype) if with_bias else None
    packed = pack_linear(weight, bias)
    assert (packed.out_features, packed.in_features, packed.kind, packed.backend) == (n, k, kind, backend)
    for num_rows in (0, 1, 2, 3, 12, 13, 23, 24, 50, 200):
        x = torch.randn(num_rows, k).to(dtype)
        out = linear(x, packed)
        assert out.dtype == dtype
        assert out.shape == (num_rows, n)
        assert_close_to_float64(x, weight, bias, out)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_codes_do_not_overflow(kind: str) -> None:
    """Every product of a group at its largest, with either sign: sums of a group have to be wider than 16 bits."""
    values = torch.ones(32, 64)
    values[:, ::2] = -1.0 if kind == "int4" else 1.0
    weight = quantize_weight(values, kind)
    for x in (torch.ones(3, 64), -torch.ones(3, 64), torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0).expand(3, 64)):
        assert_close_to_float64(x, weight, None, linear(x, pack_linear(weight)))


@pytest.mark.usefixtures("native_backend")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(160, 576), (33, 300), (33, 1120)])
def test_bits_of_a_row_do_not_depend_on_the_others_or_the_threads(n: int, k: int, kind: str) -> None:
    packed = pack_linear(quantize_weight(torch.randn(n, k), kind), torch.randn(n))
    x = torch.randn(401, k).bfloat16()
    alone = torch.cat([linear(x[row : row + 1], packed) for row in range(len(x))])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for num_rows in (1, 2, 3, 5, 12, 13, 24, 25, 64, 401):
            assert torch.equal(linear(x[:num_rows], packed), alone[:num_rows])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
def test_strided_rows_are_read_in_place(kind: str) -> None:
    weight, x = quantize_weight(torch.randn(40, 64), kind), torch.randn(6, 91).bfloat16()[:, 21:85]
    assert_close_to_float64(x, weight, None, linear(x, pack_linear(weight)))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_finite_give_nan_and_spoil_no_other(kind: str) -> None:
    packed, x = pack_linear(quantize_weight(torch.randn(40, 64), kind)), torch.randn(20, 64).bfloat16()
    expected = linear(x, packed)
    x[3, 5], x[7, 0], x[9, 63] = torch.nan, torch.inf, -torch.inf
    out = linear(x, packed)
    spoilt = [3, 7, 9]
    assert out[spoilt].isnan().all()
    others = [row for row in range(20) if row not in spoilt]
    assert torch.equal(out[others], expected[others])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_of_denormals_give_the_bias(kind: str) -> None:
    bias = torch.randn(40)
    packed, x = pack_linear(quantize_weight(torch.randn(40, 64), kind), bias), torch.zeros(2, 64)
    x[1, 3] = 2.0**-140
    assert torch.equal(linear(x, packed), bias.expand(2, 40))


@pytest.mark.parametrize("kind", KINDS)
def test_an_element_is_off_by_half_a_step_at_most(kind: str) -> None:
    """And by what rounding its scale and min to float16 costs."""
    values = torch.randn(64, 320) * torch.logspace(-2, 2, 320)
    groups = values.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    unit = 2.0**-11
    if kind == "int8":
        bound = groups.abs().amax(-1, keepdim=True) / 127 / 2 * (1 + 256 * unit)
    else:
        bound = (high - low) / 15 * (0.5 + 16 * unit) + low.abs() * unit
    error = (quantize_weight(values, kind).dequantized() - values).abs().unflatten(1, (-1, GROUP))
    assert (error <= bound).all()


@pytest.mark.parametrize(("kind", "stored"), [("int8", GGMLQuantizationType.Q8_0), ("int4", GGMLQuantizationType.Q4_1)])
def test_codes_are_those_of_ggml(kind: str, stored: GGMLQuantizationType) -> None:
    """Of the peer's own quantizer, which keeps the scale that divides in float32: a code may then be the next one."""
    values = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    blocks = ggml_quantize(values, stored).reshape(64, 8, -1)
    ours = quantize_weight(torch.from_numpy(values), kind)
    packed = blocks[..., 4:]
    codes = blocks[..., 2:] ^ 0x80 if kind == "int8" else np.concatenate((packed & 15, packed >> 4), -1)
    assert np.array_equal(blocks[..., :2].copy().view(np.float16)[..., 0], ours.scales.numpy())
    difference = np.abs(codes.astype(int) - ours.codes.numpy().astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_held_is_refused(kind: str) -> None:
    for element in (torch.nan, torch.inf, 1e9):
        weight = torch.randn(4, 64)
        weight[2, 40] = element
        with pytest.raises(ValueError, match=f"elements that {kind} cannot hold"):
            quantize_weight(weight, kind)
    with pytest.raises(ValueError, match="kind must be one of int8, int4"):
        quantize_weight(torch.zeros(4, 64), "int3")


@pytest.mark.usefixtures("backend")
def test_bad_input_is_refused_by_name() -> None:
    weight = quantize_weight(torch.zeros(3, 4), "int8")
    with pytest.raises(ValueError, match="bias must have shape"):
        pack_linear(weight, torch.zeros(4))
    packed = pack_linear(weight)
    with pytest.raises(ValueError, match="x must be"):
        linear(torch.zeros(2, 5), packed)
    with pytest.raises(TypeError, match="x must be float32"):
        linear(torch.zeros(2, 4, dtype=torch.float64), packed)


def test_triton_refuses_quantized_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARTO_KERNELS", "triton")
    with pytest.raises(ValueError, match="on CPUs only"):
        pack_linear(quantize_weight(torch.zeros(3, 4), "int4"))
