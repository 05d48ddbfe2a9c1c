"""The norms of the residual stream and of heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class Norm:
    """Over the last dimension, in the dtype of the input; `kind` as in `Family.norm`."""

    kind: Literal["rms", "rms_plus_one", "layer"]
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        # The square mean is taken in float32, and the weight applied in the dtype that Transformers applies it in.
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.kind == "rms":
            return self.weight * wide.to(x.dtype)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)
