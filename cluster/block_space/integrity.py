"""The invariants of DESIGN §3, checked from scratch: after every step in tests and in debug mode."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from .block_pool import NULL_BLOCK, BlockPool, State
from .sequence_blocks import SequenceBlocks
from .tiers import Tiers
from .windows import Window, Windows


class Space(Protocol):
    """What is checked: the parts of a `BlockSpace`."""

    block_size: int
    devices: list[BlockPool]
    hosts: list[BlockPool]
    tiers: Tiers
    windows: Windows
    live: dict[int, SequenceBlocks]
    num_unused_slots: int

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""


def check_integrity(space: Space) -> None:
    """Raises `AssertionError` that says which invariant does not hold."""
    loads = space.tiers.check_integrity()
    for group, (device, host) in enumerate(zip(space.devices, space.hosts, strict=True)):
        entries = [entry for blocks in space.live.values() for entry in blocks.tables[group]]
        device.check_integrity(Counter(entry for entry in entries if entry > 0))
        host.check_integrity(Counter(-entry for entry in entries if entry < 0) + Counter(loads.get(group)))
        assert group in loads or not any([*device.keys, *host.keys]), "a block that is being filled can be found"
        assert not device.counts[State.EMPTIED] and not host.counts[State.EMPTIED], "emptied beyond its plan"
    tails: dict[int, int] = {}
    for seq_id, blocks in space.live.items():
        assert blocks.seq_id == seq_id
        assert not (blocks.num_dropped and blocks.num_keyed), f"sequence {seq_id} offers what is no prefix"
        assert blocks.capacity == space.blocks_for(blocks.num_tokens) * space.block_size, f"capacity of {seq_id}"
        for group, table in enumerate(blocks.tables):
            assert table and len(table) * space.block_size == blocks.capacity, f"table of sequence {seq_id}"
            _check_behind(space.windows.by_group[group], blocks, group)
            _check_keys(space, group, blocks.keys, table, blocks.num_tokens)
            _check_writable(space, group, table, blocks.num_tokens, blocks.may_share_tail)
        if blocks.num_tokens < blocks.capacity and blocks.tables[0][-1] > 0:
            tails[blocks.tables[0][-1]] = blocks.capacity - blocks.num_tokens
    assert space.num_unused_slots == sum(tails.values()), "unused slots"


def _check_behind(window: Window | None, blocks: SequenceBlocks, group: int) -> None:
    """A table has a block wherever a query to come may read."""
    table, num_behind = blocks.tables[group], blocks.num_behind[group]
    if window is None:
        assert num_behind == 0 and NULL_BLOCK not in table, f"sequence {blocks.seq_id} lacks a block"
        return
    assert num_behind <= window.first_seen(blocks.num_tokens), "a block was given up too early"
    seen = table[: window.num_sink_blocks] + table[max(window.num_sink_blocks, num_behind):]
    assert NULL_BLOCK not in seen, f"sequence {blocks.seq_id} lacks a block"
    assert not any(table[window.num_sink_blocks: num_behind]), f"sequence {blocks.seq_id} holds what nobody reads"


def _check_keys(space: Space, group: int, keys: list[bytes], table: list[int], num_tokens: int) -> None:
    """Invariant 3: a registered block is full and holds the prefix of its key."""
    for index, entry in enumerate(table):
        pool = space.devices[group] if entry > 0 else space.hosts[group]
        if entry and (key := pool.keys[abs(entry)]) is not None:
            assert (index + 1) * space.block_size <= num_tokens, "a registered block is not full"
            assert index < len(keys) and keys[index] == key, "a block is registered under another prefix"


def _check_writable(space: Space, group: int, table: list[int], num_tokens: int, may_share_tail: bool) -> None:
    """Invariant 2: the block written next has one reader, or is known to need a copy first."""
    if num_tokens % space.block_size and table[-1] > 0:
        assert may_share_tail or space.devices[group].ref_counts[table[-1]] == 1, "two sequences would write a block"
