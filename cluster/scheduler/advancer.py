"""Drafting the next tokens of running groups: how many, on which blocks, and who gives blocks up for them."""

from __future__ import annotations

from ..block_space import BlockSpace, Match, Need
from .plan_draft import PlanDraft
from .preemptor import Preemptor
from .sequence import Sequence, SequenceGroup, Status


class Advancer:
    """One walk over the groups at a time, in the order of their keys, under one token budget."""

    def __init__(self, space: BlockSpace, draft: PlanDraft, preemptor: Preemptor) -> None:
        self._space = space
        self._draft = draft
        self._preemptor = preemptor
        self.start_walk(0, 0)

    def start_walk(self, budget: int, num_seats: int, prefill_budget: int | None = None) -> None:
        """`num_seats`: sequences of the running groups. Each has a token of the budget kept for it until its turn.
        `prefill_budget`: most of the budget that goes to prompts; default: all of it."""
        self.budget = budget
        self.prefill_budget = budget if prefill_budget is None else prefill_budget
        self.reserved = num_seats
        self.took_blocks = False
        """A group was preempted."""
        self.waits_for_blocks = False
        """A group waits for releasing blocks, which nobody behind it may take."""
        self.may_preempt = True
        """False once the plan names groups behind those whose turn it is."""

    @property
    def num_left(self) -> int:
        """Tokens of the budget that a prompt may have, beside those kept for running sequences."""
        return min(self.budget - self.reserved, self.prefill_budget)

    @property
    def has_budget(self) -> bool:
        """Whether tokens are left beside those kept for running sequences, if only for one that decodes."""
        return self.budget > self.reserved

    @property
    def withholds(self) -> bool:
        """Whether tokens are left that prompts may not have: no victim would bring them more."""
        return self.prefill_budget < self.budget - self.reserved

    def displace(self, victim: SequenceGroup) -> None:
        """Preempt a group whose turn has not come."""
        self.took_blocks = True
        self.reserved -= victim.num_seats
        self._preemptor.preempt(victim)

    def advance(self, group: SequenceGroup) -> None:
        """Draft the next tokens of a running group, as far as blocks and budget go."""
        if len(group.live) > 1 or group.beam_search:
            self._advance_many(group)
            return
        sequence = group.live[0]
        self.reserved -= 1
        num_tokens = sequence.num_uncomputed_tokens
        if num_tokens > 1:
            num_tokens = self.chunk(sequence, sequence.num_computed_tokens, min(num_tokens, self.num_left))
        if 0 < num_tokens <= self.budget:
            self._compute(sequence, num_tokens)

    def chunk(self, sequence: Sequence, num_computed: int, most: int) -> int:
        """How many of the next `most` tokens of a sequence, which has computed so many, one step computes."""
        sparsity = self._space.sparsity
        if sparsity is None or most <= 0:
            return most
        return sparsity.chunk(sequence.num_prompt_tokens, num_computed, sequence.blocks.num_dropped, most)

    def _advance_many(self, group: SequenceGroup) -> None:
        """Sequences that share blocks are drafted together, so that none of them is taken for a victim half-way."""
        self.reserved -= group.num_seats
        wanted: list[tuple[Sequence, int]] = []
        budget, prefill_budget = self.budget - self.reserved, self.prefill_budget
        for sequence in group.live:
            self._release_behind_windows(sequence, busy_until=sequence.last_step_id)
            if not sequence.has_begun and (group.is_forked or sequence is not group.live[0]):
                continue
            is_prefill = sequence.num_uncomputed_tokens > 1
            most = min(sequence.num_uncomputed_tokens, budget, prefill_budget if is_prefill else budget)
            num_tokens = self.chunk(sequence, sequence.num_computed_tokens, most)
            if num_tokens > 0:
                wanted.append((sequence, num_tokens))
                budget -= num_tokens
                prefill_budget -= num_tokens * is_prefill
        need = self._need([(sequence, sequence.num_computed_tokens + num_tokens) for sequence, num_tokens in wanted])
        if wanted and not self._make_room(group, need):
            return
        for sequence, num_tokens in wanted:
            self._compute(sequence, num_tokens)
        if group.is_forked:
            self._begin_next(group, drafted=bool(wanted))

    def _begin_next(self, group: SequenceGroup, *, drafted: bool) -> None:
        """Sequences that must be computed again begin one after another, each finding what those before it hold."""
        for sequence in group.live:
            if sequence.has_begun:
                if sequence.num_uncomputed_tokens > 1:
                    return
                continue
            match = self.match(sequence)
            num_cached = len(match) * self._space.block_size
            num_tokens = self.chunk(sequence, num_cached, min(sequence.num_tokens - num_cached, self.num_left))
            if num_tokens <= 0:
                return
            target = num_cached + num_tokens
            num_fresh = self._space.blocks_for(self._num_kept(sequence, num_cached, target))
            growth = self._space.blocks_for(target) - len(match) + num_fresh
            need = [count + growth for count in self._space.num_to_take(match)]
            if not self._make_room(group, need, may_be_victim=not drafted):
                return
            # Making room may have evicted, or moved, what was found; and what a victim held is taken from the room.
            match = self.match(sequence)
            need = [count + growth for count in self._space.num_to_take(match)]
            if len(match) * self._space.block_size != num_cached or not self._space.has_room(need):
                return
            self.begin(sequence, match)
            self._compute(sequence, num_tokens)
            drafted = True

    def begin(self, sequence: Sequence, match: Match) -> None:
        """A sequence that holds nothing takes the cached blocks of a match."""
        self._space.attach(sequence.blocks, match)
        sequence.num_computed_tokens = sequence.blocks.num_tokens

    def _compute(self, sequence: Sequence, num_tokens: int) -> None:
        """Draft `num_tokens` of a sequence, preempting others for the blocks that it needs."""
        space, group, blocks = self._space, sequence.group, sequence.blocks
        target = sequence.num_computed_tokens + num_tokens
        num_kept = self._num_kept(sequence, sequence.num_computed_tokens, target)
        num_rows = target - blocks.num_dropped
        new: list[list[int]] = []
        copied: list[int] = []
        if num_kept or not space.extend_in_place(blocks, num_rows):
            self._release_behind_windows(sequence, busy_until=sequence.last_step_id)
            if not self._make_room(group, self._need([(sequence, target)])):
                return
            new, copied = space.grow(blocks, num_rows)
        reaches_end = target == sequence.num_tokens
        self.prefill_budget -= num_tokens * (sequence.num_uncomputed_tokens > 1)
        self._draft.compute(sequence, num_tokens, new, copied)
        self.budget -= num_tokens
        if num_tokens > 1:
            space.offer(blocks, sequence.token_ids)
            # Of a long chunk most is behind the window already: it need not be held while the window fills again.
            self._release_behind_windows(sequence, busy_until=self._draft.step_id)
        if num_kept:
            self._draft.compact(sequence, num_kept)
        if not reaches_end:
            return
        if group.beam_search:
            sequence.sampling_step_id = self._draft.step_id
            return
        sequence.num_pending_tokens += 1
        if not group.is_forked:
            group.is_forked = True
            for follower in group.live[1:]:
                self._draft.add_sibling(sequence, follower)

    def _num_kept(self, sequence: Sequence, num_computed: int, target: int) -> int:
        """Rows that a sequence keeps when a step has brought it from `num_computed` to `target` tokens; 0: all."""
        sparsity = self._space.sparsity
        if sparsity is None:
            return 0
        stop = sparsity.next_compaction(sequence.num_prompt_tokens, num_computed, sequence.blocks.num_dropped)
        return sparsity.spec.budget if target == stop else 0

    def _need(self, members: list[tuple[Sequence, int]]) -> Need:
        """Blocks that bringing sequences to these numbers of tokens takes, those of compactions included."""
        space = self._space
        need = space.num_missing([(sequence.blocks, target - sequence.blocks.num_dropped)
                                  for sequence, target in members])
        if space.sparsity is None:
            return need
        num_fresh = sum(space.blocks_for(self._num_kept(sequence, sequence.num_computed_tokens, target))
                        for sequence, target in members)
        return [count + num_fresh for count in need]

    def _release_behind_windows(self, sequence: Sequence, busy_until: int) -> None:
        if self._space.windows.any:
            # What nobody holds any more can still be found, if it was offered while it was held.
            self._space.offer(sequence.blocks, sequence.token_ids)
            self._space.release_behind_windows(sequence.blocks, busy_until=busy_until)

    def _make_room(self, group: SequenceGroup, need: Need, *, may_be_victim: bool = True) -> bool:
        """Have these blocks free for `group`, preempting groups behind it and in the end itself.

        False when it has to wait, or was preempted. Where releasing blocks will do, it waits for them, and nobody
        behind it takes them: preempting more groups would not bring them sooner. A group that would have to choose the
        rows that it keeps again is the last resort, and waits rather than preempt itself: others are before it.
        """
        if not any(need):
            return True
        while not self._space.has_room(need):
            if self.waits_for_blocks or self._space.has_room(need, count_releasing=True):
                self.waits_for_blocks = True
                return False
            if not self.may_preempt:
                return False
            preemptor = self._preemptor
            victim = preemptor.pick_victim(group)
            if victim is None:
                if preemptor.drop_swapped(group):
                    self.took_blocks = True
                    continue
                victim = preemptor.pick_victim(group, last_resort=True)
            if victim is not None:
                self.displace(victim)
                continue
            if not preemptor.keeps_rows(group):
                self.waits_for_blocks = True
                return False
            self.took_blocks = True
            if may_be_victim and group.status is Status.RUNNING:
                preemptor.preempt(group)
            return False
        return not self.waits_for_blocks

    def match(self, sequence: Sequence) -> list[list[int]]:
        if self.wants_prompt_logprobs(sequence):
            return []
        sparsity = self._space.sparsity
        most = sparsity.most_cached(sequence.num_prompt_tokens) if sparsity else None
        return self._space.match(sequence.blocks, sequence.token_ids, most)

    def wants_prompt_logprobs(self, sequence: Sequence) -> bool:
        """Whether every prompt token must be computed for its log probability: until the first token has come."""
        group = sequence.group
        return (group.request.params.prompt_logprobs is not None and sequence is group.live[0]
                and len(sequence.token_ids) == sequence.num_prompt_tokens)
