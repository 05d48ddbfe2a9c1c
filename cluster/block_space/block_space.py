"""Block tables of every sequence, per KV group, and the answers to an allocation."""

from __future__ import annotations

from enum import Enum

from ...protos.model import KVGroupSpec
from .block_pool import BlockPool


class Answer(Enum):
    """To an allocation. NEVER: not even alone in the pool; the request must be refused, for waiting cannot help."""

    OK = "ok"
    LATER = "later"
    NEVER = "never"


class BlockSpace:
    """Owns the device blocks of one worker group. Block id b means the same block on every rank of the group."""

    def __init__(self, kv_groups: list[KVGroupSpec], num_blocks: list[int], block_size: int) -> None:
        self.kv_groups = kv_groups
        self.block_size = block_size
        self.pools = [BlockPool(count) for count in num_blocks]
        self._tables: dict[int, list[list[int]]] = {}
        self._num_tokens: dict[int, int] = {}
        self._total_tokens = 0

    @property
    def num_blocks(self) -> int:
        return sum(pool.num_blocks for pool in self.pools)

    @property
    def num_free(self) -> int:
        return sum(pool.num_free for pool in self.pools)

    @property
    def num_used(self) -> int:
        return sum(pool.num_used for pool in self.pools)

    @property
    def num_releasing(self) -> int:
        return sum(pool.num_releasing for pool in self.pools)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that one sequence, alone, could hold."""
        return self.min_pool_blocks * self.block_size

    @property
    def min_pool_blocks(self) -> int:
        """Blocks of the smallest pool."""
        return min(pool.num_blocks for pool in self.pools)

    @property
    def slots(self) -> tuple[int, int]:
        """(slots that hold a token, slots of blocks in use), summed over the KV groups."""
        return self._total_tokens * len(self.pools), self.num_used * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_hold(self, num_tokens: list[int], *, watermark: int = 0, count_releasing: bool = False) -> Answer:
        """Whether new sequences of these lengths fit: now, leaving `watermark` blocks free, or ever.

        With `count_releasing`, blocks that become free with the results in flight count as free.
        """
        needed = sum(self.blocks_for(count) for count in num_tokens)
        if any(needed > pool.num_blocks for pool in self.pools):
            return Answer.NEVER
        if any(needed + watermark > pool.num_available(count_releasing) for pool in self.pools):
            return Answer.LATER
        return Answer.OK

    def can_grow(self, seq_id: int, num_tokens: int, *, count_releasing: bool = False) -> bool:
        """Whether the tables of `seq_id` can be made to hold `num_tokens`; `count_releasing` as in `can_hold`."""
        missing = self.blocks_for(num_tokens) - self._held(seq_id)
        return all(missing <= pool.num_available(count_releasing) for pool in self.pools)

    def grow(self, seq_id: int, num_tokens: int) -> list[list[int]]:
        """Make the tables of `seq_id` hold `num_tokens`. Returns the blocks appended per KV group; [] for none."""
        tables = self._tables.setdefault(seq_id, [[] for _ in self.pools])
        self._total_tokens += num_tokens - self._num_tokens.get(seq_id, 0)
        self._num_tokens[seq_id] = num_tokens
        missing = self.blocks_for(num_tokens) - len(tables[0])
        if missing <= 0:
            return []
        new = [pool.allocate(missing) for pool in self.pools]
        for table, block_ids in zip(tables, new, strict=True):
            table.extend(block_ids)
        return new

    def free(self, seq_id: int, *, busy_until: int | None) -> None:
        """Give back all blocks of a sequence; those named by the plan in flight `busy_until` become releasing."""
        self._total_tokens -= self._num_tokens.pop(seq_id, 0)
        for pool, table in zip(self.pools, self._tables.pop(seq_id, ()), strict=False):
            pool.free(table, busy_until=busy_until)

    def step_done(self, step_id: int) -> None:
        for pool in self.pools:
            pool.step_done(step_id)

    def block_tables(self, seq_id: int) -> list[list[int]]:
        """The tables of one sequence, per KV group; not to be changed by the caller."""
        return self._tables.get(seq_id, [[] for _ in self.pools])

    def check_integrity(self) -> None:
        """Raises `AssertionError` unless every block is in exactly one state and every table is as long as it must be
        (DESIGN invariants 1 and 2)."""
        for index, pool in enumerate(self.pools):
            pool.check_integrity([block_id for tables in self._tables.values() for block_id in tables[index]])
        for seq_id, tables in self._tables.items():
            for table in tables:
                assert len(table) == self.blocks_for(self._num_tokens[seq_id]), f"table of sequence {seq_id}"
        assert self._total_tokens == sum(self._num_tokens.values())

    def _held(self, seq_id: int) -> int:
        tables = self._tables.get(seq_id)
        return len(tables[0]) if tables else 0
