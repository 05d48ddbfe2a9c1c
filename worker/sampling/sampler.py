"""From logits to tokens, on every rank of a worker group at once and with the same outcome on each.

Collectives of one `sample`: 1 for greedy rows and for truncated rows that the candidates settle; 1 more if any row is
drawn from the whole vocabulary; 2 to 4 more if the candidates of a truncated row did not settle it (see `wide_rows`);
2 more if any row asks for log probabilities. Whether one takes place depends on the parameters and on what was
gathered before, never on a rank's own logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ...protos.sampling import SamplingParams
from ...protos.step import TokenLogprobs
from . import keys
from .batch import Batch
from .blocks import best_keys, block_maxima, take_rows, top_keys
from .candidates import CANDIDATES, draw_from_candidates
from .edits import apply_edits
from .errors import NonFiniteLogitsError
from .gather import Gather
from .logprobs import gather_likeliest, gather_logprobs
from .open_rows import draw_open
from .state import SamplingState
from .weights import block_weights
from .wide_rows import Histogram, draw_from_histogram


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's token, and its log probabilities where they were asked for."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class Sampler:
    """Samples from logits of which this rank holds the columns `vocab_start : vocab_start + local_vocab`.

    Slices follow each other in the order of ranks and may differ in size; none is empty.
    """

    def __init__(self, comm: Gather, *, vocab_start: int, local_vocab: int) -> None:
        if local_vocab < 1:
            raise ValueError(f"rank {comm.rank} holds no column of the logits")
        self._comm = comm
        self._start = vocab_start
        self._local_vocab = local_vocab

    def start(
        self,
        params: SamplingParams,
        *,
        seq_index: int,
        token_ids: list[int] | NDArray[np.int32],
        num_prompt_tokens: int,
        eos_token_ids: Iterable[int],
    ) -> SamplingState:
        """The state of a sequence that starts on this rank, or starts again with what it has generated so far.

        Raises `InvalidRequestError` if it is to be sampled at random and has no seed.
        """
        return SamplingState(
            params, seq_index=seq_index, token_ids=token_ids, num_prompt_tokens=num_prompt_tokens,
            eos_token_ids=eos_token_ids, vocab_start=self._start, local_vocab=self._local_vocab)

    def sample(self, logits: torch.Tensor, states: list[SamplingState], positions: list[int]) -> list[Sampled]:
        """The next token of each row, the same on every rank.

        `logits` `[R, local_vocab]` of any floating dtype; penalties, bias and the mask of `min_tokens` may change it in
        place.
        `positions`: index in its sequence of the token that each row is about to gain. The states stay as they are:
        `append` tells them. Raises `NonFiniteLogitsError`, on every rank alike, and `ValueError` for wrong shapes.
        """
        self._check(logits, len(states), "states")
        if len(positions) != len(states):
            raise ValueError(f"{len(positions)} positions for {len(states)} states")
        if not states:
            return []
        asking = [row for row, state in enumerate(states) if state.num_logprobs is not None]
        if not all(state.takes_the_best for state in states):
            logits = logits.float()
        # A copy: edits follow.
        raw = logits[torch.tensor(asking, device=logits.device)] if asking else None

        apply_edits(logits, states)
        token_ids = self._draw(logits, Batch(states, positions)).tolist()

        logprobs: dict[int, TokenLogprobs] = {}
        if raw is not None:
            num_top = [n for state in states if (n := state.num_logprobs) is not None]
            entries = gather_logprobs(self._comm, raw, self._start, [token_ids[row] for row in asking], num_top)
            logprobs = dict(zip(asking, entries, strict=True))
        return [Sampled(token_id, logprobs.get(row)) for row, token_id in enumerate(token_ids)]

    def take_the_best(self, values: torch.Tensor, columns: torch.Tensor) -> tuple[list[int], list[int]]:
        """As `sample`, of rows of which nothing matters but which logit is the largest: `values` `[R]` float32 and
        `columns` `[R]` int64 are that of this rank's slice, as `best_tokens` gives them. Returns the token of each row,
        and, ascending, the rows whose logits are not numbers, whose tokens mean nothing. One
        collective, none on a single rank."""
        if self._comm.world_size == 1:
            highest, token_ids = values.cpu().numpy(), columns.cpu().numpy()
        else:
            gathered = self._comm.all_gather_rows(keys.encode(values, columns + self._start)).cpu().numpy().max(axis=0)
            highest, token_ids = keys.logits_of(gathered).astype(np.float32), keys.token_ids_of(gathered)
        return token_ids.tolist(), np.flatnonzero(~np.isfinite(highest)).tolist()

    def prompt_logprobs(self, logits: torch.Tensor, target_ids: list[int], num_top: int) -> list[TokenLogprobs]:
        """Of `target_ids[i]` at row i, with the `num_top` likeliest tokens there. Two collectives, none if P = 0.

        `logits` `[P, local_vocab]` of any floating dtype, unchanged. Raises `NonFiniteLogitsError`, and `ValueError`
        for wrong shapes or a token outside the vocabulary.
        """
        self._check(logits, len(target_ids), "target ids")
        if not target_ids:
            return []
        return gather_logprobs(self._comm, logits.float(), self._start, target_ids, [num_top] * len(target_ids))

    def likeliest(self, logits: torch.Tensor, counts: list[int]) -> list[tuple[list[int], list[float]]]:
        """Of each row the ids of the `counts[i]` likeliest tokens, best first, and their log probabilities; fewer only
        where no more are possible. One collective, none if there is no row.

        `logits` `[R, local_vocab]` of any floating dtype, unchanged. Raises `NonFiniteLogitsError`, and `ValueError`
        for a wrong shape.
        """
        self._check(logits, len(counts), "counts")
        return gather_likeliest(self._comm, logits.float(), self._start, counts) if counts else []

    def _check(self, logits: torch.Tensor, num_rows: int, what: str) -> None:
        if not logits.is_floating_point() or logits.shape != (num_rows, self._local_vocab):
            raise ValueError(f"logits must be [{num_rows}, {self._local_vocab}], floating, for {num_rows} {what}, "
                             f"got {list(logits.shape)} {logits.dtype}")

    def _draw(self, logits: torch.Tensor, batch: Batch) -> NDArray[np.int64]:
        # logits: [R, V], edited -> token ids [R]
        parts = [best_keys(logits, self._start)]
        weights = None
        if len(batch.weighed) or len(batch.truncated):
            maxima = block_maxima(logits)
        if len(batch.weighed):
            weights = block_weights(take_rows(logits, batch.weighed), take_rows(maxima, batch.weighed).amax(1),
                                    torch.from_numpy(batch.scales[batch.weighed]).float().to(logits.device))
            parts.append(weights.sum(1).view(torch.int64))
        if len(batch.truncated):
            parts.append(top_keys(take_rows(logits, batch.truncated), take_rows(maxima, batch.truncated), self._start,
                                  CANDIDATES).flatten())
        # [world_size, R + weighed + truncated * CANDIDATES]
        gathered = self._comm.all_gather_rows(torch.cat(parts)).cpu().numpy()
        best, mass_bits, offers = np.split(gathered, [len(logits), len(logits) + len(batch.weighed)], axis=1)

        token_ids = keys.token_ids_of(best.max(axis=0))
        slice_maxima = keys.logits_of(best)
        bad = np.flatnonzero(~np.isfinite(slice_maxima.max(axis=0)))
        if len(bad):
            raise NonFiniteLogitsError(bad.tolist())
        # [world_size, R], each relative to its slice's maximum; 0 for rows that are not weighed
        masses = np.zeros(slice_maxima.shape)
        masses[:, batch.weighed] = np.ascontiguousarray(mass_bits).view(np.float64)

        if len(batch.truncated):
            offers = offers.reshape(len(offers), len(batch.truncated), CANDIDATES)
            token_ids[batch.truncated] = self._draw_truncated(logits, batch, offers, masses, slice_maxima)
        if weights is not None and len(batch.open):
            is_open = np.isin(batch.weighed, batch.open)
            rows = batch.open
            token_ids[rows] = draw_open(
                self._comm, take_rows(logits, rows), self._start, take_rows(weights, np.flatnonzero(is_open)),
                masses[:, rows], slice_maxima[:, rows], batch.scales[rows], batch.uniforms[rows])
        return token_ids

    def _draw_truncated(
        self, logits: torch.Tensor, batch: Batch, offers: NDArray[np.int64], masses: NDArray[np.float64],
        slice_maxima: NDArray[np.float64],
    ) -> NDArray[np.int64]:
        # logits: [R, V]; offers: [world_size, truncated, CANDIDATES]; masses, slice_maxima: [world_size, R]
        rows = batch.truncated
        highest = slice_maxima.max(axis=0)
        totals = (masses * np.exp2((slice_maxima - highest) * batch.scales)).sum(axis=0)
        token_ids, settled = draw_from_candidates(
            offers, totals[rows], np.isin(rows, batch.weighed), batch.scales[rows], batch.top_k[rows],
            batch.top_p[rows], batch.min_p[rows], batch.uniforms[rows])
        if not settled.all():
            wide = rows[~settled]
            histogram = Histogram(self._comm, take_rows(logits, wide), self._start, highest[wide], batch.scales[wide],
                                  batch.min_p[wide])
            token_ids[~settled] = draw_from_histogram(histogram, batch.top_k[wide], batch.top_p[wide],
                                                      batch.uniforms[wide])
        return token_ids
