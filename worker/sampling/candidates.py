"""Rows cut by top-k, top-p or min-p, settled from the best few tokens of every rank wherever those decide the draw.

Tokens stand in the order of their keys, best first, so that whatever truncation leaves is a beginning of that order.
The draw is the first token at which the cumulative weight passes `uniform * kept mass`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import keys
from .weights import targets_below

CANDIDATES = 128
"""Tokens that a rank offers for a truncated row. Fixed, so that a row's way does not depend on its batch."""


def draw_from_candidates(
    gathered: NDArray[np.int64],
    masses: NDArray[np.float64],
    weighed: NDArray[np.bool_],
    scales: NDArray[np.float64],
    top_k: NDArray[np.int64],
    top_p: NDArray[np.float64],
    min_p: NDArray[np.float64],
    uniforms: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Token ids `[R]`, and which of them are settled; an id that is not is meaningless.

    `gathered` `[world_size, R, N]`: keys. `masses` `[R]`: weight of the whole vocabulary relative to the best token,
    of the rows that are `weighed`. Top-k keeps all tokens that equal the k-th, as vLLM does.
    """
    ranked = keys.sorted_keys(gathered)
    rows = np.arange(len(ranked))
    # Down to the best of the ranks' last offers nothing is missing, and a rank that padded has offered all it has.
    bounds = gathered.min(axis=2).max(axis=0)
    whole = bounds == keys.PAD
    known = ((ranked >= bounds[:, None]) & (ranked != keys.PAD)).sum(axis=1)

    # [R, world_size * N], 0 beyond what is known
    logits = keys.logits_of(ranked)
    weights = np.exp2((logits - logits[:, :1]) * scales[:, None])
    weights[np.arange(weights.shape[1]) >= known[:, None]] = 0.0
    ends = np.cumsum(weights, axis=1)

    kept = np.minimum(_kept_by_min_p(weights, known, whole, min_p), _kept_by_top_k(logits, known, whole, top_k))
    bounded = kept < _UNKNOWN
    totals = np.where(bounded, ends[rows, np.minimum(kept, known) - 1], masses)

    # The nucleus: tokens before which less than top_p of the total lies.
    goals = top_p * totals
    nucleus = np.minimum(((ends - weights < goals[:, None]) & (weights > 0.0)).sum(axis=1), kept)
    reached = bounded | (ends[rows, known - 1] >= goals)
    exact = np.minimum(ends[rows, np.minimum(nucleus, known) - 1], totals)
    # Where the nucleus ends is unknown, its mass is not: within one weight, no larger than the last known, of the goal.
    lowest = np.where(reached, exact, goals)
    highest = np.where(reached, exact, np.minimum(goals + weights[rows, known - 1], totals))
    first = _passing(ends, targets_below(uniforms, lowest))
    last = _passing(ends, targets_below(uniforms, highest))
    limit = np.where(reached, np.minimum(nucleus, known), known + 1)
    places = np.minimum(last, limit - 1)
    settled = (bounded | weighed) & (np.minimum(first, limit - 1) == places) & (places < known)
    return keys.token_ids_of(ranked[rows, np.minimum(places, known - 1)]), settled


_UNKNOWN = np.iinfo(np.int64).max


def _kept_by_min_p(
    weights: NDArray[np.float64], known: NDArray[np.int64], whole: NDArray[np.bool_], min_p: NDArray[np.float64],
) -> NDArray[np.int64]:
    kept = (weights >= min_p[:, None]).sum(axis=1)
    # Without min_p all are kept: nothing to bound.
    return np.where((min_p > 0.0) & (whole | (kept < known)), kept, _UNKNOWN)


def _kept_by_top_k(
    logits: NDArray[np.float64], known: NDArray[np.int64], whole: NDArray[np.bool_], top_k: NDArray[np.int64],
) -> NDArray[np.int64]:
    last = np.minimum(top_k, known) - 1
    rows = np.arange(len(logits))
    kth = logits[rows, last]
    kept = np.minimum((logits >= kth[:, None]).sum(axis=1), known)
    decided = whole | ((top_k <= known) & (logits[rows, known - 1] < kth))
    return np.where(decided, kept, _UNKNOWN)


def _passing(ends: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.int64]:
    places: NDArray[np.int64] = (ends <= targets[:, None]).sum(axis=1)
    return places
