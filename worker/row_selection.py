"""Which rows of a KV cache stay, by the attention that they received: the policies of KV sparsity."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..protos.sparsity import KVSparsity

SNAPKV_KERNEL = 7
"""Rows over which SnapKV takes the largest score, so that what stands around a row that matters stays with it: max
pooling, as in the experiments of Li et al. 2024."""


def select(spec: KVSparsity, scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """The rows that stay, in ascending order: `[..., num_kept]` int32. Of equal scores the earlier row stays.

    Args:
        scores: `[..., num_rows]` float32, what each row received: from all queries so far (h2o), from the last
            `spec.window` (snapkv), from the last (tova).
        num_kept: at most num_rows; with snapkv at least `spec.window`.

    Raises:
        ValueError: num_kept is out of range.
    """
    num_rows = scores.shape[-1]
    num_latest = {"h2o": num_kept // 2, "snapkv": spec.window, "tova": 0}[spec.policy]
    if not num_latest <= num_kept <= num_rows:
        raise ValueError(f"{spec.policy} cannot keep {num_kept} of {num_rows} rows, the last {num_latest} among them")
    earlier = scores[..., : num_rows - num_latest]
    if spec.policy == "snapkv" and earlier.shape[-1]:
        flat = earlier.reshape(-1, 1, earlier.shape[-1])
        earlier = F.max_pool1d(flat, SNAPKV_KERNEL, stride=1, padding=SNAPKV_KERNEL // 2).view(earlier.shape)
    best = earlier.sort(dim=-1, descending=True, stable=True).indices[..., : num_kept - num_latest].sort(dim=-1).values
    latest = torch.arange(num_rows - num_latest, num_rows, device=scores.device)
    return torch.cat((best, latest.expand(*scores.shape[:-1], num_latest)), dim=-1).int()
