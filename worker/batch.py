"""Where scheduling becomes tensors: all slot arithmetic is in this file and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from ..protos.step import SequenceFork, SequenceStart, SequenceStep

Ints = npt.NDArray[np.int64]
_NO_ROWS: Ints = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One flat ragged batch: prefill chunks and decodes together, T tokens of S sequences."""

    token_ids: torch.Tensor
    """`[T]` int64."""
    positions: torch.Tensor
    """`[T]` int64, in the text: what rotary or learned positions go by."""
    query_start_loc: torch.Tensor
    """`[S + 1]` int32: sequence s owns rows `query_start_loc[s] : query_start_loc[s + 1]`."""
    kv_lens: torch.Tensor
    """`[S]` int32: rows of the KV cache that the last token of each sequence sees, its own included."""
    block_tables: list[torch.Tensor]
    """Per KV group `[S, max_blocks]` int32; entries past a sequence's last block are 0 and never read."""
    slot_mapping: list[torch.Tensor]
    """Per KV group `[T]` int64: `block_id * block_size + offset` where each token's K and V go."""
    sampled_rows: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """`[R]` int64: of the T rows those whose likeliest next token is wanted."""
    filled_blocks: list[torch.Tensor] = field(default_factory=list)
    """Beside a residual, per KV group `[num_filled]` int64: blocks whose last slot is filled in this step."""


