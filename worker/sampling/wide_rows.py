"""Truncated rows whose draw the best few tokens do not decide, settled from a histogram of the whole vocabulary.

The order and the meaning are those of `candidates`. Ranks exchange how many tokens, and of what weight, fall into each
of 1,024 intervals of the logit; a cumulative count or weight is then located to an interval, whose tokens alone are
exchanged to locate it exactly: once for top-k, once for top-p, once for the draw itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from . import keys
from .blocks import row_chunks, take_rows
from .gather import Gather
from .weights import exponents, targets_below

_NUM_BUCKETS = 1024
_BUCKETS_PER_OCTAVE = 32
_DROPPED = _NUM_BUCKETS


class Histogram:
    """Weights and counts of R rows by interval of the logit, summed over the ranks. One collective to build."""

    def __init__(
        self,
        comm: Gather,
        logits: torch.Tensor,
        vocab_start: int,
        maxima: NDArray[np.float64],
        scales: NDArray[np.float64],
        min_p: NDArray[np.float64],
    ) -> None:
        """Tokens that weigh less than `min_p`, or nothing, are left out. `maxima`: of all ranks."""
        # logits: [R, V]; maxima, scales, min_p: [R]
        self._comm = comm
        self._logits = logits
        self._vocab_start = vocab_start
        self._maxima = maxima
        self._scales = scales
        device = logits.device
        highest, scale, floor = (torch.from_numpy(a).float().to(device).unsqueeze(1) for a in (
            maxima, scales, np.log2(np.maximum(min_p, 1e-300))))
        self._buckets = torch.empty(logits.shape, dtype=torch.int16, device=device)
        sums = torch.zeros(2, logits.shape[0], _NUM_BUCKETS + 1, dtype=torch.float64, device=device)
        chunks = list(row_chunks(*logits.shape))
        # Buffers shared by all chunks: fresh ones of this size would each be paged in anew.
        largest = logits[chunks[0]].shape
        bucket_buffer = torch.empty(largest, dtype=torch.int64, device=device)
        weight_buffer = torch.empty(largest, dtype=torch.float64, device=device)
        ones = torch.ones(largest, dtype=torch.float64, device=device)
        for rows in chunks:
            exponent = exponents(logits[rows], highest[rows, 0], scale[rows, 0])
            bucket = bucket_buffer[:len(exponent)]
            bucket.copy_((exponent * -_BUCKETS_PER_OCTAVE).clamp_(max=_NUM_BUCKETS - 1))
            # Below 2**-126 a weight is rounded, at last to 0; such tokens cannot be told from none.
            bucket.masked_fill_(exponent < floor[rows].clamp(min=-126.0), _DROPPED)
            weight = weight_buffer[:len(exponent)].copy_(exponent.exp2_())
            sums[0, rows].scatter_add_(1, bucket, weight)
            sums[1, rows].scatter_add_(1, bucket, ones[:len(exponent)])
            self._buckets[rows] = bucket
        sums = sums[:, :, :_NUM_BUCKETS].contiguous()
        # [world_size, 2, R, _NUM_BUCKETS]
        gathered = comm.all_gather_rows(sums.view(torch.int64)).cpu().numpy().view(np.float64)
        self._counts_by_rank = gathered[:, 1].astype(np.int64)
        self.weight_ends: NDArray[np.float64] = gathered[:, 0].sum(axis=0).cumsum(axis=1)
        self.count_ends: NDArray[np.int64] = self._counts_by_rank.sum(axis=0).cumsum(axis=1)

    def weight_before(self, rows: NDArray[np.intp], buckets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Weight of all buckets above one of each row."""
        return np.where(buckets > 0, self.weight_ends[rows, np.maximum(buckets - 1, 0)], 0.0)

    def open_buckets(self, rows: NDArray[np.intp], buckets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Keys of the tokens in one bucket of each row, `[len(rows), most]`, best first, then PAD. One collective."""
        most = int(self._counts_by_rank[:, rows, buckets].max())
        device = self._logits.device
        index = torch.from_numpy(rows).to(device)
        wanted = torch.from_numpy(buckets).to(device).short()
        where, columns = torch.nonzero(take_rows(self._buckets, rows) == wanted.unsqueeze(1), as_tuple=True)
        held = torch.bincount(where, minlength=len(rows))
        places = torch.arange(len(where), device=device) - (held.cumsum(0) - held)[where]
        offered = torch.full((len(rows), most), keys.PAD, dtype=torch.int64, device=device)
        offered[where, places] = keys.encode(self._logits[index[where], columns], columns + self._vocab_start)
        return keys.sorted_keys(self._comm.all_gather_rows(offered).cpu().numpy())

    def weights(self, rows: NDArray[np.intp], ranked: NDArray[np.int64]) -> NDArray[np.float64]:
        """Weights of keys `[len(rows), n]`, 0 for PAD."""
        return np.exp2((keys.logits_of(ranked) - self._maxima[rows, None]) * self._scales[rows, None])


@dataclass(slots=True)
class _Kept:
    """What truncation left of each row: its weight, and where it ends, token `places` (from 0) of bucket `buckets`."""

    weights: NDArray[np.float64]
    buckets: NDArray[np.int64]
    places: NDArray[np.int64]

    def clamped(
        self, rows: NDArray[np.intp], buckets: NDArray[np.int64], places: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """`places`, none past the end: a bucket's weight, and its tokens' weights added up, differ by rounding."""
        return np.where(buckets == self.buckets[rows], np.minimum(places, self.places[rows]), places)


def draw_from_histogram(
    histogram: Histogram, top_k: NDArray[np.int64], top_p: NDArray[np.float64], uniforms: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Token ids `[R]`. One collective for the draw, one more if any row has a top-k that cuts, one if any a top-p."""
    # top_k, top_p, uniforms: [R]
    totals = histogram.count_ends[:, -1:]
    kept = _Kept(histogram.weight_ends[:, -1].copy(), (histogram.count_ends < totals).sum(axis=1),
                 np.full(len(uniforms), np.iinfo(np.int64).max))
    rows = np.flatnonzero(top_k < totals[:, 0])
    if len(rows):
        _cut_by_count(histogram, kept, rows, top_k[rows])
    rows = np.flatnonzero(top_p < 1.0)
    if len(rows):
        _cut_by_weight(histogram, kept, rows, top_p[rows])

    rows = np.arange(len(uniforms))
    targets = targets_below(uniforms, kept.weights)
    buckets = np.minimum((histogram.weight_ends <= targets[:, None]).sum(axis=1), kept.buckets)
    ranked = histogram.open_buckets(rows, buckets)
    ends = histogram.weight_before(rows, buckets)[:, None] + histogram.weights(rows, ranked).cumsum(axis=1)
    last = (ranked != keys.PAD).sum(axis=1) - 1
    places = kept.clamped(rows, buckets, np.minimum((ends <= targets[:, None]).sum(axis=1), last))
    return keys.token_ids_of(ranked[rows, places])


def _cut_by_count(histogram: Histogram, kept: _Kept, rows: NDArray[np.intp], top_k: NDArray[np.int64]) -> None:
    # rows, top_k: [n]
    buckets = (histogram.count_ends[rows] < top_k[:, None]).sum(axis=1)
    ranked = histogram.open_buckets(rows, buckets)
    held = (ranked != keys.PAD).sum(axis=1)
    kth = top_k - (histogram.count_ends[rows, buckets] - held) - 1
    logits = keys.logits_of(ranked)
    # Tokens that equal the k-th stay, and stand in the same bucket.
    inside = logits >= logits[np.arange(len(rows)), kth][:, None]
    kept.weights[rows] = (histogram.weight_before(rows, buckets)
                          + (histogram.weights(rows, ranked) * inside).sum(axis=1))
    kept.buckets[rows] = buckets
    kept.places[rows] = inside.sum(axis=1) - 1


def _cut_by_weight(histogram: Histogram, kept: _Kept, rows: NDArray[np.intp], top_p: NDArray[np.float64]) -> None:
    # rows, top_p: [n]
    goals = top_p * kept.weights[rows]
    buckets = np.minimum((histogram.weight_ends[rows] < goals[:, None]).sum(axis=1), kept.buckets[rows])
    ranked = histogram.open_buckets(rows, buckets)
    weights = histogram.weights(rows, ranked)
    ends = histogram.weight_before(rows, buckets)[:, None] + weights.cumsum(axis=1)
    nucleus = ((ends - weights < goals[:, None]) & (ranked != keys.PAD)).sum(axis=1)
    places = kept.clamped(rows, buckets, np.maximum(nucleus - 1, 0))
    kept.weights[rows] = np.minimum(ends[np.arange(len(rows)), places], kept.weights[rows])
    kept.buckets[rows] = buckets
    kept.places[rows] = places
