"""Making room: which group gives its blocks up, and whether they move to the host or are computed again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..block_space import BlockSpace
from ..policies import PREEMPTION, VICTIM, Choice, Costs, pick
from .plan_draft import PlanDraft
from .queues import Queues
from .sequence import SequenceGroup, Status


@dataclass(frozen=True, slots=True)
class PreemptionRecord:
    """One preemption: for the log."""

    request_id: str
    num_blocks: int
    num_tokens: int
    choice: Choice
    swapped: bool
    host_is_full: bool
    """Why it was not swapped although that was the choice."""


class Preemptor:
    """Takes the blocks of running groups. Victims are behind the group that needs room: it is not in the plan yet."""

    def __init__(
        self, space: BlockSpace, queues: Queues, draft: PlanDraft, *, preemption_mode: str, victim_policy: str,
        costs: Costs,
    ) -> None:
        """Raises `ConfigError` for an unknown policy."""
        self._space = space
        self._queues = queues
        self._draft = draft
        self._choose = pick(PREEMPTION, "preemption_mode", preemption_mode)
        self._victim = pick(VICTIM, "victim_policy", victim_policy)
        self.costs = costs
        self.num_swaps = 0
        self.num_recomputes = 0
        self.num_rechosen = 0
        """Of these, groups that had dropped rows: computed again they may keep others, and go on with other tokens."""
        self.records: deque[PreemptionRecord] = deque(maxlen=1000)
        """Not logged yet; the engine does that."""

    def pick_victim(
        self, group: SequenceGroup, *, only_lower_priority: bool = False, last_resort: bool = False,
    ) -> SequenceGroup | None:
        """A running group behind `group` that the plan does not name; only as a `last_resort` one that would have to
        choose the rows that it keeps again."""
        step_id = self._draft.step_id
        behind = [other for other in self._queues.behind(group)
                  if all(sequence.last_step_id != step_id for sequence in other.live)]
        if only_lower_priority:
            behind = [other for other in behind if other.key[0] > group.key[0]]
        while behind:
            victim = behind[self._victim(behind)]
            if last_resort or self.keeps_rows(victim):
                return victim
            behind.remove(victim)
        return None

    def keeps_rows(self, group: SequenceGroup) -> bool:
        """Whether a group that gives its blocks up will have the same rows again: it has dropped none so far, or the
        host has room for those that it kept."""
        if self._space.sparsity is None or not group.has_dropped:
            return True
        members = [sequence.blocks for sequence in group.live if sequence.has_begun]
        return self._space.num_to_swap_out(members) is not None

    def preempt(self, group: SequenceGroup) -> None:
        """Take the blocks of a running group and queue it again."""
        draft, space = self._draft, self._space
        begun = [sequence for sequence in group.live if sequence.has_begun]
        members = [sequence.blocks for sequence in begun]
        for sequence in begun:
            # What no token to come sees need not be moved.
            space.release_behind_windows(sequence.blocks, busy_until=sequence.last_step_id)
        # What sequences share is moved, or computed again, once.
        tables = [[blocks.tables[kv_group] for blocks in members] for kv_group in range(len(space.devices))]
        num_held = max(len({entry for table in one for entry in table if entry}) for one in tables)
        num_places = max(len({place for table in one for place in enumerate(table)}) for one in tables)
        num_tokens = min(group.num_computed_tokens, num_places * space.block_size)
        num_blocks = space.num_to_swap_out(members)
        choice = self._choose(self.costs, num_held if num_blocks is None else num_blocks, num_tokens)
        swap = (choice.swap or group.has_dropped) and num_blocks is not None and num_tokens > 0
        self.records.append(PreemptionRecord(
            group.request.request_id, num_held, num_tokens, choice, swap, host_is_full=num_blocks is None))
        if swap:
            self.num_swaps += 1
            group.swapped_step_id = draft.step_id
            space.swap_out(members, busy_until=max(sequence.last_step_id for sequence in begun))
            for sequence in begun:
                draft.swap_out(sequence)
            self._queues.requeue(group, Status.SWAPPED)
        else:
            self._recompute(group)
            self._queues.requeue(group, Status.WAITING)

    def drop_swapped(self, group: SequenceGroup) -> bool:
        """Let the last of the swapped groups other than `group` that still hold device blocks be computed again, so
        that these come free. False: there is none."""
        other = self._queues.last_pinning(group)
        if other is None:
            return False
        self.recompute_swapped(other)
        return True

    def recompute_swapped(self, group: SequenceGroup) -> None:
        """A swapped group that cannot come back begins anew; it keeps its place in the queue."""
        self._recompute(group)
        group.status = Status.WAITING

    def _recompute(self, group: SequenceGroup) -> None:
        self.num_recomputes += 1
        self.num_rechosen += group.has_dropped
        for sequence in group.live:
            self._draft.release(sequence)