class SequenceTable:
    """The sequences that a rank holds, one row each in fixed arrays, so that a step is built without Python loops
    over tokens. Rows are taken by `start` and `fork` and given back by `end`."""

    def __init__(self, num_rows: int, max_model_len: int, block_size: int, num_kv_groups: int, *,
                 has_residual: bool = False) -> None:
        """`has_residual`: the last KV group is the residual of an int4 cache."""
        max_blocks = -(-max_model_len // block_size)
        self.block_size = block_size
        self.has_residual = has_residual
        # Untouched pages of these cost nothing: the operating system hands memory out as it is written.
        self.token_ids = np.zeros((num_rows, max_model_len + 1), np.int32)
        self.block_tables = [np.zeros((num_rows, max_blocks), np.int32) for _ in range(num_kv_groups)]
        self.num_blocks = np.zeros((num_kv_groups, num_rows), np.int64)
        self.num_tokens = np.zeros(num_rows, np.int64)
        self.num_computed = np.zeros(num_rows, np.int64)
        self.num_dropped = np.zeros(num_rows, np.int64)
        """By compactions: token p of a sequence is in KV row p - num_dropped of its blocks."""
        self._rows: dict[int, int] = {}
        self._free = list(range(num_rows - 1, -1, -1))

    def start(self, start: SequenceStart) -> int:
        """Take a row for a sequence; its blocks come with its first step."""
        row = self._rows[start.seq_id] = self._free.pop()
        count = len(start.token_ids)
        self.token_ids[row, :count] = start.token_ids
        self.num_tokens[row] = count
        self.num_computed[row] = start.num_computed_tokens
        self.num_dropped[row] = start.num_dropped_tokens
        self.num_blocks[:, row] = 0
        return row

    def fork(self, fork: SequenceFork) -> int:
        """Take a row for a sequence that begins as its parent stands: tokens, blocks, and how far it is computed."""
        parent = self._rows[fork.parent_seq_id]
        row = self._rows[fork.seq_id] = self._free.pop()
        count = self.num_tokens[parent]
        self.token_ids[row, :count] = self.token_ids[parent, :count]
        self.num_tokens[row] = count
        self.num_computed[row] = self.num_computed[parent]
        self.num_dropped[row] = self.num_dropped[parent]
        self.num_blocks[:, row] = self.num_blocks[:, parent]
        for table in self.block_tables:
            table[row] = table[parent]
        return row

    def end(self, seq_id: int) -> int:
        """Give the row of a sequence back."""
        row = self._rows.pop(seq_id)
        for table in self.block_tables:
            table[row] = 0
        self._free.append(row)
        return row

    def row(self, seq_id: int) -> int:
        return self._rows[seq_id]

    def tokens(self, seq_id: int) -> npt.NDArray[np.int32]:
        """All known tokens of a sequence: a view."""
        row = self._rows[seq_id]
        return self.token_ids[row, :self.num_tokens[row]]

    def append(self, rows: Ints, token_ids: Ints) -> None:
        """One sampled token to each of `rows`."""
        self.token_ids[rows, self.num_tokens[rows]] = token_ids
        self.num_tokens[rows] += 1

    def take(self, step: SequenceStep) -> None:
        """What a step brings to its sequence before it is computed: blocks, copies of blocks, tokens."""
        row = self._rows[step.seq_id]
        for group, block_ids in enumerate(step.new_block_ids):
            begin = self.num_blocks[group, row]
            self.block_tables[group][row, begin: begin + len(block_ids)] = block_ids
            self.num_blocks[group, row] += len(block_ids)
        for group, block_id in enumerate(step.copied_block_ids):
            next_row = self.num_computed[row] - self.num_dropped[row]
            self.block_tables[group][row, next_row // self.block_size] = block_id
        begin = self.num_tokens[row]
        self.token_ids[row, begin: begin + len(step.token_ids)] = step.token_ids
        self.num_tokens[row] += len(step.token_ids)

    def compact(self, seq_id: int, num_kept: int, new_block_ids: list[list[int]]) -> None:
        """A sequence holds `num_kept` KV rows from now on, in these blocks alone."""
        row = self._rows[seq_id]
        for group, block_ids in enumerate(new_block_ids):
            self.block_tables[group][row] = 0
            self.block_tables[group][row, :len(block_ids)] = block_ids
            self.num_blocks[group, row] = len(block_ids)
        self.num_dropped[row] = self.num_computed[row] - num_kept


@dataclass(frozen=True, slots=True)
class StepLayout:
    """A step's rows and extents, S sequences in plan order, before they become tensors."""

    rows: Ints
    """Of the `SequenceTable`."""
    begins: Ints
    """First position computed in this step."""
    counts: Ints
    dropped: Ints
    """How many positions before `begins` have no KV row any more."""
    query_start_loc: Ints

    @property
    def ends(self) -> Ints:
        return self.begins + self.counts

    @property
    def row_ends(self) -> Ints:
        """KV rows that each sequence holds once the step is computed."""
        return self.ends - self.dropped


def lay_out(steps: list[SequenceStep], table: SequenceTable) -> StepLayout:
    """Give the sequences what `steps` bring and find their places. Nothing is marked as computed yet."""
    for step in steps:
        if step.new_block_ids or step.copied_block_ids or step.token_ids:
            table.take(step)
    rows = np.array([table.row(step.seq_id) for step in steps], np.int64)
    counts = np.array([step.num_tokens for step in steps], np.int64)
    query_start_loc = np.zeros(len(steps) + 1, np.int64)
    np.cumsum(counts, out=query_start_loc[1:])
    return StepLayout(rows, table.num_computed[rows], counts, table.num_dropped[rows], query_start_loc)


def build(layout: StepLayout, table: SequenceTable, device: torch.device, sampled_rows: Ints | None = None,
          ) -> ForwardBatch:
    """The tensors of a step. `sampled_rows`: as in `ForwardBatch`; None: of no row."""
    token_rows = np.repeat(layout.rows, layout.counts)
    positions = np.arange(len(token_rows)) + np.repeat(layout.begins - layout.query_start_loc[:-1], layout.counts)
    row_ends = layout.row_ends
    max_blocks = -(-int(row_ends.max()) // table.block_size)
    block_index, offset = np.divmod(positions - np.repeat(layout.dropped, layout.counts), table.block_size)
    on_cpu = device.type == "cpu"

    def tensor(array: npt.NDArray[np.generic], dtype: type[np.int32] | type[np.int64]) -> torch.Tensor:
        here = torch.from_numpy(np.ascontiguousarray(array, dtype))
        # Between steps nothing is in the processor's caches: a call of torch costs ten microseconds, even for nothing.
        return here if on_cpu else here.to(device)

    return ForwardBatch(
        token_ids=tensor(table.token_ids[token_rows, positions], np.int64),
        positions=tensor(positions, np.int64),
        query_start_loc=tensor(layout.query_start_loc, np.int32),
        kv_lens=tensor(row_ends, np.int32),
        block_tables=[tensor(blocks[layout.rows, :max_blocks], np.int32) for blocks in table.block_tables],
        slot_mapping=[
            tensor(blocks[token_rows, block_index].astype(np.int64) * table.block_size + offset, np.int64)
            for blocks in table.block_tables],
        sampled_rows=tensor(_NO_ROWS if sampled_rows is None else sampled_rows, np.int64),
        filled_blocks=[tensor(block_ids, np.int64) for block_ids in _filled(layout, table)],
    )


def _filled(layout: StepLayout, table: SequenceTable) -> list[npt.NDArray[np.int32]]:
    """`ForwardBatch.filled_blocks`."""
    if not table.has_residual:
        return []
    first = layout.begins // table.block_size
    counts = layout.ends // table.block_size - first
    index = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    rows = np.repeat(layout.rows, counts)
    return [blocks[rows, index] for blocks in table.block_tables]
