"""Rows drawn from the whole vocabulary: ranks exchange the mass of their slices, and the owner of the draw picks.

Tokens stand in the order of their ids; the draw is the first one at which the cumulative mass passes `uniform * total`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from .blocks import take_blocks, take_rows
from .gather import Gather
from .weights import exponents, targets_below


def draw_open(
    comm: Gather,
    logits: torch.Tensor,
    vocab_start: int,
    weights: torch.Tensor,
    masses: NDArray[np.float64],
    maxima: NDArray[np.float64],
    scales: NDArray[np.float64],
    uniforms: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Token ids `[R]`. One collective.

    `weights`: this rank's `block_weights`; `masses`: their sums on every rank; `maxima`: the logits, one per rank and
    row, that they are relative to.
    """
    # logits: [R, V]; weights: [R, num_blocks]; masses, maxima: [world_size, R]; scales, uniforms: [R]
    best = maxima.max(axis=0)
    # A slice without a finite logit has mass 0 and maximum -inf.
    factors = np.exp2((maxima - best) * scales)
    ends = np.cumsum(masses * factors, axis=0)
    targets = targets_below(uniforms, ends[-1])
    # [R]: the first rank whose end passes the target
    owners = (ends <= targets).sum(axis=0)

    mine = np.flatnonzero(owners == comm.rank)
    picks = torch.zeros(len(uniforms), dtype=torch.int64)
    if len(mine):
        start = ends[comm.rank - 1, mine] if comm.rank else np.zeros(len(mine))
        rest = (targets[mine] - start) / factors[comm.rank, mine]
        device = logits.device
        columns = _pick(take_rows(logits, mine), take_rows(weights, mine), torch.from_numpy(rest).to(device),
                        torch.from_numpy(maxima[comm.rank, mine]).float().to(device),
                        torch.from_numpy(scales[mine]).float().to(device))
        picks[torch.from_numpy(mine)] = columns.cpu() + vocab_start
    gathered = comm.all_gather_rows(picks.to(logits.device)).cpu().numpy()
    chosen: NDArray[np.int64] = gathered[owners, np.arange(len(uniforms))]
    return chosen


def _pick(
    logits: torch.Tensor, weights: torch.Tensor, targets: torch.Tensor, maxima: torch.Tensor, scales: torch.Tensor,
) -> torch.Tensor:
    # logits: [R, V]; weights: [R, num_blocks] float64; targets: [R] float64; maxima, scales: [R] -> columns [R]
    block, start = _passing(weights, targets)
    values, columns = take_blocks(logits, block)
    within = exponents(values, maxima, scales).exp2_().double()
    place, _ = _passing(within, targets - start)
    return columns.gather(1, place).squeeze(1)


def _passing(weights: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First place `[R, 1]` of positive weight where the cumulative weight passes the target, and the sum before it."""
    # weights: [R, N] float64; targets: [R] float64
    ends = weights.cumsum(1)
    # A target that rounding put past the end takes the last token that has any weight.
    last = (ends < ends[:, -1:]).sum(1, keepdim=True)
    place = torch.minimum((ends <= targets.unsqueeze(1)).sum(1, keepdim=True), last)
    return place, (ends - weights).gather(1, place).squeeze(1)

