"""Which sequences compute how many tokens in the next step (DESIGN §2, §3).

One walk over the groups in the order of their keys: running ones first (a seat in the token budget is kept for every
decode), then waiting ones. A group that needs blocks takes them from groups behind it, which the plan does not name
yet: what was drafted is never taken back.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...protos.errors import InvalidRequestError
from ...protos.request import AddRequest, Delta
from ...protos.step import StepPlan, StepResult
from ..block_space import BlockSpace
from ..block_space.sparsity import most_seqs
from ..policies import WATERMARK, Costs, pick
from .admitter import Admitter
from .advancer import Advancer
from .beam_search import BeamSearch
from .disk_loads import DiskLoads
from .plan_draft import PlanDraft
from .preemptor import Preemptor
from .queues import Queues
from .results import Results
from .sequence import Sequence, SequenceGroup, Status


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_mixed_prefill_tokens: int | None = None
    """Most tokens of prompts in a step in which sequences decode; None: no limit of their own."""


class Scheduler:
    """Iteration-level scheduling with chunked prefill; safe to run one plan ahead of the results.

    Every method leaves the block space in a state that passes `check_integrity()`.
    """

    def __init__(
        self, space: BlockSpace, limits: SchedulerLimits, *, epoch: int, eos_token_ids: frozenset[int] = frozenset(),
        num_ranks: int = 1, preemption_mode: str = "auto", victim_policy: str = "latest",
        watermark_policy: str = "one_percent", costs: Costs | None = None,
    ) -> None:
        """`costs`: what `preemption_mode` "auto" decides by. Raises `ConfigError` for an unknown policy."""
        self.space = space
        self.epoch = epoch
        self._eos_token_ids = eos_token_ids
        self._limits = limits
        self._queues = Queues()
        self._draft = PlanDraft(space, epoch)
        self.preemptor = Preemptor(
            space, self._queues, self._draft, preemption_mode=preemption_mode, victim_policy=victim_policy,
            costs=costs or Costs(block_copy_s=0.0, prefill_token_s=1.0))
        self._loads = DiskLoads(space, self._queues, num_ranks)
        self._advancer = Advancer(space, self._draft, self.preemptor)
        self.admitter = Admitter(
            space, self._queues, self._advancer, self.preemptor, self._loads,
            max_num_seqs=most_seqs(
                space.sparsity.spec if space.sparsity else None, limits.max_num_seqs, limits.max_num_batched_tokens),
            max_num_batched_tokens=limits.max_num_batched_tokens,
            watermark=pick(WATERMARK, "watermark_policy", watermark_policy))
        self._sequences: dict[int, Sequence] = {}
        self._results = Results(space, self._draft, self._sequences, eos_token_ids, self._new_sequence, self._end)
        self._next_seq_id = 0
        self._next_serial = 0

    # -- requests come and go ------------------------------------------------------------------------------------

    def add(self, request: AddRequest, owner: bytes, max_tokens: int) -> SequenceGroup:
        """Queue a request that has passed `admission.check`; `max_tokens` is what that returned. Raises
        `InvalidRequestError` when its owner has one of the same id that has not ended."""
        if (owner, request.request_id) in self._queues.groups:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use", param="request_id")
        params, prompt = request.params, request.prompt_token_ids
        group = SequenceGroup(request, owner, self._next_serial, max_tokens, (request.priority, self._next_serial))
        self._next_serial += 1
        outputs = request.output_token_ids
        if len(set(request.ended_indices)) >= params.num_sequences:
            raise InvalidRequestError("every sequence of the request has ended", param="ended_indices")
        if any(len(output) >= max_tokens for index, output in enumerate(outputs) if index not in request.ended_indices):
            raise InvalidRequestError(f"a sequence that has all of its {max_tokens} tokens is not marked as ended",
                                      param="ended_indices")
        if params.beam_width is not None:
            group.beam_search = BeamSearch(params, tuple(self._eos_token_ids), max_tokens)
        for index in range(1 if group.beam_search else params.num_sequences):
            if index not in request.ended_indices:
                group.live.append(self._new_sequence(group, index, prompt + (outputs[index] if outputs else [])))
        group.is_forked = len(group.live) == 1 or any(outputs)
        self._queues.add(group)
        return group

    def cancel(self, owner: bytes, request_id: str, seq_index: int | None = None) -> None:
        """Forget a request, or one sequence of it; blocks are free as soon as no plan in flight names them. One that
        is not here, or has ended, is no error: its last delta and the cancel have crossed."""
        group = self._queues.groups.get((owner, request_id))
        # Beams come all at once or not at all.
        if group is None or (group.beam_search and seq_index is not None):
            return
        leader = group.live[0]
        for sequence in list(group.live):
            if seq_index in (None, sequence.index):
                self._end(sequence)
        if group.live and not group.is_forked and leader.finished:
            # The others were to share what the leader had computed of the prompt: the next one begins anew.
            if group.status is Status.RUNNING:
                self._queues.requeue(group, Status.WAITING)
            elif group.status is Status.SWAPPED:
                group.status = Status.WAITING

    @property
    def groups(self) -> list[SequenceGroup]:
        return list(self._queues.groups.values())

    @property
    def num_running(self) -> int:
        """Groups that hold device blocks to run with."""
        return len(self._queues.running)

    @property
    def num_waiting(self) -> int:
        return len(self._queues.groups) - len(self._queues.running)

    @property
    def num_unfinished(self) -> int:
        return len(self._queues.groups)

    @property
    def awaits_loads(self) -> bool:
        """Whether ranks owe an answer about disk loads."""
        return self._loads.are_in_flight

    # -- a step ----------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next plan, or None when there is nothing that can be computed before more results are in."""
        while True:
            self._walk()
            plan = self._draft.finish()
            if plan is not None:
                self._loads.sent(plan)
            # Where a group gave its blocks up for nothing, it may come back at once.
            if plan is not None or not self._advancer.took_blocks:
                return plan

    def update(self, result: StepResult) -> list[tuple[SequenceGroup, Delta]]:
        """Take in a result: free what waited for it, advance sequences, end those that are done."""
        self.answered(result)
        self._draft.done_step_id = result.step_id
        self.space.step_done(result.step_id)
        return self._results.take(result)

    def answered(self, result: StepResult) -> None:
        """Take in what a rank, 0 or another, says of the plan's disk loads."""
        self._loads.answered(result)

    # -- inside a step -----------------------------------------------------------------------------------------------

    def _walk(self) -> None:
        advancer, queues = self._advancer, self._queues
        advancer.start_walk(self._limits.max_num_batched_tokens, queues.num_seats, self._prefill_budget())
        waiting = queues.next_waiting()
        for group in list(queues.running):
            if waiting is not None and waiting.key[0] < group.key[0]:
                # Once it has to wait it is not tried again: by then the plan names groups behind it.
                waiting = queues.next_waiting() if self.admitter.admit(group.key[0]) else None
            if group.status is Status.RUNNING:
                advancer.advance(group)
        advancer.may_preempt = False
        # Blocks just taken from a group must not bring it, or another, straight back in.
        if not advancer.took_blocks:
            self.admitter.admit(None)

    def _prefill_budget(self) -> int | None:
        """Who decodes waits for the whole step: with long chunks of prompts in it, for long."""
        most = self._limits.max_num_mixed_prefill_tokens
        if most is None or not any(sequence.has_begun and sequence.num_uncomputed_tokens == 1
                                   for group in self._queues.running for sequence in group.live):
            return None
        return most

    def _new_sequence(self, group: SequenceGroup, index: int, token_ids: list[int]) -> Sequence:
        seq_id = self._next_seq_id
        self._next_seq_id += 1
        request = group.request
        root, sparsity = None, self.space.sparsity
        if sparsity and sparsity.spec.keeps_scores:
            # What is found has not been looked at by its queries.
            pass
        elif self.space.enable_prefix_caching:
            root = self.space.prefix_keys.root(f"shared/{request.cache_salt}")
        elif request.params.num_sequences > 1:
            # Its sequences find each other's blocks when they are computed again, and nobody else's.
            root = self.space.prefix_keys.root(f"group/{group.serial}")
        blocks = self.space.open(seq_id, root=root, priority=request.priority)
        sequence = Sequence(seq_id, index, group, token_ids, len(request.prompt_token_ids), blocks)
        self._sequences[seq_id] = sequence
        return sequence

    def _end(self, sequence: Sequence) -> None:
        """A sequence has had its last token, or nobody wants it any more."""
        group = sequence.group
        sequence.finished = True
        del self._sequences[sequence.seq_id]
        group.live.remove(sequence)
        if group.status is Status.RUNNING and not group.beam_search:
            self._queues.num_seats -= 1
        self._draft.release(sequence)
        if (group.live and sequence.num_pending_tokens and group.request.params.prompt_logprobs is not None
                and len(sequence.token_ids) == sequence.num_prompt_tokens):
            self._results.keep_scores_of(sequence)
        if not group.live:
            self._queues.retire(group)
