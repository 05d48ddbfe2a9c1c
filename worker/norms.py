"""The norms of the residual stream and of heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from ..kernels import rms_norm


@dataclass(frozen=True, slots=True)
class Norm:
    """Over the last dimension, in the dtype of the input; `kind` as in `Family.norm`."""

    kind: Literal["rms", "rms_plus_one", "layer"]
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float

    def __call__(self, x: torch.Tensor, addend: torch.Tensor | None = None, *, out: torch.Tensor | None = None,
                 ) -> torch.Tensor:
        """`addend`: added to `x` in place first; both contiguous then. `out`: where to write; may be `x`."""
        if self.kind != "layer":
            return rms_norm(x, self.weight, self.eps, plus_one=self.kind == "rms_plus_one", addend=addend, out=out)
        if addend is not None:
            x.add_(addend)
        normed = F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return normed if out is None else out.copy_(normed)
