"""Weights of one byte or of half a byte per element: how they are made, and how they lie for the native kernels.

Each row of a weight is cut into groups of GROUP elements, the last of them filled up with zeros. The numbers are those
of GGML, so that what a GGUF file holds is taken as it is: int8 are those of its Q8_0, an element reads back as
(code - 128) * scale; int4 those of Q4_1, code * scale + min, with codes from 0 to 15, and so those of Q4_0. Scales and
mins are float16: with them an element takes 8.5 and 5 bits.

`pack` lays a weight out in panels of PANEL rows, one group of columns after another: of every four columns the codes
of each row, four bytes; then the scales of the rows, then their mins. Of int4, four columns and those GROUP / 2 behind
them share their bytes, the first in the low halves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32
PANEL = 32
KINDS = ("int8", "int4")
_INT8_ZERO = 128
_LARGEST_SCALE = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """`[out_features, in_features]`, where groups = ceil(in_features / GROUP)."""

    codes: Tensor
    """`[out_features, groups, GROUP]` uint8."""
    scales: Tensor
    """`[out_features, groups]` float16."""
    mins: Tensor | None
    """The same; None: int8."""
    in_features: int

    @property
    def kind(self) -> str:
        return "int8" if self.mins is None else "int4"

    def dequantized(self) -> Tensor:
        """`[out_features, in_features]` float32, which holds every number exactly but for the last addition."""
        codes, scales = self.codes.float(), self.scales.float().unsqueeze(-1)
        if self.mins is None:
            values = (codes - _INT8_ZERO) * scales
        else:
            values = codes * scales + self.mins.float().unsqueeze(-1)
        return values.flatten(1)[:, : self.in_features]

    @staticmethod
    def cat(weights: list[QuantizedWeight]) -> QuantizedWeight:
        """Rows of weights of one kind and of as many columns, one after another."""
        mins = [weight.mins for weight in weights if weight.mins is not None]
        return QuantizedWeight(torch.cat([weight.codes for weight in weights]),
                               torch.cat([weight.scales for weight in weights]), torch.cat(mins) if mins else None,
                               weights[0].in_features)


def quantize_weight(weight: Tensor, kind: str) -> QuantizedWeight:
    """The nearest codes of `[out_features, in_features]`, floating point; of `kind` "int8" or "int4".

    The scale of a group covers its largest magnitude with 127 codes either side of zero (int8), or its range with 16
    (int4). Raises ValueError for elements that are not finite, or too large for a float16 scale.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    n, k = weight.shape
    groups = F.pad(weight.float(), (0, -k % GROUP)).view(n, -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    # Of a group that is not whole, the zeros behind it are codes like others: int4's range has to hold them.
    scales = torch.maximum(high, -low) / 127 if kind == "int8" else (high - low) / 15
    if not bool((torch.maximum(scales, low.abs() if kind == "int4" else scales) <= _LARGEST_SCALE).all()):
        raise ValueError(f"the weight has elements that {kind} cannot hold: not finite, or beyond float16")
    scales = scales.half()
    divisors = scales.float().where(scales > 0, 1.0).unsqueeze(-1)
    if kind == "int8":
        codes = (groups / divisors).round().clamp(-127, 127) + _INT8_ZERO
        return QuantizedWeight(codes.where(scales.unsqueeze(-1) > 0, _INT8_ZERO).to(torch.uint8), scales, None, k)
    mins = low.half()
    codes = ((groups - mins.float().unsqueeze(-1)) / divisors).round().clamp(0, 15)
    return QuantizedWeight(codes.where(scales.unsqueeze(-1) > 0, 0.0).to(torch.uint8), scales, mins, k)


def quantize_rows(x: Tensor) -> Tensor:
    """Float32 rows `[..., in_features]` as the kernels see them beside codes: of every group the nearest whole
    multiples of its largest magnitude / 127; NaN where the group is not finite."""
    groups = F.pad(x, (0, -x.shape[-1] % GROUP))
    groups = groups.view(*x.shape[:-1], groups.shape[-1] // GROUP, GROUP)
    scales = groups.abs().amax(-1, keepdim=True) / 127
    scales = scales.where(scales >= torch.finfo(torch.float32).tiny, 0.0)
    codes = torch.where(scales > 0, groups * scales.reciprocal(), 0.0).round()
    values = torch.where(groups.isfinite().all(-1, keepdim=True), codes * scales, torch.nan)
    return values.flatten(-2)[..., : x.shape[-1]]


def packed_bytes(out_features: int, in_features: int, kind: str) -> int:
    of_group = GROUP + 2 if kind == "int8" else GROUP // 2 + 4
    return -(-out_features // PANEL) * PANEL * -(-in_features // GROUP) * of_group


def pack(weight: QuantizedWeight, out: Tensor) -> None:
    """Write the panels of `weight` into `out`, `[packed_bytes]` uint8."""
    num_groups = weight.scales.shape[1]
    panels = F.pad(weight.codes, (0, 0, 0, 0, 0, -len(weight.codes) % PANEL))
    # [panels, groups, fours, PANEL, 4]
    codes = panels.view(-1, PANEL, num_groups, GROUP // 4, 4).permute(0, 2, 3, 1, 4)
    parts = [weight.scales]
    if weight.mins is not None:
        low, high = codes.chunk(2, 2)
        codes = low | high << 4
        parts.append(weight.mins)
    rows = out.view(len(codes), num_groups, -1)
    end = codes[0, 0].numel()
    rows[..., :end] = codes.flatten(2)
    for part in parts:
        columns = F.pad(part, (0, 0, 0, -len(part) % PANEL)).view(-1, PANEL, num_groups).transpose(1, 2)
        rows[..., end : end + 2 * PANEL] = columns.contiguous().view(torch.uint8)
        end += 2 * PANEL
