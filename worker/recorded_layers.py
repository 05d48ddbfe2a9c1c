"""The layers of a decoder as one native call per step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..kernels import ExchangeError, Recording
from ..protos.errors import UnavailableError
from .batch import ForwardBatch
from .rope import Angles

RunLayers = Callable[[torch.Tensor, list[Angles], ForwardBatch], torch.Tensor]
"""What is recorded, op by op: (x `[T, hidden_size]`, which it may overwrite; angles; batch) -> `[T, hidden_size]`."""


class RecordedLayers:
    """Records when it is made; `run` gives the same bits as what was recorded, for up to `max_num_tokens` tokens."""

    def __init__(self, run_layers: RunLayers, hidden_size: int, num_angles: list[int], num_kv_groups: int,
                 max_num_tokens: int, dtype: torch.dtype, *, has_residual: bool) -> None:
        """`num_angles`: of each rotary table. Raises `NotRecordableError` where the layers are not native ops only."""
        self._recording = Recording()
        self._x = torch.empty(max_num_tokens, hidden_size, dtype=dtype)
        self._angles = [(torch.empty(max_num_tokens, count), torch.empty(max_num_tokens, count))
                        for count in num_angles]
        batch = _longest(max_num_tokens, num_kv_groups, has_residual=has_residual)
        with self._recording.record(batch):
            self._out = run_layers(self._x, self._angles, batch)

    @property
    def num_ops(self) -> int:
        return len(self._recording)

    def run(self, x: torch.Tensor, angles: list[Angles], batch: ForwardBatch) -> torch.Tensor:
        """What was recorded, of these tokens; the result stays until the next call. Raises what the ops raise,
        and `UnavailableError` when another rank is gone."""
        num_tokens = x.shape[0]
        self._x[:num_tokens] = x
        for own, given in zip(self._angles, angles, strict=True):
            own[0][:num_tokens], own[1][:num_tokens] = given
        try:
            self._recording.replay(batch, num_tokens)
        except ExchangeError as error:
            raise UnavailableError(
                f"a step lost another rank: {error}; the worker group must be started again") from error
        return self._out[:num_tokens]


def _longest(num_tokens: int, num_kv_groups: int, *, has_residual: bool) -> ForwardBatch:
    """A batch for its shapes and dtypes; every tensor has memory of its own, by which it is known."""
    groups = range(num_kv_groups)
    return ForwardBatch(
        token_ids=torch.zeros(num_tokens, dtype=torch.int64),
        positions=torch.zeros(num_tokens, dtype=torch.int64),
        query_start_loc=torch.zeros(2, dtype=torch.int32),
        kv_lens=torch.zeros(1, dtype=torch.int32),
        block_tables=[torch.zeros(1, 1, dtype=torch.int32) for _ in groups],
        slot_mapping=[torch.zeros(num_tokens, dtype=torch.int64) for _ in groups],
        filled_blocks=[torch.zeros(1, dtype=torch.int64) for _ in groups] if has_residual else [],
    )
