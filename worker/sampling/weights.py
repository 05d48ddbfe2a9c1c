"""Weights: probabilities not normalised, 2 ** ((logit - maximum) * log2(e) / temperature), of which the best is 1."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from .blocks import block_sums, row_chunks


def exponents(logits: torch.Tensor, maxima: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`(logits - maxima) * scales` for `[R, V]`, `[R]` and `[R]` float32. A maximum of -inf gives -inf, not NaN."""
    finite = maxima.masked_fill(maxima == float("-inf"), 0.0)
    return (logits - finite.unsqueeze(1)).mul_(scales.unsqueeze(1))


def block_weights(logits: torch.Tensor, maxima: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Weight of each block of tokens, `[R, num_blocks]` float64, relative to the best token of this slice."""
    # logits: [R, V]; maxima, scales: [R] float32
    sums = [block_sums(exponents(logits[rows], maxima[rows], scales[rows]).exp2_())
            for rows in row_chunks(*logits.shape)]
    # Beyond a block, float32 sums would depend on how the vocabulary is cut.
    return torch.cat(sums).double()


def targets_below(uniforms: NDArray[np.float64], totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """`uniforms * totals`, which rounding must not make equal to the total: no cumulative weight passes that."""
    return np.minimum(uniforms * totals, np.nextafter(totals, 0.0))
