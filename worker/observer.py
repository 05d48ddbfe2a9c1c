"""Looks at the attention of some queries of a step, layer by layer, while the step is computed."""

from __future__ import annotations

import numpy as np
import torch

from ..kernels import attention_scores
from .batch import ForwardBatch, Ints, StepLayout


class Observer:
    """Of O sequences of a step, in its order."""

    def __init__(self, batch: ForwardBatch, layout: StepLayout, places: Ints, counts: Ints) -> None:
        """`places`: `[O]`, which sequences of the step; `counts`: `[O]`, how many of their last queries."""
        self.places = places
        self.num_rows = layout.row_ends[places]
        """`[O]`: KV rows that each holds."""
        ends = layout.query_start_loc[places + 1]
        start_loc = np.concatenate(([0], np.cumsum(counts)))
        tokens = np.arange(start_loc[-1]) + np.repeat(ends - start_loc[1:], counts)
        device = batch.kv_lens.device
        # Most often all are looked at: their queries need not be gathered.
        self._tokens = None if len(tokens) == layout.query_start_loc[-1] else torch.from_numpy(tokens).to(device)
        rows = torch.from_numpy(places).to(device)
        self._kv_lens = batch.kv_lens[rows]
        self._block_tables = batch.block_tables[0][rows]
        self._start_loc = torch.from_numpy(start_loc).to(device, torch.int32)
        self._counts = torch.from_numpy(counts).to(device, torch.int32)
        self._layers: list[torch.Tensor] = []

    def look(self, query: torch.Tensor, cache: torch.Tensor, layer: int, scale: float, soft_cap: float | None) -> None:
        """`query`: `[T, num_heads, head_dim]` of the step; K and V of its tokens are in the cache. The layers come in
        order."""
        some = query if self._tokens is None else query[self._tokens]
        self._layers.append(attention_scores(
            some, cache, layer, self._block_tables, self._start_loc, self._kv_lens, self._counts, scale, soft_cap))

    def scores(self) -> list[torch.Tensor]:
        """Per sequence `[num_layers, num_kv_heads, rows]` float32, once all layers have looked: what each row received
        from the queries, summed over them and over this rank's query heads of the KV head."""
        every = torch.stack(self._layers)
        return [every[:, i, :, :num_rows] for i, num_rows in enumerate(self.num_rows.tolist())]
