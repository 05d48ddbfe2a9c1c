"""What sampling keeps of a running sequence between steps."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ...protos.errors import InvalidRequestError
from ...protos.sampling import SamplingParams
from .counts import TokenCounts

NO_LIMIT = 2**62
"""The `top_k` of a sequence that did not ask for one."""


class SamplingState:
    """One sequence on one rank. Made when it starts (again), told of every token it gains, dropped when it ends."""

    __slots__ = ("bias_columns", "bias_values", "counts", "frequency_penalty", "min_p", "min_tokens", "num_logprobs",
                 "num_output_tokens", "presence_penalty", "repetition_penalty", "seed", "seq_index", "stop_columns",
                 "takes_the_best", "temperature", "top_k", "top_p")

    def __init__(
        self,
        params: SamplingParams,
        *,
        seq_index: int,
        token_ids: list[int] | NDArray[np.int32],
        num_prompt_tokens: int,
        eos_token_ids: Iterable[int],
        vocab_start: int,
        local_vocab: int,
    ) -> None:
        """`token_ids`: the prompt, then what was generated so far; read now and not kept.

        Raises `InvalidRequestError` if tokens are to be drawn at random and `params.seed` is None: a seed that is
        chosen here would not survive a recovery.
        """
        if not params.greedy and params.seed is None:
            raise InvalidRequestError("a sequence that is sampled at random needs a seed by now", param="seed")
        self.seed = params.seed or 0
        self.seq_index = seq_index
        self.temperature = params.temperature
        self.top_k = NO_LIMIT if params.top_k is None else params.top_k
        self.top_p = params.top_p
        self.min_p = params.min_p
        self.repetition_penalty = params.repetition_penalty
        self.presence_penalty = params.presence_penalty
        self.frequency_penalty = params.frequency_penalty
        self.min_tokens = params.min_tokens
        self.num_logprobs = params.logprobs
        self.num_output_tokens = len(token_ids) - num_prompt_tokens

        repeats = params.repetition_penalty != 1.0
        self.counts: TokenCounts | None = None
        if repeats or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            self.counts = TokenCounts(token_ids, num_prompt_tokens, with_prompt=repeats, vocab_start=vocab_start,
                                      local_vocab=local_vocab)

        def local_columns(ids: Iterable[int]) -> NDArray[np.int64]:
            columns = np.fromiter(ids, dtype=np.int64) - vocab_start
            return columns[(columns >= 0) & (columns < local_vocab)]

        self.bias_columns = local_columns(params.logit_bias)
        self.bias_values = np.array(
            [params.logit_bias[int(column) + vocab_start] for column in self.bias_columns], dtype=np.float32)
        self.stop_columns = local_columns({*eos_token_ids, *params.stop_token_ids})
        self.takes_the_best = (params.greedy and params.logprobs is None and self.counts is None
                               and not params.logit_bias and not params.min_tokens)
        """Whether nothing of its logits matters but which is the largest."""

    def append(self, token_id: int) -> None:
        """The sequence gained `token_id`. Takes the same time however long the sequence is."""
        self.num_output_tokens += 1
        if self.counts is not None:
            self.counts.append(token_id)
