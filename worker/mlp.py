"""The MLP of a layer, or the experts in its place: what one rank adds to the sum over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels import PackedLinear, activate, gated, linear


@dataclass(frozen=True, slots=True)
class Mlp:
    """The inner columns that this rank holds."""

    inner: PackedLinear
    """`gated`: those of the gate, then those of up."""
    down: PackedLinear
    activation: str
    """By the name that Transformers gives it."""
    gated: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # x: [num_tokens, hidden_size] -> the same
        inner = linear(x, self.inner)
        return linear(gated(inner, self.activation) if self.gated else activate(inner, self.activation), self.down)


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
