"""The blocks of one KV group: a free list, and blocks that wait for the last plan that names them."""

from __future__ import annotations

from collections import deque

from ...protos.errors import KvartoError

NULL_BLOCK = 0
"""Stands in a table where no block is needed. Never written, never given out."""


class BlockPool:
    """Hands out block ids `1 .. num_blocks`, each in exactly one state: free, in use, or releasing.

    A block is *releasing* while a plan that names it is in flight although nobody owns it any more. Every operation
    is O(1) per block.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free: deque[int] = deque(range(1, num_blocks + 1))
        self._releasing: deque[tuple[int, list[int]]] = deque()
        self.num_releasing = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - self.num_releasing

    def num_available(self, count_releasing: bool) -> int:
        return len(self._free) + (self.num_releasing if count_releasing else 0)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks. The caller has checked that there are as many: `KvartoError` if not."""
        if count > len(self._free):
            raise KvartoError(f"asked for {count} blocks where {len(self._free)} are free: a scheduler defect")
        return [self._free.popleft() for _ in range(count)]

    def free(self, block_ids: list[int], *, busy_until: int | None) -> None:
        """Give blocks back. `busy_until` is the step id of a plan in flight that names them, or None."""
        if busy_until is None:
            self._free.extend(block_ids)
        elif block_ids:
            self._releasing.append((busy_until, block_ids))
            self.num_releasing += len(block_ids)

    def step_done(self, step_id: int) -> None:
        """The result of `step_id` is here: what was releasing until then is free."""
        kept: deque[tuple[int, list[int]]] = deque()
        for busy_until, block_ids in self._releasing:
            if busy_until <= step_id:
                self._free.extend(block_ids)
                self.num_releasing -= len(block_ids)
            else:
                kept.append((busy_until, block_ids))
        self._releasing = kept

    def check_integrity(self, in_use: list[int]) -> None:
        """`in_use`: every block id of every table. Raises `AssertionError` where the states do not add up."""
        releasing = [block_id for _, block_ids in self._releasing for block_id in block_ids]
        everything = [*self._free, *releasing, *in_use]
        assert len(releasing) == self.num_releasing
        assert len(everything) == len(set(everything)), "a block is in two states"
        assert sorted(everything) == list(range(1, self.num_blocks + 1)), "a block is lost or was made up"
