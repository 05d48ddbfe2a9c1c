"""The block tables of every sequence: growing, forking with copy-on-write, sharing by content, swapping, freeing."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from ...protos.errors import ConfigError, KvartoError
from ...protos.model import KVGroupSpec
from ...protos.sparsity import KVSparsity
from ...protos.step import BlockMoves
from ..policies import EVICTION, pick
from .block_pool import BlockPool, State
from .integrity import check_integrity
from .plan_moves import PlanMoves
from .prefix_keys import PrefixKeys
from .prefix_match import Match, PrefixMatcher
from .sequence_blocks import SequenceBlocks
from .sparsity import Sparsity
from .swapping import Swapper
from .tiers import Tiers
from .windows import Need, Windows


class Answer(Enum):
    """To an allocation. NEVER: not even alone in the pool; the request must be refused, for waiting cannot help."""

    OK = "ok"
    LATER = "later"
    NEVER = "never"


class BlockSpace:
    """Owns the device and host blocks of one worker group. Block id b means the same block on every rank of it.

    What moves blocks adds to the moves of the plan being made, which `end_plan` hands over.
    """

    def __init__(
        self, kv_groups: list[KVGroupSpec], num_blocks: list[int], block_size: int, *,
        num_host_blocks: list[int] | None = None, enable_prefix_caching: bool = False, hash_key: bytes = b"",
        eviction_policy: str = "lru", disk_capacity: int = 0, stored_keys: Iterable[bytes] = (),
        orphaned_keys: Iterable[bytes] = (), sparsity: KVSparsity | None = None,
    ) -> None:
        """`hash_key` is the secret of the prefix keys; `disk_capacity` and what follows as in `Tiers`. Raises
        `ConfigError` for an unknown policy, and for sparsity where a KV group has a window."""
        eviction = pick(EVICTION, "eviction_policy", eviction_policy)
        self.kv_groups = kv_groups
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.devices = [BlockPool(n, keep_cached=enable_prefix_caching, eviction=eviction) for n in num_blocks]
        self.hosts = [BlockPool(n, keep_cached=enable_prefix_caching, eviction=eviction)
                      for n in num_host_blocks or [0] * len(num_blocks)]
        self.prefix_keys = PrefixKeys(hash_key, block_size)
        self.moves = PlanMoves(len(kv_groups))
        # A residual's blocks are found by nobody: what is full there was quantized.
        self._keyed_groups = [group for group, spec in enumerate(kv_groups) if not spec.residual]
        self.tiers = Tiers(self.devices, self.hosts, self.moves, self._keyed_groups, disk_capacity=disk_capacity,
                           stored_keys=stored_keys, orphaned_keys=orphaned_keys)
        self.windows = Windows(kv_groups, block_size)
        self.sparsity = Sparsity(sparsity, block_size) if sparsity else None
        if self.sparsity and self.windows.any:
            raise ConfigError("kv_sparsity does not go with layers that have a window", param="kv_sparsity")
        self._matcher = PrefixMatcher(self.devices, self.hosts, self.moves, self.windows, block_size)
        self._swapper = Swapper(self.devices, self.hosts, self.moves)
        self.live: dict[int, SequenceBlocks] = {}
        """Sequences that hold blocks."""
        self.num_unused_slots = 0
        """Slots of device blocks in use that are not taken by a token, of one KV group. (A token in the block being
        filled takes one in an int4 pool too, before it is written there.)"""
        self.num_compactions = 0
        self.num_dropped_rows = 0

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        return sum(device.num_blocks for device in self.devices)

    @property
    def num_free(self) -> int:
        """Blocks that could be given out now, cached ones included."""
        return sum(device.num_available() for device in self.devices)

    @property
    def num_used(self) -> int:
        return sum(device.counts[State.USED] for device in self.devices)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that one sequence, alone, could hold; where every KV group has a window, those that the smallest pool
        holds at a time."""
        groups = self._keyed_groups
        sizes = [self.devices[group].num_blocks for group in groups if self.kv_groups[group].window is None]
        return min(sizes or [self.devices[group].num_blocks for group in groups]) * self.block_size

    @property
    def slots(self) -> tuple[int, int]:
        """(slots that hold a token, slots of device blocks in use), summed over the KV groups."""
        allocated = self.num_used * self.block_size
        return allocated - self.num_unused_slots * len(self.devices), allocated

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def answer(self, need: Need, *, count_releasing: bool = False) -> Answer:
        """Whether these blocks can be had now (with `count_releasing`, once the results in flight are in), later, or
        never."""
        if self.has_room(need, count_releasing=count_releasing):
            return Answer.OK
        fits = all(count <= device.num_blocks for count, device in zip(need, self.devices, strict=True))
        return Answer.LATER if fits else Answer.NEVER

    def has_room(self, need: Need, *, count_releasing: bool = False) -> bool:
        """Whether these blocks can be had now, or once the results in flight are in."""
        return all(count <= device.num_available(count_releasing=count_releasing)
                   for count, device in zip(need, self.devices, strict=True))

    # -- one sequence --------------------------------------------------------------------------------------------

    def open(self, seq_id: int, *, root: bytes | None = None, priority: int = 0) -> SequenceBlocks:
        """Empty tables for a sequence. `root`: what its prefix keys are chained to; None: it shares by forks alone."""
        return SequenceBlocks(seq_id, [[] for _ in self.devices], root=root, priority=priority)

    def extend_in_place(self, blocks: SequenceBlocks, num_tokens: int) -> bool:
        """Fill slots that the sequence holds and that nobody else reads; False where `grow` is needed."""
        if num_tokens > blocks.capacity or blocks.may_share_tail:
            return False
        self.num_unused_slots -= num_tokens - blocks.num_tokens
        blocks.num_tokens = num_tokens
        return True

    def release_behind_windows(self, blocks: SequenceBlocks, *, busy_until: int) -> None:
        """Give back the blocks that no token from the next one on sees. `busy_until`: the last plan that names the
        sequence."""
        self.windows.release_behind(blocks, self.devices, self.hosts, busy_until)

    def num_missing(self, members: list[tuple[SequenceBlocks, int]]) -> Need:
        """Blocks that growing these sequences to these numbers of tokens takes, copies included: equally many of every
        KV group, since a new block and a partly filled one stand in all of its tables."""
        missing = 0
        writers: dict[int, int] = {}
        for blocks, num_tokens in members:
            if num_tokens > blocks.capacity:
                missing += self.blocks_for(num_tokens) - len(blocks.tables[0])
            if blocks.may_share_tail and blocks.num_tokens < blocks.capacity:
                tail = blocks.tables[0][-1]
                writers[tail] = writers.get(tail, 0) + 1
        for tail, count in writers.items():
            # The last one to write has the block for itself.
            pool = self.devices[0] if tail > 0 else self.hosts[0]
            missing += min(count, pool.ref_counts[abs(tail)] - 1)
        return [missing] * len(self.devices)

    def grow(self, blocks: SequenceBlocks, num_tokens: int) -> tuple[list[list[int]], list[int]]:
        """Make the tables hold `num_tokens`. Returns, per KV group, the blocks appended ([] for none in any) and the
        block that took the place of a shared last one ([] for none)."""
        copied = self._own_tail(blocks) if blocks.may_share_tail else []
        missing = self.blocks_for(num_tokens) - len(blocks.tables[0])
        new: list[list[int]] = []
        if missing > 0:
            new = [[device.allocate() for _ in range(missing)] for device in self.devices]
            for table, block_ids in zip(blocks.tables, new, strict=True):
                table.extend(block_ids)
            blocks.capacity += missing * self.block_size
            self.num_unused_slots += missing * self.block_size
            self.live[blocks.seq_id] = blocks
        self.num_unused_slots -= num_tokens - blocks.num_tokens
        blocks.num_tokens = num_tokens
        return new, copied

    def fork(self, parent: SequenceBlocks, child: SequenceBlocks) -> None:
        """Let `child`, which holds nothing, share all blocks of `parent`; the last one is copied when one of them
        writes into it."""
        if child.tables[0]:
            raise KvartoError("a fork already holds blocks: a scheduler defect")
        child.tables = [list(table) for table in parent.tables]
        for device, host, table in zip(self.devices, self.hosts, child.tables, strict=True):
            for entry in table:
                if entry > 0:
                    device.take(entry)
                elif entry < 0:
                    host.take(-entry)
        child.num_tokens, child.capacity = parent.num_tokens, parent.capacity
        child.num_dropped = parent.num_dropped
        child.num_behind = list(parent.num_behind)
        child.root, child.keys, child.num_keyed = parent.root, list(parent.keys), parent.num_keyed
        parent.may_share_tail = child.may_share_tail = parent.may_share_tail or parent.num_tokens < parent.capacity
        if child.tables[0]:
            self.live[child.seq_id] = child

    def free(self, blocks: SequenceBlocks, *, busy_until: int) -> None:
        """Give back all blocks of a sequence, which can be filled anew afterwards. `busy_until`: the last plan that
        names it."""
        for device, host, table in zip(self.devices, self.hosts, blocks.tables, strict=True):
            is_tail = True
            # From the end, so that of equally old blocks the beginnings of prompts are evicted last.
            for entry in reversed(table):
                if entry < 0:
                    host.release(-entry, busy_until)
                elif entry and device.release(entry, busy_until) and is_tail and device is self.devices[0]:
                    self.num_unused_slots -= blocks.capacity - blocks.num_tokens
                is_tail = False
            table.clear()
        blocks.num_tokens = blocks.capacity = blocks.num_keyed = blocks.num_dropped = 0
        blocks.num_behind = [0] * len(blocks.tables)
        blocks.may_share_tail = False
        self.live.pop(blocks.seq_id, None)

    def compact(self, blocks: SequenceBlocks, num_kept: int, *, busy_until: int) -> list[list[int]]:
        """Bring `num_kept` of the rows of a sequence into fresh blocks, which are returned per KV group and make up its
        tables from now on. `busy_until`: the plan that reads the others. The caller has checked that there is room."""
        fresh = [[device.allocate() for _ in range(self.blocks_for(num_kept))] for device in self.devices]
        num_gone, num_dropped = blocks.num_tokens - num_kept, blocks.num_dropped
        self.free(blocks, busy_until=busy_until)
        blocks.tables = [list(table) for table in fresh]
        blocks.num_tokens, blocks.num_dropped = num_kept, num_dropped + num_gone
        blocks.capacity = len(fresh[0]) * self.block_size
        self.num_unused_slots += blocks.capacity - num_kept
        self.live[blocks.seq_id] = blocks
        self.num_compactions += 1
        self.num_dropped_rows += num_gone
        return fresh

    # -- sharing by content --------------------------------------------------------------------------------------

    def match(self, blocks: SequenceBlocks, token_ids: list[int], most: int | None = None) -> Match:
        """The most cached blocks that `token_ids` can begin with, leaving at least one token to compute, and all after
        the first `most`."""
        if blocks.root is None:
            return []
        self.prefix_keys.extend(blocks.keys, blocks.root, token_ids, len(token_ids))
        most = len(token_ids) - 1 if most is None else min(len(token_ids) - 1, most)
        return self._matcher.find(blocks.keys[: most // self.block_size])

    def refresh(self, match: Match) -> None:
        """Host blocks of a match are now the last to be evicted."""
        self._matcher.refresh(match)

    def num_on_host(self, match: Match) -> int:
        """Host blocks of a match, in the KV group that has the most."""
        return self._matcher.num_on_host(match)

    def num_to_take(self, match: Match) -> Need:
        """Available device blocks that attaching a match uses up."""
        return self._matcher.num_to_take(match)

    def attach(self, blocks: SequenceBlocks, match: Match) -> None:
        """Begin the empty tables of a sequence with the blocks of a match."""
        if not match:
            return
        self._matcher.attach(blocks, match)
        blocks.num_tokens = blocks.capacity = len(match) * self.block_size
        self.windows.skip(blocks)
        self.live[blocks.seq_id] = blocks

    def offer(self, blocks: SequenceBlocks, token_ids: list[int]) -> None:
        """Let others find the full blocks of a sequence whose tokens are known: `token_ids` and nothing else fill them.

        Blocks that the plan being made fills count: whoever finds them reads them after that. Those of a sequence that
        has dropped rows hold no prefix.
        """
        num_full = min(blocks.num_tokens, len(token_ids)) // self.block_size
        if blocks.root is None or blocks.num_dropped or num_full <= blocks.num_keyed:
            return
        self.prefix_keys.extend(blocks.keys, blocks.root, token_ids, num_full * self.block_size)
        for group in self._keyed_groups:
            for index in range(blocks.num_keyed, num_full):
                entry, pools = blocks.tables[group][index], (self.devices, self.hosts)
                if entry and pools[entry < 0][group].keys[abs(entry)] is None:
                    pools[entry < 0][group].register(abs(entry), blocks.keys[index], blocks.priority)
        blocks.num_keyed = num_full

    def disown_keys(self, blocks: SequenceBlocks) -> None:
        """What nobody else holds is not to be found, in no tier: its contents may be wrong."""
        for key in blocks.keys:
            for pool in (*self.devices, *self.hosts):
                block_id = pool.find(key)
                if block_id is not None and pool.ref_counts[block_id] <= 1:
                    pool.forget(block_id)
            self.tiers.forget(key)

    # -- swapping ------------------------------------------------------------------------------------------------

    def num_to_swap_out(self, members: list[SequenceBlocks]) -> int | None:
        """Blocks that swapping a sequence group out would move, in the KV group that has the most; None: the host has
        no room for it."""
        return self._swapper.num_to_swap_out(members)

    def swap_out(self, members: list[SequenceBlocks], *, busy_until: int) -> None:
        """Move what the group alone holds to host memory; the plan being made may use the places."""
        self.num_unused_slots -= self._unused(members)
        self._swapper.swap_out(members, busy_until)

    def num_to_swap_in(self, members: list[SequenceBlocks]) -> Need:
        """Device blocks that bringing a group back takes."""
        return self._swapper.num_to_swap_in(members)

    def swap_in(self, members: list[SequenceBlocks]) -> None:
        """Bring a group back; `num_to_swap_in` blocks are there for it."""
        self._swapper.swap_in(members)
        self.num_unused_slots += self._unused(members)

    # -- plans ---------------------------------------------------------------------------------------------------

    def end_plan(self) -> list[BlockMoves]:
        """The moves of the plan that was made, per KV group; [] for none."""
        for device in self.devices:
            device.end_plan(self.moves.step_id)
        return self.moves.take()

    def step_done(self, step_id: int) -> None:
        """The result of a plan is here: what was releasing until then can be given out."""
        for pool in (*self.devices, *self.hosts):
            pool.step_done(step_id)

    def check_integrity(self) -> None:
        """Raises `AssertionError` where an invariant of DESIGN §3 does not hold."""
        check_integrity(self)

    # -- inside --------------------------------------------------------------------------------------------------

    def _own_tail(self, blocks: SequenceBlocks) -> list[int]:
        blocks.may_share_tail = False
        if blocks.num_tokens == blocks.capacity:
            return []
        tail = blocks.tables[0][-1]
        if self.devices[0].ref_counts[tail] == 1:
            return []
        copied = []
        for group, (device, table) in enumerate(zip(self.devices, blocks.tables, strict=True)):
            source_id, table[-1] = table[-1], device.allocate()
            self.moves.copy(group, source_id, table[-1])
            device.touch(source_id, self.moves.step_id)
            device.release(source_id)
            copied.append(table[-1])
        self.num_unused_slots += blocks.capacity - blocks.num_tokens
        return copied

    def _unused(self, members: list[SequenceBlocks]) -> int:
        """Unused slots of the device blocks that a group's sequences end with, a shared one counted once."""
        tails = {blocks.tables[0][-1]: blocks.capacity - blocks.num_tokens for blocks in members
                 if blocks.tables[0] and blocks.num_tokens < blocks.capacity}
        return sum(unused for tail, unused in tails.items() if tail > 0)
