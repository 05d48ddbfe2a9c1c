"""How often each token stands in a sequence, kept so that one more token costs the same however many there are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """Tokens of one vocabulary slice in one sequence, and how often each was generated.

    Prompt tokens are held (with a count of 0) only if `with_prompt`. Arrays grow by doubling.
    """

    def __init__(
        self, token_ids: list[int] | NDArray[np.int32], num_prompt_tokens: int, *, with_prompt: bool, vocab_start: int,
        local_vocab: int,
    ) -> None:
        self._start = vocab_start
        self._end = vocab_start + local_vocab
        held = np.asarray(token_ids if with_prompt else token_ids[num_prompt_tokens:], dtype=np.int64)
        num_prompt_held = num_prompt_tokens if with_prompt else 0
        columns, inverse = np.unique(held - vocab_start, return_inverse=True)
        generated = np.bincount(inverse[num_prompt_held:], minlength=len(columns))
        mine = (columns >= 0) & (columns < local_vocab)
        self._size = int(mine.sum())
        capacity = max(64, 2 * self._size)
        self._columns = np.zeros(capacity, dtype=np.int64)
        self._counts = np.zeros(capacity, dtype=np.float32)
        self._columns[: self._size] = columns[mine]
        self._counts[: self._size] = generated[mine]
        self._place = {int(column): i for i, column in enumerate(columns[mine])}

    def append(self, token_id: int) -> None:
        """One more generated token; of no effect if it lies outside the slice."""
        if not self._start <= token_id < self._end:
            return
        column = token_id - self._start
        place = self._place.get(column)
        if place is None:
            place = self._place[column] = self._size
            self._size += 1
            if self._size > len(self._columns):
                self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._columns[place] = column
        self._counts[place] += 1

    @property
    def columns(self) -> NDArray[np.int64]:
        """Ids of the tokens held, relative to the slice's start, each once. A view, valid until the next `append`."""
        return self._columns[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `columns` was generated. A view, valid until the next `append`."""
        return self._counts[: self._size]
