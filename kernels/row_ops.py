"""What a model does with each token by itself: rows of tables, norms, rotary positions, gated activations, the best of
its logits.

On the native backends a token's bits depend on nothing but its own row, and are rounded where Transformers rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import row_reference
from .backends import backend, native_library
from .checks import DTYPE_NUMBERS, REFERENCE, TRITON, check, check_device, check_dtype, dense, token_stride
from .native.library import NativeBest, NativeGate, NativeNorm, NativeRotation, NativeTake
from .recording import empty, submit

# Of abi.h; what is not among them is left to torch.
_NATIVE_ACTIVATIONS = {"silu": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1}


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False, addend: Tensor | None = None,
             out: Tensor | None = None) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich 2019); the mean is taken in float32.

    Args:
        x: `[num_tokens, dim]` or `[num_tokens, num_heads, dim]`, float32, bfloat16 or float16; tokens may be any stride
            apart, heads and elements are dense.
        weight: `[dim]` of x's dtype.
        plus_one: multiply by `1 + weight`, before rounding to x's dtype (Gemma); otherwise by `weight` after it.
        addend: of x's shape, both contiguous: added to x in place first.
        out: where to write; of x's shape and dtype and laid out as x may be; may be x itself, but not overlap it
            otherwise. Default: new memory, contiguous.

    Returns:
        `out`.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, layout or device.
    """
    name = backend(x.device.type)
    check_dtype("x", x)
    check_device("x", x, name)
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be [num_tokens, dim] or [num_tokens, num_heads, dim], got {list(x.shape)}")
    check("weight", weight, x.dtype, x.shape[-1:], x.device)
    if addend is not None:
        check("addend", addend, x.dtype, x.shape, x.device)
        dense(addend, "addend")
        dense(x, "x")
    if out is not None:
        check("out", out, x.dtype, x.shape, x.device)
    if name in (REFERENCE, TRITON):
        normed = row_reference.rms_norm(x, weight, eps, plus_one, addend)
        return normed if out is None else out.copy_(normed)
    if out is None:
        out = empty(x.shape, x.dtype)
    heads, out_heads = (each if each.dim() == 3 else each.unsqueeze(1) for each in (x, out))
    library = native_library()
    call = NativeNorm(
        x.data_ptr(),
        None if addend is None else addend.data_ptr(),
        dense(weight, "weight").data_ptr(),
        out.data_ptr(),
        *heads.shape,
        token_stride("x", heads),
        token_stride("out", out_heads),
        eps,
        plus_one,
        DTYPE_NUMBERS[x.dtype],
        library.isas[name],
        torch.get_num_threads(),
    )
    submit(library.norm, call)
    return out


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn every head by its token's angles, in float32 and in place: element j with element j + d / 2, for the leading
    d elements (RoPE, Su et al. 2021, in the rotate-half convention of Hugging Face).

    Args:
        heads: `[num_tokens, num_heads, head_dim]`, float32, bfloat16 or float16; tokens may be any stride apart.
        cos, sin: `[num_tokens, d / 2]` float32, contiguous; d at most head_dim.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, layout or device.
    """
    name = backend(heads.device.type)
    check_dtype("heads", heads)
    check_device("heads", heads, name)
    if heads.dim() != 3 or cos.dim() != 2 or 2 * cos.shape[1] > heads.shape[2]:
        raise ValueError(f"heads must be [num_tokens, num_heads, head_dim] and cos [num_tokens, up to head_dim / 2], "
                         f"got {list(heads.shape)} and {list(cos.shape)}")
    shape = (heads.shape[0], cos.shape[1])
    check("cos", cos, torch.float32, shape, heads.device)
    check("sin", sin, torch.float32, shape, heads.device)
    dense(cos, "cos")
    dense(sin, "sin")
    stride = token_stride("heads", heads)
    if name in (REFERENCE, TRITON):
        row_reference.rotate(heads, cos, sin)
        return
    library = native_library()
    call = NativeRotation(
        heads.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        *heads.shape,
        cos.shape[1],
        stride,
        DTYPE_NUMBERS[heads.dtype],
        library.isas[name],
        torch.get_num_threads(),
    )
    submit(library.rotate, call)


def gated(x: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up`, each rounded to x's dtype (GLU variants, Shazeer 2020).

    Args:
        x: `[num_tokens, 2 * dim]`, contiguous, float32, bfloat16 or float16: the gate, then up.
        activation: one of `row_reference.ACTIVATIONS`.

    Returns:
        `[num_tokens, dim]` of x's dtype, contiguous.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, layout or device, or an unknown activation.
    """
    name = backend(x.device.type)
    check_dtype("x", x)
    check_device("x", x, name)
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"x must be [num_tokens, 2 * dim], got {list(x.shape)}")
    dense(x, "x")
    number = _NATIVE_ACTIVATIONS.get(activation)
    if name in (REFERENCE, TRITON) or number is None:
        gate, up = x.chunk(2, dim=-1)
        return activate(gate, activation) * up
    num_tokens, dim = x.shape[0], x.shape[1] // 2
    out, library = empty((num_tokens, dim), x.dtype), native_library()
    call = NativeGate(
        x.data_ptr(),
        out.data_ptr(),
        num_tokens,
        dim,
        number,
        DTYPE_NUMBERS[x.dtype],
        library.isas[name],
        torch.get_num_threads(),
    )
    submit(library.gate, call)
    return out


