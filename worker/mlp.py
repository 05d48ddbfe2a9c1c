"""The MLP of a layer, or the experts in its place: what one rank adds to the sum over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..kernels import PackedLinear, linear


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_new": _gelu_tanh, "gelu_pytorch_tanh": _gelu_tanh}


@dataclass(frozen=True, slots=True)
class Mlp:
    """The inner columns that this rank holds."""

    inner: PackedLinear
    """`gated`: those of the gate, then those of up."""
    down: PackedLinear
    activation: Callable[[torch.Tensor], torch.Tensor]
    gated: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # x: [num_tokens, hidden_size] -> the same
        inner = linear(x, self.inner)
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            return linear(self.activation(gate) * up, self.down)
        return linear(self.activation(inner), self.down)


@dataclass(frozen=True, slots=True)
class Experts:
    """A token goes to the few experts that its router likes best. Every rank holds a slice of every expert, and all
    of them choose alike, since all see the same tokens."""

    router: PackedLinear
    experts: list[Mlp]
    num_per_token: int
    normalize: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # x: [num_tokens, hidden_size] -> the same
        weights, chosen = linear(x, self.router).float().softmax(-1).topk(self.num_per_token, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        # In the order of the experts: what a token adds up does not depend on the batch.
        for expert in sorted(set(chosen.flatten().tolist())):
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            part = self.experts[expert](x[tokens]) * weights[tokens, places, None]
            out.index_add_(0, tokens, part.to(x.dtype))
        return out
