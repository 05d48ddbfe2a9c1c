"""The ops of `row_ops.py` in plain torch, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_new": _gelu_tanh, "gelu_pytorch_tanh": _gelu_tanh}
"""By the names that Transformers gives them."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool, addend: Tensor | None) -> Tensor:
    if addend is not None:
        x.add_(addend)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    # The weight is applied in the dtype that Transformers applies it in.
    return (wide * (1.0 + weight.float())).to(x.dtype) if plus_one else weight * wide.to(x.dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    turning = heads[..., :2 * cos.shape[-1]]
    first, second = turning.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turning.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


def take_rows(table: Tensor, index: Tensor, first: int, partial: bool, scale: float) -> Tensor:
    local = index - first
    if partial:
        elsewhere = (local < 0) | (local >= len(table))
        rows = F.embedding(local.masked_fill(elsewhere, 0), table).masked_fill_(elsewhere.unsqueeze(1), 0)
    else:
        try:
            rows = F.embedding(local, table)
        except IndexError as error:
            raise ValueError(f"index: an entry names no row of the table: {error}") from error
    return rows if scale == 1.0 else rows * scale


def best_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    # argmax puts NaN above everything, and the first of equals first.
    ids = logits.float().argmax(1)
    values = logits.gather(1, ids[:, None])[:, 0].float()
    return values.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf")), ids
