"""One int64 per candidate token, ordered as candidates are: higher logit first, lower id first among equals.

Comparing keys settles ties alike on every rank and at any tp_size, and a key is all that ranks have to exchange.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

PAD = -(2**63)
"""Below every key: no token."""
_LOW = 0xFFFFFFFF


def encode(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Float32 logits (none of them NaN) and int64 ids below 2**32, of one shape, to int64 keys."""
    # Adding 0 makes -0.0 the same key as 0.0, as the two are the same logit.
    bits = (logits + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.long().bitwise_left_shift_(32).add_(_LOW).sub_(token_ids)


def token_ids_of(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    return _LOW - (keys & _LOW)


def logits_of(keys: NDArray[np.int64]) -> NDArray[np.float64]:
    """The float32 logits in `keys`, exactly, as float64; -inf for PAD."""
    ordered = (keys >> 32).astype(np.int32)
    bits = ordered ^ ((ordered >> 31) & np.int32(0x7FFFFFFF))
    return np.where(keys == PAD, -np.inf, bits.view(np.float32))


def sorted_keys(gathered: NDArray[np.int64]) -> NDArray[np.int64]:
    """Keys of every rank `[world_size, R, N]` to `[R, world_size * N]`, best first."""
    # [R, world_size * N]
    rows = gathered.transpose(1, 0, 2).reshape(gathered.shape[1], -1)
    return np.sort(rows, axis=1)[:, ::-1]
