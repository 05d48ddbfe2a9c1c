"""Log probabilities under the model's own logits: log-softmax over all slices, the likeliest tokens, and ranks.

A token's rank is 1 plus the number of tokens with a higher logit, or an equal one and a lower id.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ...protos.step import TokenLogprobs
from . import keys
from .blocks import best_keys, block_maxima, row_chunks, top_keys
from .errors import NonFiniteLogitsError
from .gather import Gather
from .weights import block_weights

_LOG2_E = np.float64(np.float32(1.4426950408889634))


def gather_logprobs(
    comm: Gather, logits: torch.Tensor, vocab_start: int, token_ids: list[int], num_top: list[int],
) -> list[TokenLogprobs]:
    """One entry per row: of the token named, and of the `num_top[i]` likeliest. Two collectives.

    Raises `NonFiniteLogitsError`, and `ValueError` for a token that no rank holds, on every rank alike.
    """
    # logits: [P, V] float32
    own = torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
    column = own - vocab_start
    held = (column >= 0) & (column < logits.shape[1])
    value = logits.gather(1, column.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    own_keys = torch.where(held, keys.encode(value, own), keys.PAD)
    gathered, log_total = _exchange(comm, logits, vocab_start, max(num_top), own_keys)
    own_gathered = gathered[:, :, 0].max(axis=0)
    unknown = [token_ids[i] for i in np.flatnonzero(own_gathered == keys.PAD)]
    if unknown:
        raise ValueError(f"token ids {unknown} are not in the vocabulary")

    ahead = comm.all_gather_rows(_tokens_ahead(logits, vocab_start, own_gathered, own)).cpu().numpy().sum(axis=0)
    ranked = keys.sorted_keys(gathered[:, :, 1:])
    top_ids = keys.token_ids_of(ranked)
    top_logprobs = keys.logits_of(ranked) - log_total[:, None]
    own_logprobs = keys.logits_of(own_gathered) - log_total
    return [
        TokenLogprobs(token_id=token_ids[i], logprob=float(own_logprobs[i]), rank=int(ahead[i]) + 1,
                      top_token_ids=top_ids[i, :num].tolist(), top_logprobs=top_logprobs[i, :num].tolist())
        for i, num in enumerate(num_top)
    ]


def gather_likeliest(
    comm: Gather, logits: torch.Tensor, vocab_start: int, counts: list[int],
) -> list[tuple[list[int], list[float]]]:
    """Per row the ids of the `counts[i]` likeliest tokens, best first, and their log probabilities; fewer where the
    vocabulary ends or a logit is -inf. One collective. Raises `NonFiniteLogitsError` on every rank alike."""
    # logits: [P, V] float32
    gathered, log_total = _exchange(comm, logits, vocab_start, max(counts))
    ranked = keys.sorted_keys(gathered)
    num_held = (ranked != keys.PAD).sum(axis=1)
    token_ids = keys.token_ids_of(ranked)
    logprobs = keys.logits_of(ranked) - log_total[:, None]
    kept = np.minimum(num_held, counts)
    return [(token_ids[i, :num].tolist(), logprobs[i, :num].tolist()) for i, num in enumerate(kept)]


def _exchange(
    comm: Gather, logits: torch.Tensor, vocab_start: int, most: int, *others: torch.Tensor,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of every rank the `others` (`[P]` int64 each) and then the keys of its best `most` tokens, `[world_size, P,
    len(others) + most]`, and the logarithm of each row's total likelihood, `[P]`. One collective."""
    # logits: [P, V]
    maxima = block_maxima(logits)
    scales = torch.full((len(logits),), float(_LOG2_E), device=logits.device)
    # Of this slice, relative to its best.
    masses = block_weights(logits, maxima.amax(1), scales).sum(1)
    best = best_keys(logits, vocab_start)
    gathered = comm.all_gather_rows(torch.cat(
        [torch.stack([best, masses.view(torch.int64), *others], dim=1), top_keys(logits, maxima, vocab_start, most)],
        dim=1)).cpu().numpy()

    slice_maxima = keys.logits_of(gathered[:, :, 0])
    highest = slice_maxima.max(axis=0)
    bad = np.flatnonzero(~np.isfinite(highest))
    if len(bad):
        raise NonFiniteLogitsError(bad.tolist())
    slice_masses = np.ascontiguousarray(gathered[:, :, 1]).view(np.float64)
    log_total = highest + np.log((slice_masses * np.exp2((slice_maxima - highest) * _LOG2_E)).sum(axis=0))
    return gathered[:, :, 2:], log_total


def _tokens_ahead(
    logits: torch.Tensor, vocab_start: int, own_keys: NDArray[np.int64], own: torch.Tensor,
) -> torch.Tensor:
    """How many tokens of this slice come before each row's own one, `[P]` int64."""
    # logits: [P, V]; own_keys, own: [P]
    value = torch.from_numpy(keys.logits_of(own_keys)).float().to(logits.device).unsqueeze(1)
    columns = torch.arange(logits.shape[1], device=logits.device)
    lower = (own - vocab_start).unsqueeze(1)
    return torch.cat([
        ((logits[rows] > value[rows]) | ((logits[rows] == value[rows]) & (columns < lower[rows]))).sum(1)
        for rows in row_chunks(*logits.shape)
    ])
