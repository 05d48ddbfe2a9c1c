"""What H2O knows of the rows of each sequence: the attention that they have received from all queries so far."""

from __future__ import annotations

import torch


class ScorePool:
    """Per sequence `[num_layers, num_kv_heads, rows]` float32 on the device, which follow its rows wherever they go. A
    sequence may be *suspended*: its rows are in host memory, and its scores wait for them."""

    def __init__(self) -> None:
        self._scores: dict[int, torch.Tensor | None] = {}
        self._suspended: set[int] = set()

    def start(self, seq_id: int, num_computed: int) -> None:
        """Raises `ValueError` for a sequence that has rows which no query of its own was seen to look at."""
        if seq_id in self._suspended:
            self._suspended.discard(seq_id)
            return
        if num_computed:
            raise ValueError(f"sequence {seq_id} starts with {num_computed} computed tokens whose attention is unknown")
        self._scores[seq_id] = None

    def fork(self, seq_id: int, parent_seq_id: int) -> None:
        """A copy of a suspended sequence is suspended."""
        # Shared: `add` and `keep` make new ones.
        self._scores[seq_id] = self._scores[parent_seq_id]
        if parent_seq_id in self._suspended:
            self._suspended.add(seq_id)

    def suspend(self, seq_id: int) -> None:
        self._suspended.add(seq_id)

    def is_suspended(self, seq_id: int) -> bool:
        return seq_id in self._suspended

    def end(self, seq_id: int) -> None:
        del self._scores[seq_id]
        self._suspended.discard(seq_id)

    def add(self, seq_id: int, received: torch.Tensor) -> None:
        """`received`: `[num_layers, num_kv_heads, rows]`, what rows got in one step, also those that it added."""
        total = received.clone(memory_format=torch.contiguous_format)
        if (before := self._scores[seq_id]) is not None:
            total[..., : before.shape[-1]] += before
        self._scores[seq_id] = total

    def scores(self, seq_id: int) -> torch.Tensor:
        """Raises `ValueError` for a sequence of which nothing was computed."""
        if (scores := self._scores[seq_id]) is None:
            raise ValueError(f"sequence {seq_id} has no rows yet")
        return scores

    def keep(self, seq_id: int, rows: torch.Tensor) -> None:
        """Only these rows are left: `[num_layers, num_kv_heads, kept]`."""
        self._scores[seq_id] = self.scores(seq_id).gather(-1, rows.long())
