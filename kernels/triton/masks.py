"""What the attention kernels are told besides the cache: constants of the mask that are compiled in, the tensors of far
sinks, and those of a residual."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..mask import FarSinks, Mask


class MaskConstants(NamedTuple):
    """A `Mask` as one compile-time constant; Triton takes tuples there, no dataclasses.

    `rotary`: elements of a far sink's key that are turned back (`FarSinks.cos`); None: they stay.
    """

    window: int | None
    num_sinks: int
    soft_cap: float | None
    rotary: int | None


class FarTensors(NamedTuple):
    """`FarSinks` as one argument: a kernel sees pointers in the tensors' places. `stride`: between query's tokens."""

    query: Tensor
    stride: int
    cos: Tensor | None
    sin: Tensor | None


class ResidualTensors(NamedTuple):
    """One layer of the residual (`Residual`) as one argument. `stride`: elements from one block to the next."""

    key: Tensor
    value: Tensor
    block_tables: Tensor
    stride: int


def bound(mask: Mask, far_sinks: FarSinks | None) -> tuple[MaskConstants, FarTensors | None]:
    """Both as the kernels take them. What means nothing without a window is left out, lest it compile them anew."""
    if mask.window is None:
        return MaskConstants(None, 0, mask.soft_cap, None), None
    if far_sinks is None or mask.num_sinks == 0:
        return MaskConstants(mask.window, mask.num_sinks, mask.soft_cap, None), None
    rotary = None if far_sinks.cos is None else 2 * far_sinks.cos.shape[1]
    far = FarTensors(far_sinks.query, far_sinks.query.stride(0), far_sinks.cos, far_sinks.sin)
    return MaskConstants(mask.window, mask.num_sinks, mask.soft_cap, rotary), far
