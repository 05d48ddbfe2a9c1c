"""The plan that is being made, and what the ranks will hold once they have run it."""

from __future__ import annotations

from ...protos.step import Compaction, SequenceFork, SequenceStart, SequenceStep, StepPlan
from ..block_space import BlockSpace
from .sequence import Sequence


class PlanDraft:
    """Collects a plan's parts. What is drafted stays: victims are chosen among groups that the plan does not name."""

    def __init__(self, space: BlockSpace, epoch: int) -> None:
        self._space = space
        self._epoch = epoch
        self.step_id = 0
        """Of the plan being made."""
        self.done_step_id = -1
        """Of the last result."""
        self.steps: list[SequenceStep] = []
        self._starts: list[SequenceStart] = []
        self._siblings: list[SequenceFork] = []
        self._forks: list[SequenceFork] = []
        self._suspends: list[int] = []
        self._ends: list[int] = []

    def compute(
        self, sequence: Sequence, num_tokens: int, new_block_ids: list[list[int]], copied_block_ids: list[int],
    ) -> None:
        """The next `num_tokens` of a sequence, and the blocks that this brings it."""
        step = SequenceStep(seq_id=sequence.seq_id, num_tokens=num_tokens)
        if sequence.on_ranks:
            if new_block_ids:
                step.new_block_ids = new_block_ids
            if copied_block_ids:
                step.copied_block_ids = copied_block_ids
            if sequence.unsent_token_ids:
                step.token_ids, sequence.unsent_token_ids = sequence.unsent_token_ids, []
        else:
            sequence.on_ranks = True
            sequence.is_suspended = False
            sequence.unsent_token_ids = []
            # What it holds already was found, swapped in or forked: the ranks learn of it now.
            step.new_block_ids = [list(table) for table in sequence.blocks.tables]
            self._starts.append(SequenceStart(
                seq_id=sequence.seq_id, seq_index=sequence.index, token_ids=sequence.token_ids,
                num_prompt_tokens=sequence.num_prompt_tokens, num_computed_tokens=sequence.num_computed_tokens,
                num_dropped_tokens=sequence.blocks.num_dropped, params=sequence.group.request.params))
        self.steps.append(step)
        sequence.num_computed_tokens += num_tokens
        sequence.last_step_id = self.step_id

    def compact(self, sequence: Sequence, num_kept: int) -> None:
        """The sequence whose step was drafted last keeps so many of its rows once that is computed."""
        new_block_ids = self._space.compact(sequence.blocks, num_kept, busy_until=self.step_id)
        self.steps[-1].compaction = Compaction(num_kept=num_kept, new_block_ids=new_block_ids)

    def add_sibling(self, leader: Sequence, follower: Sequence) -> None:
        """`follower` begins as a copy of `leader` once that is computed, and samples from the same logits."""
        self._space.fork(leader.blocks, follower.blocks)
        follower.num_computed_tokens = leader.num_computed_tokens
        follower.num_pending_tokens += 1
        follower.last_step_id = self.step_id
        follower.on_ranks = True
        self._siblings.append(SequenceFork(
            seq_id=follower.seq_id, parent_seq_id=leader.seq_id, seq_index=follower.index))

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """`child` begins as a copy of `parent` before anything else of the plan."""
        self._space.fork(parent.blocks, child.blocks)
        child.num_computed_tokens = parent.num_computed_tokens
        child.last_step_id = parent.last_step_id
        child.on_ranks = parent.on_ranks
        child.is_suspended = parent.is_suspended
        child.unsent_token_ids = list(parent.unsent_token_ids)
        if parent.seq_id in self._suspends:
            # The ranks fork it before they suspend it.
            self._suspends.append(child.seq_id)
        if child.on_ranks or child.is_suspended:
            self._forks.append(SequenceFork(
                seq_id=child.seq_id, parent_seq_id=parent.seq_id, seq_index=child.index))

    def leave_ranks(self, sequence: Sequence) -> None:
        """The ranks forget a sequence."""
        if sequence.on_ranks or sequence.is_suspended:
            self._ends.append(sequence.seq_id)
            sequence.on_ranks = sequence.is_suspended = False

    def swap_out(self, sequence: Sequence) -> None:
        """The ranks forget a sequence, but for what they could not be told when it comes back."""
        sparsity = self._space.sparsity
        if not (sparsity and sparsity.spec.keeps_scores):
            self.leave_ranks(sequence)
        elif sequence.on_ranks:
            self._suspends.append(sequence.seq_id)
            sequence.on_ranks, sequence.is_suspended = False, True

    def release(self, sequence: Sequence) -> None:
        """The ranks forget a sequence, and its blocks are anybody's once no plan in flight names them."""
        self._space.free(sequence.blocks, busy_until=sequence.last_step_id)
        sequence.num_computed_tokens = 0
        self.leave_ranks(sequence)

    def finish(self) -> StepPlan | None:
        """The plan, or None where there is nothing to compute and nothing to move."""
        moves = self._space.end_plan() if self.steps or self._space.moves.any else []
        if not self.steps and not moves:
            return None
        plan = StepPlan(epoch=self._epoch, step_id=self.step_id, moves=moves, forks=self._forks,
                        suspends=self._suspends, ends=self._ends, starts=self._starts, steps=self.steps,
                        siblings=self._siblings)
        self.steps, self._starts, self._siblings, self._forks = [], [], [], []
        self._suspends, self._ends = [], []
        self.step_id += 1
        return plan
