"""Sliding windows and sinks, in blocks: what no query reads any more, and how much of a pool that leaves in use. The
residual of an int4 cache is a window of another kind: a query reads its own block there."""

from __future__ import annotations

from dataclasses import dataclass

from ...protos.model import KVGroupSpec
from ...protos.request import KVPool
from .block_pool import NULL_BLOCK, BlockPool
from .sequence_blocks import SequenceBlocks

Need = list[int]
"""Blocks of each KV group that something takes."""


@dataclass(frozen=True, slots=True)
class Window:
    """Of one KV group. Every query reads the sinks' blocks, and those from `first_seen` of its position on."""

    size: int
    num_sink_blocks: int
    block_size: int

    def first_seen(self, position: int) -> int:
        """The first block behind those of the sinks that a query at `position`, or any later one, reads."""
        return max(self.num_sink_blocks, (position - self.size + 1) // self.block_size)


def window_of(group: KVGroupSpec, block_size: int) -> Window | None:
    if group.residual:
        # In whole blocks, to read one's own block and to see no token but one's own is the same.
        return Window(1, 0, block_size)
    return None if group.window is None else Window(group.window, -(-group.num_sinks // block_size), block_size)


def enough_blocks(
    group: KVGroupSpec | KVPool, block_size: int, num_seqs: int, max_num_batched_tokens: int,
) -> int | None:
    """Blocks of a KV group that so many sequences never exceed together, however long they are; None: it has no window.

    Between steps a sequence holds its sinks and its window, which may begin and end within a block, and in a step the
    blocks of its chunk as well. Blocks that wait for a result are not counted: who needs them waits, too.

    Of a residual a sequence holds one block between steps, and in a step that computes n of its tokens
    1 + floor((n - 1) / block_size) where these begin with a block, and at most 1 + ceil((n - 1) / block_size) where
    they go on within one. With at most one of the latter among the prompts of a step, these add up to no more than
    num_seqs + ceil((max_num_batched_tokens - 1) / block_size), since floor(a) + ceil(b) <= ceil(a + b). Of one request
    there never are two: its sequences begin one after another. Prompts of several priorities may be cut short within
    a block and go on in one step; they then wait for each other, as for any block.
    """
    if group.residual:
        return num_seqs + -(-(max_num_batched_tokens - 1) // block_size)
    if group.window is None:
        return None
    most_held = -(-group.window // block_size) + -(-group.num_sinks // block_size) + 2
    return num_seqs * most_held + -(-max_num_batched_tokens // block_size)


class Windows:
    """Which KV groups have a window. Where none has, every question is answered at once."""

    def __init__(self, kv_groups: list[KVGroupSpec], block_size: int) -> None:
        self.by_group = [window_of(group, block_size) for group in kv_groups]
        self._kv_groups = kv_groups
        self._block_size = block_size
        self._windowed = [(group, window) for group, window in enumerate(self.by_group) if window]
        self.any = bool(self._windowed)
        """Whether there is a KV group that has one."""

    def release_behind(
        self, blocks: SequenceBlocks, devices: list[BlockPool], hosts: list[BlockPool], busy_until: int,
    ) -> None:
        """Give back what no query from `blocks.num_tokens` on reads. Every entry of a table is looked at once."""
        for group, window in self._windowed:
            begin = max(window.num_sink_blocks, blocks.num_behind[group])
            end = window.first_seen(blocks.num_tokens)
            if begin >= end:
                continue
            table = blocks.tables[group]
            for index in range(begin, end):
                if entry := table[index]:
                    (devices if entry > 0 else hosts)[group].release(abs(entry), busy_until)
                    table[index] = NULL_BLOCK
            blocks.num_behind[group] = end

    def skip(self, blocks: SequenceBlocks) -> None:
        """The tables begin at `blocks.num_tokens`, with null blocks behind the windows of that position."""
        for group, window in self._windowed:
            blocks.num_behind[group] = window.first_seen(blocks.num_tokens)

    def cap(self, need: Need, num_seqs: int, max_num_batched_tokens: int) -> Need:
        """What so many sequences need to start, given what they would without windows."""
        if not self._windowed:
            return need
        capped = []
        for group, count in zip(self._kv_groups, need, strict=True):
            enough = enough_blocks(group, self._block_size, num_seqs, max_num_batched_tokens)
            capped.append(count if enough is None else min(count, enough))
        return capped
