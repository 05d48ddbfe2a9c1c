"""Which sequences the ranks hold, and in which blocks: bookkeeping of plans, for the memory model and the machine."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain

from kvarto.protos.model import KVGroupSpec
from kvarto.protos.step import BlockMoves, SequenceFork, StepPlan

Block = tuple[int, int]
"""(KV group, block id)"""


def moves_of(plan: StepPlan) -> BlockMoves:
    """Of a plan for one KV group."""
    assert len(plan.moves) <= 1, "there is one KV group"
    return plan.moves[0] if plan.moves else BlockMoves()


def moves_by_group(plan: StepPlan, num_groups: int) -> list[BlockMoves]:
    assert len(plan.moves) in (0, num_groups), "moves are per KV group"
    return plan.moves or [BlockMoves() for _ in range(num_groups)]


def blocks_of(moves: list[BlockMoves], kind: str, place: int) -> set[Block]:
    """The sources (0) or destinations (1) of the moves of a kind."""
    return {(group, move[place]) for group, each in enumerate(moves) for move in getattr(each, kind)}


def first_seen(group: KVGroupSpec, position: int, block_size: int) -> int:
    """The first position behind the sinks that a query at `position` sees; sinks are all that is seen before it."""
    if group.residual:
        return position // block_size * block_size
    return 0 if group.window is None else max(0, position - group.window + 1)


class HeldSequences:
    """Block tables and lengths of the sequences that the ranks hold, followed from the plans alone. What no query to
    come sees of a table is nobody's business: 0 stands in its place."""

    def __init__(self, block_size: int, kv_groups: list[KVGroupSpec] | None = None) -> None:
        self.block_size = block_size
        self.kv_groups = kv_groups or [KVGroupSpec(layer_ids=(0,))]
        self.tables: dict[int, list[list[int]]] = {}
        """Per sequence and KV group."""
        self.computed: dict[int, int] = {}
        self.dropped: dict[int, int] = {}
        """Rows that compactions have dropped of the computed tokens."""
        self.suspended: dict[int, tuple[int, int]] = {}
        """Of sequences that come back: computed, dropped."""
        self.fresh: set[int] = set()
        """Sequences that the present plan starts."""
        self._num_passed: dict[int, list[int]] = {}

    def change(self, plan: StepPlan) -> set[Block]:
        """Forks, ends and starts of a plan. Returns the blocks of the sequences that were here before and still are."""
        for fork in plan.forks:
            self._fork(fork)
        for seq_id in plan.suspends:
            self.suspended[seq_id] = self.computed[seq_id], self.dropped[seq_id]
            self._forget(seq_id)
        for seq_id in plan.ends:
            if self.suspended.pop(seq_id, None) is None:
                self._forget(seq_id)
        survivors = {block for seq_id in self.tables for block in self.blocks(seq_id)}
        self.fresh = {start.seq_id for start in plan.starts}
        for start in plan.starts:
            assert start.seq_id not in self.tables, "a sequence that is held starts again"
            assert 0 <= start.num_computed_tokens < len(start.token_ids), "a start leaves nothing to compute"
            self.tables[start.seq_id] = [[] for _ in self.kv_groups]
            self.computed[start.seq_id] = start.num_computed_tokens
            self.dropped[start.seq_id] = start.num_dropped_tokens
            lengths = start.num_computed_tokens, start.num_dropped_tokens
            assert self.suspended.pop(start.seq_id, lengths) == lengths, "what was kept is of another length"
            self._num_passed[start.seq_id] = [0] * len(self.kv_groups)
        return survivors

    def rows(self, seq_id: int) -> int:
        """Slots that are filled."""
        return self.computed[seq_id] - self.dropped[seq_id]

    def blocks(self, seq_id: int) -> set[Block]:
        """Those that the sequence has from now on to do with."""
        return {(group, block) for group, table in enumerate(self.tables[seq_id]) for block in table if block}

    def grant(self, plan: StepPlan) -> dict[int, set[Block]]:
        """Blocks that the steps bring. Returns per stepped sequence those that it is about to write."""
        moves, writes = moves_by_group(plan, len(self.kv_groups)), {}
        swapped_in = blocks_of(moves, "swap_ins", 1)
        for step in plan.steps:
            assert step.num_tokens > 0
            assert step.seq_id not in writes, "a sequence has two steps in one plan"
            begin = self.rows(step.seq_id)
            first, end = begin // self.block_size, begin + step.num_tokens
            for table, new in zip(self.tables[step.seq_id], step.new_block_ids, strict=False):
                table.extend(new)
            for group, new in enumerate(step.copied_block_ids):
                old, self.tables[step.seq_id][group][first] = self.tables[step.seq_id][group][first], new
                assert (old, new) in moves[group].copies or (
                    step.seq_id in self.fresh and (group, new) in swapped_in), (
                    f"block {new} takes the place of {old}, and nothing brings its contents")
                assert any(old in tables[group] for tables in self.tables.values()), f"block {old} is copied for nobody"
            self._pass_by(step.seq_id)
            written = set()
            for group, table in enumerate(self.tables[step.seq_id]):
                held = [block for block in table if block]
                assert len(set(held)) == len(held), "a block stands in a table twice"
                assert len(table) * self.block_size >= end, "a table is too short for what is computed"
                written |= {(group, block) for block in table[first: -(-end // self.block_size)]}
            writes[step.seq_id] = written
        self._check_writes(writes)
        self._check_compactions(plan, moves)
        return writes

    @staticmethod
    def compacted(plan: StepPlan) -> list[Block]:
        """The blocks that the compactions of a plan write."""
        return [(group, block) for step in plan.steps if step.compaction
                for group, new in enumerate(step.compaction.new_block_ids) for block in new]

    def finish(self, plan: StepPlan) -> None:
        """The steps are computed; their siblings appear."""
        for step in plan.steps:
            self.computed[step.seq_id] += step.num_tokens
            self._pass_by(step.seq_id)
            if step.compaction:
                self.tables[step.seq_id] = [list(new) for new in step.compaction.new_block_ids]
                self.dropped[step.seq_id] += self.rows(step.seq_id) - step.compaction.num_kept
        for sibling in plan.siblings:
            self._fork(sibling)

    def _pass_by(self, seq_id: int) -> None:
        """Forget what lies wholly behind a window and is no sink."""
        for group, (spec, table) in enumerate(zip(self.kv_groups, self.tables[seq_id], strict=True)):
            end = min(len(table), first_seen(spec, self.computed[seq_id], self.block_size) // self.block_size)
            for index in range(self._num_passed[seq_id][group], end):
                if index * self.block_size >= spec.num_sinks:
                    table[index] = 0
            self._num_passed[seq_id][group] = max(end, self._num_passed[seq_id][group])

    def _check_writes(self, writes: dict[int, set[Block]]) -> None:
        """Nobody else holds a block that is written, but those who start in this plan and find it computed whole."""
        written = set(chain.from_iterable(writes.values()))
        holders = defaultdict(list)
        for seq_id, tables in self.tables.items():
            for group, table in enumerate(tables):
                for index, block in enumerate(table):
                    if (group, block) in written:
                        holders[group, block].append((seq_id, (index + 1) * self.block_size))
        for seq_id, blocks in writes.items():
            for block in blocks:
                for other, end in holders[block]:
                    assert other == seq_id or (other in self.fresh and end <= self.rows(other)), (
                        f"sequence {seq_id} writes into block {block}, which sequence {other} holds too")

    def _check_compactions(self, plan: StepPlan, moves: list[BlockMoves]) -> None:
        """What a compaction writes is nobody's: no step and no move of the plan has to do with it, but a swap-out that
        emptied it."""
        fresh = self.compacted(plan)
        assert len(set(fresh)) == len(fresh), "two compactions write one block"
        others = {block for seq_id in self.tables for block in self.blocks(seq_id)}
        others |= blocks_of(moves, "swap_ins", 1) | blocks_of(moves, "copies", 0) | blocks_of(moves, "copies", 1)
        assert not others.intersection(fresh), "a compaction writes a block that the plan reads or fills"
        for step in plan.steps:
            if compaction := step.compaction:
                num_blocks = -(-compaction.num_kept // self.block_size)
                num_rows = self.rows(step.seq_id) + step.num_tokens
                assert 0 < compaction.num_kept < num_rows, "a compaction drops nothing, or everything"
                assert [len(new) for new in compaction.new_block_ids] == [num_blocks] * len(self.kv_groups), (
                    "too many blocks, or too few, for what a compaction keeps")

    def _forget(self, seq_id: int) -> None:
        del self.tables[seq_id], self.computed[seq_id], self.dropped[seq_id], self._num_passed[seq_id]

    def _fork(self, fork: SequenceFork) -> None:
        assert fork.seq_id not in self.tables, "a sequence that is held is forked into being"
        parent = fork.parent_seq_id
        if parent in self.suspended:
            self.suspended[fork.seq_id] = self.suspended[parent]
            return
        self.dropped[fork.seq_id] = self.dropped[parent]
        self.tables[fork.seq_id] = [list(table) for table in self.tables[parent]]
        self.computed[fork.seq_id] = self.computed[parent]
        self._num_passed[fork.seq_id] = list(self._num_passed[parent])
