"""Linear layers: weights packed for a backend, and the multiplication by them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import quantized_weight, reference
from .backends import backend, native_library
from .checks import DTYPE_NUMBERS, REFERENCE, TRITON, check, check_device, check_dtype
from .huge_pages import advise_huge_pages
from .native.library import NativeLinear
from .packed_memory import PackedMemory
from .quantized_weight import QuantizedWeight
from .recording import empty, submit

# Memory of so many bytes malloc always takes from the system and gives back.
_FRESH_BYTES = 32 * 2**20

_packed_memory = PackedMemory()

# The numbers of abi.h.
_WEIGHT_NUMBERS: dict[torch.dtype | str, int] = {"int8": 8, "int4": 9} | DTYPE_NUMBERS


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight in the order in which the backend that packed it reads it; made by `pack_linear`.

    It keeps its backend whatever KVARTO_KERNELS says later, and no reference to the original weight, except
    that `torch-reference` and `triton` hold the weight itself, `torch-reference` a quantized one as the float32
    that it stands for.
    """

    data: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int
    backend: str
    kind: torch.dtype | str
    """The weight's dtype, or "int8" or "int4" of a quantized one."""

    @property
    def quantized(self) -> bool:
        return isinstance(self.kind, str)


def pack_linear(weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> PackedLinear:
    """Copy a weight into the layout of the current backend; its dtype, hence its size, stays (rows padded to 32).

    On the native backends weights lie in chunks of memory, each of which is freed with the last weight in it.

    Args:
        weight: `[out_features, in_features]` float32, bfloat16 or float16; rows may be any stride apart. Or one from
            `quantize_weight`, on a CPU.
        bias: `[out_features]` of any floating dtype, kept as float32.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, layout or device.
    """
    if isinstance(weight, QuantizedWeight):
        return _pack_quantized(weight, bias)
    name = backend(weight.device.type)
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight must be [out_features, in_features > 0], got {list(weight.shape)}")
    n, k = weight.shape
    check_dtype("weight", weight)
    check_device("weight", weight, name)
    bias = _checked_bias(bias, n, weight.device)
    weight = weight.detach()
    if name in (REFERENCE, TRITON):
        return PackedLinear(weight, bias, n, k, name, weight.dtype)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    library = native_library()
    packed = _packed_memory.empty(library.packed_elements(n, k), weight.dtype)
    dtype_number, isa = DTYPE_NUMBERS[weight.dtype], library.isas[name]
    library.pack_linear(weight.data_ptr(), n, k, weight.stride(0), dtype_number, isa, packed.data_ptr())
    return PackedLinear(packed, bias, n, k, name, weight.dtype)


def _pack_quantized(weight: QuantizedWeight, bias: Tensor | None) -> PackedLinear:
    name = backend(weight.codes.device.type)
    if name == TRITON or weight.codes.device.type != "cpu":
        raise ValueError(f"quantized weights are multiplied on CPUs only, by other kernels than {name}")
    n, k = len(weight.codes), weight.in_features
    bias = _checked_bias(bias, n, weight.codes.device)
    if name == REFERENCE:
        return PackedLinear(weight.dequantized(), bias, n, k, name, weight.kind)
    packed = _packed_memory.empty(quantized_weight.packed_bytes(n, k, weight.kind), torch.uint8)
    quantized_weight.pack(weight, packed)
    return PackedLinear(packed, bias, n, k, name, weight.kind)


def _checked_bias(bias: Tensor | None, out_features: int, device: torch.device) -> Tensor | None:
    if bias is None:
        return None
    if not bias.is_floating_point():
        raise TypeError(f"bias must be floating point, got {bias.dtype}")
    check("bias", bias, bias.dtype, (out_features,), device)
    return bias.detach().float().contiguous()


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """`x @ weight.T + bias`, accumulated in float32.

    On the native backends every element is summed over in_features in order: the bits of a row do not depend on
    the other rows nor on the number of threads. Where AVX512-BF16 multiplies bfloat16 by bfloat16, products are
    added in pairs, and denormals count as zero.

    A quantized weight meets x quantized too (`quantize_rows`): the products of a group of columns are summed as
    integers, exactly, and the groups in order in float32. A row that is not finite gives NaN throughout.

    Args:
        x: `[num_rows, in_features]` float32, bfloat16 or float16, not necessarily the weight's dtype; rows may be
            any stride apart.

    Returns:
        `[num_rows, out_features]` of x's dtype, contiguous.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, layout or device.
    """
    if x.dim() != 2 or x.shape[1] != packed.in_features:
        raise ValueError(f"x must be [num_rows, {packed.in_features}], got {list(x.shape)}")
    check_dtype("x", x)
    if x.device != packed.data.device:
        raise ValueError(f"x is on {x.device}, the weight on {packed.data.device}")
    if packed.backend == REFERENCE:
        if packed.quantized:
            return reference.linear(quantized_weight.quantize_rows(x.float()), packed.data, packed.bias).to(x.dtype)
        return reference.linear(x, packed.data, packed.bias)
    if packed.backend == TRITON:  # the vendor's matrix multiplication, through torch
        bias = None if packed.bias is None else packed.bias.to(x.dtype)
        return torch.nn.functional.linear(x, packed.data.to(x.dtype), bias)
    if x.stride(1) != 1 and x.numel() > 0:
        raise ValueError(f"x must have dense rows, got strides {x.stride()}")
    library = native_library()
    out = empty((x.shape[0], packed.out_features), x.dtype)
    if out.nbytes > _FRESH_BYTES:  # else each small page of the logits of many rows would be a page fault
        advise_huge_pages(out.data_ptr(), out.nbytes)
    call = NativeLinear(
        x.data_ptr(),
        packed.data.data_ptr(),
        None if packed.bias is None else packed.bias.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        packed.out_features,
        packed.in_features,
        x.stride(0),
        DTYPE_NUMBERS[x.dtype],
        _WEIGHT_NUMBERS[packed.kind],
        library.isas[packed.backend],
        torch.get_num_threads(),
    )
    submit(library.linear, call)
    return out
