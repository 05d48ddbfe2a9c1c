"""Which sequences the ranks hold, and in which blocks: bookkeeping of plans, for the memory model and the machine."""

from __future__ import annotations

from collections import defaultdict

from kvarto.protos.step import BlockMoves, SequenceFork, StepPlan


def moves_of(plan: StepPlan) -> BlockMoves:
    assert len(plan.moves) <= 1, "there is one KV group"
    return plan.moves[0] if plan.moves else BlockMoves()


class HeldSequences:
    """Block tables and lengths of the sequences that the ranks hold, followed from the plans alone."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.tables: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.fresh: set[int] = set()
        """Sequences that the present plan starts."""

    def change(self, plan: StepPlan) -> set[int]:
        """Forks, ends and starts of a plan. Returns the blocks of the sequences that were here before and still are."""
        for fork in plan.forks:
            self._fork(fork)
        for seq_id in plan.ends:
            del self.tables[seq_id], self.computed[seq_id]
        survivors = {block for table in self.tables.values() for block in table}
        self.fresh = {start.seq_id for start in plan.starts}
        for start in plan.starts:
            assert start.seq_id not in self.tables, "a sequence that is held starts again"
            assert 0 <= start.num_computed_tokens < len(start.token_ids), "a start leaves nothing to compute"
            self.tables[start.seq_id], self.computed[start.seq_id] = [], start.num_computed_tokens
        return survivors

    def grant(self, plan: StepPlan) -> dict[int, list[int]]:
        """Blocks that the steps bring. Returns per stepped sequence those that it is about to write."""
        moves, writes = moves_of(plan), {}
        swapped_in = {block for _, block in moves.swap_ins}
        for step in plan.steps:
            assert step.num_tokens > 0
            assert step.seq_id not in writes, "a sequence has two steps in one plan"
            table, begin = self.tables[step.seq_id], self.computed[step.seq_id]
            first, end = begin // self.block_size, begin + step.num_tokens
            if step.new_block_ids:
                table.extend(step.new_block_ids[0])
            if step.copied_block_ids:
                old, new = table[first], step.copied_block_ids[0]
                assert (old, new) in moves.copies or (step.seq_id in self.fresh and new in swapped_in), (
                    f"block {new} takes the place of {old}, and nothing brings its contents")
                table[first] = new
                assert any(old in other for other in self.tables.values()), f"block {old} is copied for nobody"
            assert len(set(table)) == len(table), "a block stands in a table twice"
            assert len(table) * self.block_size >= end, "a table is too short for what is computed"
            writes[step.seq_id] = table[first: -(-end // self.block_size)]
        self._check_writes(writes)
        return writes

    def finish(self, plan: StepPlan) -> None:
        """The steps are computed; their siblings appear."""
        for step in plan.steps:
            self.computed[step.seq_id] += step.num_tokens
        for sibling in plan.siblings:
            self._fork(sibling)

    def _check_writes(self, writes: dict[int, list[int]]) -> None:
        """Nobody else holds a block that is written, but those who start in this plan and find it computed whole."""
        written = {block for blocks in writes.values() for block in blocks}
        holders = defaultdict(list)
        for seq_id, table in self.tables.items():
            for index, block in enumerate(table):
                if block in written:
                    holders[block].append((seq_id, (index + 1) * self.block_size))
        for seq_id, blocks in writes.items():
            for block in blocks:
                for other, end in holders[block]:
                    assert other == seq_id or (other in self.fresh and end <= self.computed[other]), (
                        f"sequence {seq_id} writes into block {block}, which sequence {other} holds too")

    def _fork(self, fork: SequenceFork) -> None:
        assert fork.seq_id not in self.tables, "a sequence that is held is forked into being"
        self.tables[fork.seq_id] = list(self.tables[fork.parent_seq_id])
        self.computed[fork.seq_id] = self.computed[fork.parent_seq_id]
