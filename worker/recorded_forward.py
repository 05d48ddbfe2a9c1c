"""A decoder's forward pass as one native call per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..kernels import ExchangeError, Recording
from ..protos.errors import UnavailableError
from .batch import ForwardBatch


class Best(NamedTuple):
    """Of each of R rows the largest of this rank's logits, as `best_tokens` gives it."""

    values: torch.Tensor
    """`[R]` float32."""
    columns: torch.Tensor
    """`[R]` int64: in this rank's slice of the vocabulary."""


Forward = Callable[[ForwardBatch], tuple[torch.Tensor, Best | None]]
"""What is recorded, op by op: hidden states `[T, hidden_size]`, and the best of the rows that are sampled; None: their
logits take more than native ops."""


class RecordedForward:
    """Records when it is made; `run` gives the same bits as what was recorded, for up to so many tokens and rows."""

    def __init__(self, forward: Forward, num_kv_groups: int, max_num_tokens: int, max_num_sampled: int, *,
                 has_residual: bool) -> None:
        """Raises `NotRecordableError` where it is not native ops only."""
        self._recording = Recording()
        batch = _longest(max_num_tokens, max_num_sampled, num_kv_groups, has_residual=has_residual)
        with self._recording.record(batch):
            self._hidden, self._best = forward(batch)

    @property
    def num_ops(self) -> int:
        return len(self._recording)

    def run(self, batch: ForwardBatch) -> tuple[torch.Tensor, Best | None]:
        """What was recorded, of this batch; the results stay until the next call. Raises what the ops raise, and
        `UnavailableError` when another rank is gone."""
        try:
            self._recording.replay(batch)
        except ExchangeError as error:
            raise UnavailableError(
                f"a step lost another rank: {error}; the worker group must be started again") from error
        hidden = self._hidden[:batch.token_ids.numel()]
        if self._best is None:
            return hidden, None
        num_sampled = batch.sampled_rows.numel()
        return hidden, Best(self._best.values[:num_sampled], self._best.columns[:num_sampled])


def _longest(num_tokens: int, num_sampled: int, num_kv_groups: int, *, has_residual: bool) -> ForwardBatch:
    """A batch for its shapes and dtypes; every tensor has memory of its own, by which it is known."""
    groups = range(num_kv_groups)
    return ForwardBatch(
        token_ids=torch.zeros(num_tokens, dtype=torch.int64),
        positions=torch.zeros(num_tokens, dtype=torch.int64),
        query_start_loc=torch.zeros(2, dtype=torch.int32),
        kv_lens=torch.zeros(1, dtype=torch.int32),
        block_tables=[torch.zeros(1, 1, dtype=torch.int32) for _ in groups],
        slot_mapping=[torch.zeros(num_tokens, dtype=torch.int64) for _ in groups],
        sampled_rows=torch.zeros(num_sampled, dtype=torch.int64),
        filled_blocks=[torch.zeros(1, dtype=torch.int64) for _ in groups] if has_residual else [],
    )
