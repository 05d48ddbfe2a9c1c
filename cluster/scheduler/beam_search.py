"""The decisions of a beam search: which beams go on, which have ended, and when it is over.

They are those of Transformers' `generate(num_beams=...)`, made in the same float32 arithmetic, so that equal log
probabilities give equal beams and scores. Candidates of equal score rank by their beam, then by their place in it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from ctypes import c_float
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from ...protos.sampling import SamplingParams

Candidates = tuple[list[int], list[float]]
"""Token ids and log probabilities of the likeliest next tokens of one beam, best first."""


@dataclass(slots=True)
class Beam:
    """One that goes on. Log probabilities of beams are sums over all of their tokens."""

    token_ids: list[int]
    logprob: float


@dataclass(frozen=True, slots=True)
class Continuation:
    """The beam `parent` with one more token."""

    parent: int
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A beam that has ended, its end token included."""

    token_ids: list[int]
    cumulative_logprob: float
    score: float
    finish_reason: Literal["stop", "length"]
    stop_reason: int | None
    """The token of `stop_token_ids` that ended it; None for end-of-sequence."""


class BeamSearch:
    """The search of one request with `params.beam_width` beams and at most `max_tokens` tokens in each.

    All `beam_width` beams are found where the vocabulary has as many tokens.
    """

    def __init__(self, params: SamplingParams, eos_token_ids: Iterable[int], max_tokens: int) -> None:
        if params.beam_width is None:
            raise ValueError("these parameters ask for no beam search")
        eos = tuple(eos_token_ids)
        self._params = params
        self._width = params.beam_width
        self._max_tokens = max_tokens
        self._end_tokens = params.beam_end_tokens(eos)
        self._num_kept = params.num_beam_candidates(eos)
        self._live = [Beam([], 0.0)]
        self._ended: list[Hypothesis] = []
        self._num_tokens = 0

    def advance(self, candidates: list[Candidates]) -> list[Continuation]:
        """One token more. `candidates[i]` are of live beam `i`, at first of the prompt alone: the likeliest
        `params.num_beam_candidates` tokens, or the whole vocabulary.

        Returns the beams that live on, best first, in the order that the next call takes; none when the search is over.
        """
        self._num_tokens += 1
        ranked = heapq.merge(*self._continuations(candidates), key=lambda one: -one.logprob)
        going_on: list[Continuation] = []
        ended: list[Hypothesis] = []
        for place, one in enumerate(islice(ranked, self._num_kept)):
            if one.token_id not in self._end_tokens and self._num_tokens < self._max_tokens:
                going_on.append(one)
            elif place < self._width:  # one that ends below the best `beam_width` is no result
                ended.append(self._hypothesis(one))
        going_on = going_on[:self._width]
        # Sorting keeps the order of equals: of two with one score the earlier stays.
        self._ended = sorted(self._ended + ended, key=lambda one: -one.score)[:self._width]
        if self._is_over(going_on):
            going_on = []
        self._live = [Beam([*self._live[one.parent].token_ids, one.token_id], one.logprob) for one in going_on]
        return going_on

    def results(self) -> list[Hypothesis]:
        """The best `params.n`, best first, once the search is over."""
        return self._ended[:self._params.n]

    def _continuations(self, candidates: list[Candidates]) -> list[Iterator[Continuation]]:
        def of(parent: int, beam: Beam, token_ids: list[int], logprobs: list[float]) -> Iterator[Continuation]:
            for token_id, logprob in zip(token_ids, logprobs, strict=True):
                yield Continuation(parent, token_id, _float32(beam.logprob + logprob))

        return [of(parent, beam, *found)
                for parent, (beam, found) in enumerate(zip(self._live, candidates, strict=True))]

    def _hypothesis(self, last: Continuation) -> Hypothesis:
        return Hypothesis(
            token_ids=[*self._live[last.parent].token_ids, last.token_id], cumulative_logprob=last.logprob,
            score=self._score(last.logprob, self._num_tokens),
            finish_reason="stop" if last.token_id in self._end_tokens else "length",
            stop_reason=last.token_id if last.token_id in self._params.stop_token_ids else None)

    def _is_over(self, going_on: list[Continuation]) -> bool:
        """Whether no beam goes on, or none of them need be looked at any more."""
        if not going_on:
            return True
        if len(self._ended) < self._width:
            return False
        if self._params.early_stopping is True:
            return True
        # With a positive penalty longer beams score better: "never" gives a running one all the length it may reach.
        to_the_end = self._params.early_stopping == "never" and self._params.length_penalty > 0
        hoped_for = self._score(going_on[0].logprob, self._max_tokens if to_the_end else self._num_tokens)
        return hoped_for <= self._ended[-1].score

    def _score(self, logprob: float, num_tokens: int) -> float:
        norm = _float32(float(num_tokens) ** self._params.length_penalty)
        return _float32(logprob / norm) if norm else -math.inf


def _float32(value: float) -> float:
    # Rounding a sum or quotient of two float32 numbers that was taken in float64 gives what float32 itself would.
    return c_float(value).value
