"""The blocks of one KV group in one memory (device or host): reference counts, registered prefixes, an LRU of cached
blocks, and blocks that wait for the last plan that names them. Every operation is O(1) per block."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from enum import IntEnum

from ...protos.errors import KvartoError
from ..policies.eviction import NUM_LEVELS, Eviction, lru

NULL_BLOCK = 0
"""Stands in a table where no block is needed. Never written, never given out."""


class State(IntEnum):
    FREE = 0
    CACHED = 1
    """Nobody's, but its contents are a registered prefix: given out last, oldest first."""
    RELEASING = 2
    """Nobody's, and a plan in flight names it: not given out before that plan's result."""
    EMPTIED = 3
    """Nobody's, and the plan being made moves its contents to the host: may be given out within that plan."""
    USED = 4


class BlockPool:
    """Hands out block ids `1 .. num_blocks`, each in exactly one `State`.

    `on_evict(block_id, key)` is told of a cached block that is about to be given out for other contents.
    """

    def __init__(self, num_blocks: int, *, keep_cached: bool = False, eviction: Eviction = lru) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * (num_blocks + 1)
        self.states = [State.FREE] * (num_blocks + 1)
        self.keys: list[bytes | None] = [None] * (num_blocks + 1)
        self.on_evict: Callable[[int, bytes], None] | None = None
        self.counts = [num_blocks, 0, 0, 0, 0]
        """How many blocks are in each state."""
        self.num_shared = 0
        """Blocks that several table entries point at."""
        self.num_references = 0
        """Table entries that point into this pool."""
        self._keep_cached = keep_cached
        self._eviction = eviction
        self._free: deque[int] = deque(range(1, num_blocks + 1))
        self._emptied: OrderedDict[int, None] = OrderedDict()
        self._cached: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(NUM_LEVELS)]
        self._uses = [(0, 0)] * (num_blocks + 1)
        self._index: dict[bytes, int] = {}
        self._busy_until = [-1] * (num_blocks + 1)
        self._releasing: defaultdict[int, list[int]] = defaultdict(list)
        self._done_step_id = -1

    def num_available(self, *, count_releasing: bool = False) -> int:
        """Blocks that `allocate` could give out now, or once the results in flight are in."""
        counts = self.counts
        return (counts[State.FREE] + counts[State.CACHED] + counts[State.EMPTIED]
                + (counts[State.RELEASING] if count_releasing else 0))

    # -- ownership -----------------------------------------------------------------------------------------------

    def allocate(self) -> int:
        """A block with one reference and no contents. The caller has checked that there is one: `KvartoError` if not.
        """
        if self._free:
            block_id = self._free.popleft()
        elif self._emptied:
            block_id, _ = self._emptied.popitem(last=False)
            self._unregister(block_id)
        else:
            block_id = self._evict()
        self._set(block_id, State.USED)
        self.ref_counts[block_id] = 1
        self.num_references += 1
        return block_id

    def take(self, block_id: int) -> None:
        """One more reference to a block whose contents are wanted: one in use, or one that `find` found."""
        count = self.ref_counts[block_id] + 1
        self.ref_counts[block_id] = count
        self.num_references += 1
        if count == 2:
            self.num_shared += 1
        elif count == 1:
            state = self.states[block_id]
            if state is State.CACHED:
                del self._cached[self._eviction(*self._uses[block_id])][block_id]
            elif state is State.EMPTIED:
                del self._emptied[block_id]
            self._set(block_id, State.USED)

    def count_hit(self, block_id: int) -> None:
        """A block in use was found by its key: eviction may heed it."""
        priority, num_hits = self._uses[block_id]
        self._uses[block_id] = priority, num_hits + 1

    def release(self, block_id: int, busy_until: int = -1) -> bool:
        """One reference less; True if it was the last. `busy_until` is the last plan that names the block, or that of
        whoever gives it back."""
        count = self.ref_counts[block_id] - 1
        self.ref_counts[block_id] = count
        self.num_references -= 1
        if busy_until > self._busy_until[block_id]:
            self._busy_until[block_id] = busy_until
        if count:
            if count == 1:
                self.num_shared -= 1
            return False
        if self._busy_until[block_id] > self._done_step_id:
            self._set(block_id, State.RELEASING)
            self._releasing[self._busy_until[block_id]].append(block_id)
        else:
            self._rest(block_id)
        return True

    def empty(self, block_id: int, step_id: int) -> None:
        """The last reference is given back, and `step_id`, the plan being made, moves the contents away before anything
        else. Where somebody who has given the block back reads it in that plan, it waits for the result."""
        self.ref_counts[block_id] = 0
        self.num_references -= 1
        if self._busy_until[block_id] >= step_id:
            self._set(block_id, State.RELEASING)
            self._releasing[self._busy_until[block_id]].append(block_id)
        else:
            self._set(block_id, State.EMPTIED)
            self._emptied[block_id] = None

    def end_plan(self, step_id: int) -> None:
        """What the plan `step_id` has emptied and did not use itself waits for its result."""
        while self._emptied:
            block_id, _ = self._emptied.popitem()
            self._busy_until[block_id] = step_id
            self._set(block_id, State.RELEASING)
            self._releasing[step_id].append(block_id)

    def touch(self, block_id: int, step_id: int) -> None:
        """The plan `step_id` reads a block: it is not written anew before that plan's result."""
        self._busy_until[block_id] = max(self._busy_until[block_id], step_id)

    def step_done(self, step_id: int) -> None:
        """The result of `step_id` is here: what was releasing until then is free or cached."""
        self._done_step_id = step_id
        for busy_until in [busy_until for busy_until in self._releasing if busy_until <= step_id]:
            for block_id in self._releasing.pop(busy_until):
                # It may have been found and used again meanwhile.
                if self.states[block_id] is State.RELEASING and self._busy_until[block_id] <= step_id:
                    self._rest(block_id)

    # -- prefixes ------------------------------------------------------------------------------------------------

    def find(self, key: bytes) -> int | None:
        """The block that holds, or will hold before anything reads it, the prefix of this key."""
        return self._index.get(key)

    def register(self, block_id: int, key: bytes, priority: int = 0) -> bool:
        """The contents of a block in use are a prefix. False: another block holds the same already."""
        if key in self._index:
            return False
        self._index[key] = block_id
        self.keys[block_id] = key
        self._uses[block_id] = priority, 0
        return True

    def forget(self, block_id: int) -> None:
        """Nobody finds this block any more; one that was kept for its contents alone is free."""
        if self.states[block_id] is State.CACHED:
            del self._cached[self._eviction(*self._uses[block_id])][block_id]
            self._set(block_id, State.FREE)
            self._free.append(block_id)
        self._unregister(block_id)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _rest(self, block_id: int) -> None:
        if self.keys[block_id] is not None and self._keep_cached:
            self._set(block_id, State.CACHED)
            self._cached[self._eviction(*self._uses[block_id])][block_id] = None
        else:
            self._set(block_id, State.FREE)
            self._unregister(block_id)
            self._free.append(block_id)

    def _evict(self) -> int:
        for level in self._cached:
            if level:
                block_id, _ = level.popitem(last=False)
                key = self.keys[block_id]
                assert key is not None
                self._set(block_id, State.USED)
                if self.on_evict is not None:
                    self.on_evict(block_id, key)
                self._unregister(block_id)
                return block_id
        raise KvartoError("a block was asked for where none is free: a scheduler defect")

    def _unregister(self, block_id: int) -> None:
        key = self.keys[block_id]
        if key is not None:
            del self._index[key]
            self.keys[block_id] = None

    def _set(self, block_id: int, state: State) -> None:
        self.counts[self.states[block_id]] -= 1
        self.counts[state] += 1
        self.states[block_id] = state

    def check_integrity(self, references: dict[int, int]) -> None:
        """`references`: how many table entries point at each block. Raises `AssertionError` where the states do not add
        up (DESIGN invariants 1 and 3)."""
        cached = [block_id for level in self._cached for block_id in level]
        queued = {State.FREE: list(self._free), State.CACHED: cached, State.EMPTIED: list(self._emptied)}
        for state, block_ids in queued.items():
            assert len(block_ids) == len(set(block_ids)) == self.counts[state], f"{state.name}: a block is there twice"
            assert all(self.states[block_id] is state for block_id in block_ids), f"a block is not {state.name}"
        waiting = {block_id for block_ids in self._releasing.values() for block_id in block_ids}
        for block_id in range(1, self.num_blocks + 1):
            state, count = self.states[block_id], self.ref_counts[block_id]
            assert count == references.get(block_id, 0), f"block {block_id} has {count} references"
            assert (state is State.USED) == (count > 0), f"block {block_id} is {state.name} with {count} references"
            assert state is not State.RELEASING or block_id in waiting, f"block {block_id} would never be free again"
            key = self.keys[block_id]
            assert key is None or self._index[key] == block_id, "a key points at another block"
            assert state is not State.FREE or key is None, "a free block holds a key"
        assert sum(self.counts) == self.num_blocks and min(self.counts) >= 0, "a block is lost or was made up"
        assert len(self._index) == sum(key is not None for key in self.keys)
        assert self.num_references == sum(references.values())
        assert self.num_shared == sum(count > 1 for count in references.values())
