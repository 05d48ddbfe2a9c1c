"""Starting waiting groups: cached blocks are found, read from disk or swapped in; the urgent displace the others."""

from __future__ import annotations

from ..block_space import Answer, BlockSpace, Match, Need
from ..policies import Watermark
from .advancer import Advancer
from .disk_loads import DiskLoads
from .preemptor import Preemptor
from .queues import Queues
from .sequence import Sequence, SequenceGroup, Status


class Admitter:
    """Waiting groups start in the order of their keys: one that has to wait keeps those behind it waiting."""

    def __init__(
        self, space: BlockSpace, queues: Queues, advancer: Advancer, preemptor: Preemptor, loads: DiskLoads, *,
        max_num_seqs: int, max_num_batched_tokens: int, watermark: Watermark,
    ) -> None:
        self._space = space
        self._queues = queues
        self._advancer = advancer
        self._preemptor = preemptor
        self._loads = loads
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._watermark = watermark
        self.num_queried_tokens = 0
        """Prompt tokens of groups that have begun, and of those the ones that were found in the prefix cache."""
        self.num_hit_tokens = 0

    def admit(self, before_priority: int | None) -> bool:
        """Start waiting groups in order while seats, blocks and budget last; with `before_priority` only those that
        are more urgent than it, in the place of less urgent ones. False: one of them has to wait."""
        # An urgent group may have the tokens kept for those that it displaces.
        while before_priority is not None or self._advancer.has_budget:
            group = self._queues.next_waiting()
            if group is None or (before_priority is not None and group.key[0] >= before_priority):
                return True
            if not self._try_admit(group):
                return False
        return False

    def _try_admit(self, group: SequenceGroup) -> bool:
        """Start a group, or park it while the disk is read; False: it has to wait, and so has everybody behind it."""
        # A preempted sequence whose last result is still on its way: its tokens are not all known yet.
        if any(sequence.num_pending_tokens for sequence in group.live):
            return False
        # One that this very plan swaps out cannot be swapped in by it, though it is more urgent than one that runs.
        if group.status is Status.SWAPPED and group.swapped_step_id == self._space.moves.step_id:
            return False
        advancer = self._advancer
        while True:
            if self._has_seats(group) and advancer.has_budget:
                match = self._find(group)
                if match is None:
                    return True
                has_chunk = self._has_chunk(group, match)
                if not has_chunk and advancer.withholds:
                    return False
                if has_chunk:
                    need = self._need(group, match)
                    if not advancer.waits_for_blocks and self._space.answer(need) is Answer.OK:
                        self._start(group, match)
                        return True
                    if advancer.waits_for_blocks or self._space.answer(need, count_releasing=True) is Answer.OK:
                        return False
            victim = self._preemptor.pick_victim(group, only_lower_priority=True) if advancer.may_preempt else None
            if victim is not None:
                advancer.displace(victim)
            elif self._queues.running:
                return False
            elif not self._preemptor.drop_swapped(group):
                if group.status is not Status.SWAPPED:
                    return False
                self._preemptor.recompute_swapped(group)

    def _has_seats(self, group: SequenceGroup) -> bool:
        return group.num_seats <= self._max_num_seqs - self._queues.num_seats

    def _find(self, group: SequenceGroup) -> Match | None:
        """The cached blocks that a group can begin with; None: it was parked while more are read from disk."""
        leader = group.live[0]
        if group.status is Status.SWAPPED:
            return []
        match = self._advancer.match(leader)
        if self._advancer.wants_prompt_logprobs(leader):
            return match
        wanted = leader.blocks.keys[len(match): (leader.num_tokens - 1) // self._space.block_size]
        if wanted and self._space.tiers.disk_capacity:
            self._space.refresh(match)
            if self._loads.begin(group, wanted, num_kept=self._space.num_on_host(match)):
                return None
        return match

    def _has_chunk(self, group: SequenceGroup, match: Match) -> bool:
        """Whether what is left of the budget holds the tokens that a group begins with, which may have to be computed
        together: what begins is named by the plan that brings its blocks."""
        if group.status is Status.SWAPPED:
            return True
        leader, num_cached = group.live[0], len(match) * self._space.block_size
        most = min(leader.num_tokens - num_cached, self._advancer.num_left)
        return self._advancer.chunk(leader, num_cached, most) > 0

    def _need(self, group: SequenceGroup, match: Match) -> Need:
        """Blocks that must be there for a group to start: its next tokens included, and the watermark."""
        space, num_running = self._space, len(self._queues.running)
        if group.status is Status.SWAPPED:
            begun = [sequence for sequence in group.live if sequence.has_begun]
            growth = self._growth(begun)
            held = space.num_to_swap_in([sequence.blocks for sequence in begun])
            num_seqs = len(begun)
        else:
            leader = group.live[0]
            num_blocks = space.blocks_for(leader.num_tokens) if space.sparsity is None else (
                space.sparsity.blocks_to_reach(leader.num_prompt_tokens, 0, 0, leader.num_tokens))
            growth = [num_blocks - len(match)] * len(space.devices)
            held, num_seqs = space.num_to_take(match), 1
        # What is computed at the end of a long prompt takes the place of its beginning where a window has passed that.
        need = space.windows.cap([one + other for one, other in zip(held, growth, strict=True)], num_seqs,
                                 self._max_num_batched_tokens)
        return [count + self._watermark(device.num_blocks, num_running)
                for count, device in zip(need, space.devices, strict=True)]

    def _growth(self, begun: list[Sequence]) -> Need:
        """Blocks that the next tokens of swapped sequences take, as far as one compaction."""
        space = self._space
        if space.sparsity is None:
            return space.num_missing([(s.blocks, s.num_computed_tokens + s.num_uncomputed_tokens) for s in begun])
        targets, num_fresh = [], 0
        for sequence in begun:
            num_computed, num_dropped = sequence.num_computed_tokens, sequence.blocks.num_dropped
            target = num_computed + sequence.num_uncomputed_tokens
            stop = space.sparsity.next_compaction(sequence.num_prompt_tokens, num_computed, num_dropped)
            if stop is not None and stop <= target:
                target, num_fresh = stop, num_fresh + space.blocks_for(space.sparsity.spec.budget)
            targets.append((sequence.blocks, target - num_dropped))
        return [count + num_fresh for count in space.num_missing(targets)]

    def _start(self, group: SequenceGroup, match: Match) -> None:
        if group.status is Status.SWAPPED:
            self._space.swap_in([sequence.blocks for sequence in group.live if sequence.has_begun])
        else:
            leader = group.live[0]
            self._advancer.begin(leader, match)
            if group.num_cached_tokens < 0:
                group.num_cached_tokens = min(leader.num_computed_tokens, leader.num_prompt_tokens)
                self.num_queried_tokens += leader.num_prompt_tokens
                self.num_hit_tokens += group.num_cached_tokens
        self._queues.start(group)
        self._advancer.reserved += group.num_seats
        self._advancer.advance(group)
