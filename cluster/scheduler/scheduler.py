"""Which sequences compute how many tokens in the next step (DESIGN §2, §3).

Decodes go first, then chunks of prompts already begun, then waiting groups are admitted, all under one token budget.
When blocks run out the last group in line is preempted: its blocks are freed and its tokens become a prompt again.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass

from ...protos.errors import InvalidRequestError, KvartoError
from ...protos.request import AddRequest, Delta, RequestError
from ...protos.step import SequenceStart, SequenceStep, StepPlan, StepResult
from ..block_space import Answer, BlockSpace
from . import policy
from .finish import finish_reason
from .sequence import Sequence, SequenceGroup, Status


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(slots=True)
class _Draft:
    """A sequence's part of the plan being made; it can be taken back until the plan is returned."""

    sequence: Sequence
    num_tokens: int
    samples: bool
    new_block_ids: list[list[int]]
    previous_step_id: int


class Scheduler:
    """Iteration-level scheduling with chunked prefill; safe to run one plan ahead of the results.

    Every method leaves the block space in a state that passes `check_integrity()`.
    """

    def __init__(
        self, space: BlockSpace, limits: SchedulerLimits, *, epoch: int, eos_token_ids: frozenset[int] = frozenset()
    ) -> None:
        self.space = space
        self.epoch = epoch
        self._eos_token_ids = eos_token_ids
        # A step must be able to hold one token of every running sequence, or the last in line would starve.
        self._max_num_seqs = min(limits.max_num_seqs, limits.max_num_batched_tokens)
        self._max_num_batched_tokens = limits.max_num_batched_tokens
        self._waiting: list[tuple[tuple[int, int], SequenceGroup]] = []
        self._running: list[SequenceGroup] = []
        self._groups: dict[tuple[bytes, str], SequenceGroup] = {}
        self._sequences: dict[int, Sequence] = {}
        self._ends: list[int] = []
        self._drafts: dict[int, _Draft] = {}
        self._budget = 0
        self._short_of_blocks = False
        self._next_seq_id = 0
        self._next_serial = 0
        self._next_step_id = 0
        self._done_step_id = -1
        self.num_preemptions = 0

    # -- requests come and go ------------------------------------------------------------------------------------

    def add(self, request: AddRequest, owner: bytes, max_tokens: int) -> SequenceGroup:
        """Queue a request that has passed `admission.check`; `max_tokens` is what that returned. Raises
        `InvalidRequestError` when its owner has one of the same id that has not ended."""
        if (owner, request.request_id) in self._groups:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use", param="request_id")
        group = SequenceGroup(request, owner, self._next_serial, max_tokens)
        self._next_serial += 1
        for index in range(request.params.n):
            produced = request.output_token_ids[index] if request.output_token_ids else []
            sequence = Sequence(
                self._next_seq_id, index, group, request.prompt_token_ids + produced, len(request.prompt_token_ids))
            self._next_seq_id += 1
            group.sequences.append(sequence)
            self._sequences[sequence.seq_id] = sequence
        self._groups[owner, request.request_id] = group
        heapq.heappush(self._waiting, (group.key, group))
        return group

    def cancel(self, owner: bytes, request_id: str, seq_index: int | None = None) -> None:
        """Forget a request, or one sequence of it; blocks are free as soon as no plan in flight names them. One that
        is not here, or has ended, is no error: its last delta and the cancel have crossed."""
        group = self._groups.get((owner, request_id))
        if group is None:
            return
        for sequence in group.live:
            if seq_index in (None, sequence.index):
                self._end(sequence)
        if not group.live:
            self._retire(group)

    @property
    def groups(self) -> list[SequenceGroup]:
        return list(self._groups.values())

    @property
    def num_running(self) -> int:
        """Groups that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._groups) - len(self._running)

    @property
    def num_unfinished(self) -> int:
        return len(self._groups)

    # -- a step ----------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next plan, or None when there is nothing that can be computed before more results are in."""
        self._budget = self._max_num_batched_tokens
        self._short_of_blocks = False
        prefilling: list[Sequence] = []
        for sequence in [s for group in self._running for s in group.sequences if s.wants_tokens]:
            if sequence.num_uncomputed_tokens > 1:
                prefilling.append(sequence)
            else:
                self._compute(sequence)
        for sequence in prefilling:
            self._compute(sequence)
        # Blocks just taken from a group must not bring it, or another, straight back in.
        if not self._short_of_blocks:
            self._admit()
        return self._finish_plan() if self._drafts else None

    def update(self, result: StepResult) -> list[tuple[SequenceGroup, Delta]]:
        """Take in a result: free what waited for it, advance sequences, end those that are done."""
        self._done_step_id = result.step_id
        self.space.step_done(result.step_id)
        for prompt in result.prompt_logprobs:
            if sequence := self._sequences.get(prompt.seq_id):
                # One that was preempted computes its prompt again, in other chunks: what is kept already is skipped.
                known = len(sequence.prompt_logprobs) + 1 - prompt.first
                sequence.prompt_logprobs.extend(prompt.positions[known:])
        news = []
        for token in result.tokens:
            sequence = self._sequences.get(token.seq_id)
            if sequence is None:
                continue
            delta = Delta(
                request_id=sequence.group.request.request_id,
                seq_index=sequence.index,
                first=len(sequence.token_ids) - sequence.num_prompt_tokens,
                token_ids=[token.token_id],
                logprobs=[token.logprobs] if token.logprobs else [],
                prompt_logprobs=sequence.prompt_logprobs,
            )
            sequence.prompt_logprobs = []
            sequence.token_ids.append(token.token_id)
            sequence.num_pending_tokens -= 1
            delta.finish_reason, delta.stop_reason = finish_reason(sequence, self._eos_token_ids)
            if delta.finish_reason:
                self._end(sequence)
                if not sequence.group.live:
                    self._retire(sequence.group)
            news.append((sequence.group, delta))
        for failure in result.failures:
            if sequence := self._sequences.get(failure.seq_id):
                group = sequence.group
                self.cancel(group.owner, group.request.request_id)
                news.append((group, Delta(request_id=group.request.request_id, error=RequestError(
                    name=KvartoError.__name__, message=failure.message))))
        return news

    # -- inside a step -----------------------------------------------------------------------------------------------

    def _compute(self, sequence: Sequence) -> None:
        """Draft the next tokens of a running sequence, as far as the budget goes, preempting others for its blocks.

        Nothing is drafted when it is itself the last in line (it is preempted), or when the blocks that it needs are
        releasing: they will be there for a later plan, and preempting more groups would not bring them sooner.
        """
        num_tokens = min(self._budget, sequence.num_uncomputed_tokens)
        if not num_tokens or sequence.group.status is not Status.RUNNING:
            return
        target = sequence.num_computed_tokens + num_tokens
        while not self.space.can_grow(sequence.seq_id, target):
            self._short_of_blocks = True
            if self.space.can_grow(sequence.seq_id, target, count_releasing=True):
                return
            victim = policy.pick_victim(self._running)
            self._preempt(victim)
            if victim is sequence.group:
                return
        samples = target == sequence.num_tokens
        self._drafts[sequence.seq_id] = _Draft(
            sequence, num_tokens, samples, self.space.grow(sequence.seq_id, target), sequence.last_step_id)
        self._budget -= num_tokens
        sequence.num_computed_tokens = target
        sequence.num_pending_tokens += samples
        sequence.last_step_id = self._next_step_id

    def _admit(self) -> None:
        """Start waiting groups in order while seats, blocks and budget last."""
        num_seats = self._max_num_seqs - sum(len(group.live) for group in self._running)
        while self._waiting and self._budget:
            group = self._waiting[0][1]
            if group.status is not Status.WAITING:
                heapq.heappop(self._waiting)
                continue
            live = group.live
            # A preempted sequence whose last result is still on its way: its tokens are not all known yet.
            if any(sequence.num_pending_tokens for sequence in live):
                return
            lengths = [sequence.num_tokens for sequence in live]
            watermark = policy.watermark_blocks(self.space.min_pool_blocks, len(self._running))
            has_seats = len(live) <= num_seats
            if has_seats and self.space.can_hold(lengths, watermark=watermark) is Answer.OK:
                heapq.heappop(self._waiting)
                group.status = Status.RUNNING
                insort(self._running, group, key=lambda g: g.key)
                num_seats -= len(live)
                for sequence in live:
                    self._compute(sequence)
                continue
            blocks_will_do = self.space.can_hold(lengths, watermark=watermark, count_releasing=True) is Answer.OK
            if (has_seats and blocks_will_do) or not self._running:
                return
            victim = policy.pick_victim(self._running)
            if not policy.outranks(group, victim):
                return
            num_seats += len(victim.live)
            self._preempt(victim)

    def _preempt(self, group: SequenceGroup) -> None:
        """Free the blocks of a running group and queue it again; its part of the plan being made is taken back."""
        for sequence in group.live:
            if draft := self._drafts.pop(sequence.seq_id, None):
                self._budget += draft.num_tokens
                sequence.num_pending_tokens -= draft.samples
                sequence.last_step_id = draft.previous_step_id
            self._leave_ranks(sequence)
            sequence.num_computed_tokens = 0
        self._running.pop(bisect_left(self._running, group.key, key=lambda g: g.key))
        group.status = Status.WAITING
        heapq.heappush(self._waiting, (group.key, group))
        self.num_preemptions += 1

    def _end(self, sequence: Sequence) -> None:
        sequence.finished = True
        del self._sequences[sequence.seq_id]
        self._leave_ranks(sequence)

    def _leave_ranks(self, sequence: Sequence) -> None:
        in_flight = sequence.last_step_id > self._done_step_id
        self.space.free(sequence.seq_id, busy_until=sequence.last_step_id if in_flight else None)
        if sequence.on_ranks:
            self._ends.append(sequence.seq_id)
            sequence.on_ranks = False

    def _retire(self, group: SequenceGroup) -> None:
        if group.status is Status.RUNNING:
            self._running.pop(bisect_left(self._running, group.key, key=lambda g: g.key))
        group.status = Status.FINISHED
        del self._groups[group.owner, group.request.request_id]

    def _finish_plan(self) -> StepPlan:
        starts, steps = [], []
        for draft in self._drafts.values():
            sequence = draft.sequence
            if not sequence.on_ranks:
                sequence.on_ranks = True
                starts.append(SequenceStart(
                    seq_id=sequence.seq_id, seq_index=sequence.index, token_ids=sequence.token_ids,
                    num_prompt_tokens=sequence.num_prompt_tokens, params=sequence.group.request.params))
            steps.append(SequenceStep(
                seq_id=sequence.seq_id, num_tokens=draft.num_tokens, new_block_ids=draft.new_block_ids))
        plan = StepPlan(epoch=self.epoch, step_id=self._next_step_id, ends=self._ends, starts=starts, steps=steps)
        self._drafts = {}
        self._ends = []
        self._next_step_id += 1
        return plan
