"""KV sparsity on a rank: the attention that rows receive, the choice of those that stay, and their new blocks."""

from __future__ import annotations

import numpy as np
import torch

from ..kernels import compact_rows
from ..protos.sparsity import KVSparsity
from ..protos.step import SequenceFork, SequenceStart, SequenceStep
from .batch import ForwardBatch, SequenceTable, StepLayout
from .collectives import Communicator
from .layout import TPLayout
from .observer import Observer
from .row_selection import select
from .score_pool import ScorePool


class Sparsity:
    """Compacts sequences when plans say so. What it is told of sequences, it is told in the order of the plan."""

    def __init__(self, spec: KVSparsity, layout: TPLayout, total_num_kv_heads: int, comm: Communicator,
                 table: SequenceTable) -> None:
        self._spec = spec
        self._layout = layout
        self._total_num_kv_heads = total_num_kv_heads
        self._comm = comm
        self._table = table
        self._pool = ScorePool() if spec.keeps_scores else None

    def start(self, start: SequenceStart) -> None:
        if self._pool is not None:
            self._pool.start(start.seq_id, start.num_computed_tokens)

    def fork(self, fork: SequenceFork) -> None:
        if self._pool is not None:
            self._pool.fork(fork.seq_id, fork.parent_seq_id)

    def suspend(self, seq_id: int) -> None:
        """Raises `ValueError` for a policy that keeps nothing of a sequence."""
        if self._pool is None:
            raise ValueError(f"sequence {seq_id} cannot be suspended with {self._spec.policy}")
        self._pool.suspend(seq_id)

    def is_suspended(self, seq_id: int) -> bool:
        """Whether nothing but its scores is on this rank."""
        return self._pool is not None and self._pool.is_suspended(seq_id)

    def end(self, seq_id: int) -> None:
        if self._pool is not None:
            self._pool.end(seq_id)

    def observer(self, steps: list[SequenceStep], layout: StepLayout, batch: ForwardBatch) -> Observer | None:
        """What the forward pass of a step is to look at: with h2o everything, otherwise the last queries before each
        compaction. None: nothing. Raises `ValueError` where the step does not compute these queries."""
        if self._pool is not None:
            return Observer(batch, layout, np.arange(len(steps)), layout.counts)
        places = np.array([i for i, step in enumerate(steps) if step.compaction is not None], np.int64)
        if not len(places):
            return None
        window = self._spec.window
        if (layout.counts[places] < window).any():
            raise ValueError(f"{self._spec.policy} compacts by the last {window} queries, which one step must compute")
        return Observer(batch, layout, places, np.full(len(places), window))

    def finish(self, steps: list[SequenceStep], observer: Observer, cache: torch.Tensor) -> None:
        """Once the step is computed: compact what it says. `cache`: of the one KV group."""
        received = dict(zip(observer.places.tolist(), observer.scores(), strict=True))
        compacted = [place for place, step in enumerate(steps) if step.compaction is not None]
        if self._pool is not None:
            for place, scores in received.items():
                self._pool.add(steps[place].seq_id, scores)
            received = {place: self._pool.scores(steps[place].seq_id) for place in compacted}
        if not compacted:
            return
        chosen: list[torch.Tensor] = []
        for place, scores in zip(compacted, self._summed([received[place] for place in compacted]), strict=True):
            compaction = steps[place].compaction
            assert compaction is not None
            chosen.append(select(self._spec, scores, compaction.num_kept))
            if self._pool is not None:
                self._pool.keep(steps[place].seq_id, chosen[-1])
        self._move([steps[place] for place in compacted], chosen, cache)

    def _summed(self, scores: list[torch.Tensor]) -> list[torch.Tensor]:
        """Over the ranks that hold the same KV head, each with some of the query heads that read it."""
        if self._layout.tp_size <= self._total_num_kv_heads:
            return scores
        # Each: [num_layers, 1, rows]
        sizes = [each.numel() for each in scores]
        mine = torch.cat([each.reshape(-1) for each in scores])
        every = mine.new_zeros(self._total_num_kv_heads, len(mine))
        every[self._layout.kv_heads.start] = mine
        summed = torch.split(self._comm.all_reduce(every)[self._layout.kv_heads.start], sizes)
        return [part.view(each.shape) for part, each in zip(summed, scores, strict=True)]

    def _move(self, steps: list[SequenceStep], chosen: list[torch.Tensor], cache: torch.Tensor) -> None:
        """Bring the chosen rows, `[num_layers, num_kv_heads, kept]` each, into the new blocks, and tell the table."""
        device = cache.device
        counts = [rows.shape[-1] for rows in chosen]
        rows = torch.zeros(len(steps), *chosen[0].shape[:-1], max(counts), dtype=torch.int32, device=device)
        for index, (count, kept) in enumerate(zip(counts, chosen, strict=True)):
            rows[index, ..., :count] = kept
        sources = self._tables(steps)
        for step, count in zip(steps, counts, strict=True):
            assert step.compaction is not None
            self._table.compact(step.seq_id, count, step.compaction.new_block_ids)
        targets, num_kept = self._tables(steps), torch.tensor(counts, dtype=torch.int32, device=device)
        sources, targets = sources.to(device), targets.to(device)
        for layer in range(cache.shape[1]):
            compact_rows(cache, layer, rows[:, layer].contiguous(), sources, targets, num_kept)

    def _tables(self, steps: list[SequenceStep]) -> torch.Tensor:
        # [num_seqs, max_blocks]
        places = [self._table.row(step.seq_id) for step in steps]
        return torch.from_numpy(self._table.block_tables[0][places, : self._table.num_blocks[0, places].max()].copy())