def activate(x: Tensor, activation: str) -> Tensor:
    """`activation` (as in `gated`) of every element. Raises `ValueError` for an unknown one."""
    if activation not in row_reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(row_reference.ACTIVATIONS)}, got {activation!r}")
    return row_reference.ACTIVATIONS[activation](x)


def best_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the largest logit and its token, the lowest of equals.

    Args:
        logits: `[num_rows, num_tokens]` float32, bfloat16 or float16, at least one token; rows may be any stride apart.

    Returns:
        `[num_rows]` float32 and `[num_rows]` int64. A row that holds NaN has +inf, and the first token that is NaN.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, layout or device.
    """
    name = backend(logits.device.type)
    check_dtype("logits", logits)
    check_device("logits", logits, name)
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits must be [num_rows, num_tokens], at least one token, got {list(logits.shape)}")
    if logits.stride(1) != 1 and logits.numel():
        raise ValueError(f"logits must have dense rows, got strides {logits.stride()}")
    if name in (REFERENCE, TRITON):
        return row_reference.best_tokens(logits)
    shape, library = logits.shape[:1], native_library()
    values, ids = empty(shape, torch.float32), empty(shape, torch.int64)
    call = NativeBest(
        logits.data_ptr(),
        values.data_ptr(),
        ids.data_ptr(),
        *logits.shape,
        logits.stride(0),
        DTYPE_NUMBERS[logits.dtype],
        library.isas[name],
        torch.get_num_threads(),
    )
    submit(library.best, call)
    return values, ids


def take_rows(table: Tensor, index: Tensor, *, first: int = 0, partial: bool = False, scale: float = 1.0) -> Tensor:
    """Row `index[t] - first` of the table, times `scale`, for every t: embeddings, rotary angles, rows to sample from.

    Args:
        table: `[num_rows, dim]`, contiguous, float32, bfloat16 or float16.
        index: `[num_tokens]` int64, contiguous.
        partial: an index may name no row of the table, where another rank has it: it gets zeros.
        scale: a number of the table's dtype, as the rounded product is.

    Returns:
        `[num_tokens, dim]` of the table's dtype, contiguous.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, layout or device, or an index that names no row where all must; on a GPU that is
            an error of the device.
    """
    name = backend(table.device.type)
    check_dtype("table", table)
    check_device("table", table, name)
    if table.dim() != 2:
        raise ValueError(f"table must be [num_rows, dim], got {list(table.shape)}")
    check("index", index, torch.int64, (index.numel(),), table.device)
    dense(table, "table")
    dense(index, "index")
    if name in (REFERENCE, TRITON):
        return row_reference.take_rows(table, index, first, partial, scale)
    out, library = empty((index.numel(), table.shape[1]), table.dtype), native_library()
    call = NativeTake(
        table.data_ptr(),
        index.data_ptr(),
        out.data_ptr(),
        index.numel(),
        *table.shape,
        first,
        scale,
        partial,
        DTYPE_NUMBERS[table.dtype],
        library.isas[name],
        torch.get_num_threads(),
    )
    submit(library.take, call)
    return out
