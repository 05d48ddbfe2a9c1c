"""What a step's result does to the sequences: tokens are appended, beams advance, sequences end."""

from __future__ import annotations

from collections.abc import Callable

from ...protos.errors import KvartoError
from ...protos.request import Delta, RequestError
from ...protos.step import BeamCandidates, SampledToken, StepResult
from ..block_space import BlockSpace
from .finish import finish_reason
from .plan_draft import PlanDraft
from .sequence import Sequence, SequenceGroup

News = list[tuple[SequenceGroup, Delta]]


class Results:
    """Takes results in, in the order of their plans. What concerns a sequence that has ended is dropped."""

    def __init__(
        self, space: BlockSpace, draft: PlanDraft, sequences: dict[int, Sequence], eos_token_ids: frozenset[int],
        new_sequence: Callable[[SequenceGroup, int, list[int]], Sequence], end: Callable[[Sequence], None],
    ) -> None:
        self._space = space
        self._draft = draft
        self._sequences = sequences
        self._eos_token_ids = eos_token_ids
        self._new_sequence = new_sequence
        self._end = end
        self._scored: dict[int, Sequence] = {}

    def keep_scores_of(self, sequence: Sequence) -> None:
        """A sequence has ended whose prompt the plans in flight score for the others of its group."""
        self._scored[sequence.seq_id] = sequence

    def take(self, result: StepResult) -> News:
        """The deltas that a result gives rise to."""
        sequences = self._sequences
        news: News = []
        for prompt in result.prompt_logprobs:
            scored = sequences.get(prompt.seq_id) or self._scored.get(prompt.seq_id)
            if scored is not None:
                group = scored.group
                # One that was preempted computes its prompt again, in other chunks: what is kept already is skipped.
                known = len(group.prompt_logprobs) + 1 - prompt.first
                group.prompt_logprobs.extend(prompt.positions[known:])
        if self._scored:
            # Not before its last plan: the end of a prompt may come in several.
            self._scored = {seq_id: scored for seq_id, scored in self._scored.items()
                            if scored.last_step_id > result.step_id}
        for token in result.tokens:
            if sequence := sequences.get(token.seq_id):
                news.append((sequence.group, self._append(sequence, token)))
        for candidates in result.beams:
            sequence = sequences.get(candidates.seq_id)
            # Others are of a length that the beam had before: it was computed again meanwhile.
            if sequence is not None and sequence.sampling_step_id == result.step_id:
                news.extend(self._take_candidates(sequence, candidates))
        for failure in result.failures:
            if sequence := sequences.get(failure.seq_id):
                news.append(self._fail(sequence.group, failure.message))
        return news

    def _append(self, sequence: Sequence, token: SampledToken) -> Delta:
        group, token_ids, blocks = sequence.group, sequence.token_ids, sequence.blocks
        first = len(token_ids) - sequence.num_prompt_tokens
        delta = Delta(
            request_id=group.request.request_id, seq_index=sequence.index, first=first, token_ids=[token.token_id])
        if token.logprobs:
            delta.logprobs = [token.logprobs]
        if first == 0:
            delta.num_cached_tokens = group.num_cached_tokens
            if group.prompt_logprobs:
                delta.prompt_logprobs, group.prompt_logprobs = group.prompt_logprobs, []
        token_ids.append(token.token_id)
        sequence.num_pending_tokens -= 1
        if (blocks.num_keyed + 1) * self._space.block_size < len(token_ids):
            self._space.offer(blocks, token_ids)
        delta.finish_reason, delta.stop_reason = finish_reason(sequence, self._eos_token_ids)
        if delta.finish_reason:
            self._end(sequence)
        return delta

    def _take_candidates(self, sequence: Sequence, candidates: BeamCandidates) -> News:
        sequence.candidates = candidates
        beams = sequence.group.live
        known = [(beam.candidates.token_ids, beam.candidates.logprobs) for beam in beams if beam.candidates]
        return self._advance_beams(sequence.group, known) if len(known) == len(beams) else []

    def _advance_beams(self, group: SequenceGroup, candidates: list[tuple[list[int], list[float]]]) -> News:
        """Every beam's continuations are there: the best of them go on, as forks of the beams that they continue."""
        assert group.beam_search is not None
        beams = list(group.live)
        for beam in beams:
            self._space.offer(beam.blocks, beam.token_ids)
        continuations = group.beam_search.advance(candidates)
        if not continuations:
            return self._finish_beams(group)
        forks: dict[int, Sequence] = {}
        live = []
        for place, continuation in enumerate(continuations):
            parent = beams[continuation.parent]
            if continuation.parent not in forks:
                forks[continuation.parent] = parent
                live.append(parent)
                continue
            child = self._new_sequence(group, place, list(parent.token_ids))
            self._draft.fork(parent, child)
            live.append(child)
        for sequence, continuation in zip(live, continuations, strict=True):
            sequence.token_ids.append(continuation.token_id)
            sequence.unsent_token_ids.append(continuation.token_id)
            sequence.candidates, sequence.sampling_step_id = None, -1
        dead = [beam for place, beam in enumerate(beams) if place not in forks]
        group.live = [*live, *dead]
        for beam in dead:
            self._end(beam)
        return []

    def _finish_beams(self, group: SequenceGroup) -> News:
        assert group.beam_search is not None
        news = []
        for index, hypothesis in enumerate(group.beam_search.results()):
            news.append((group, Delta(
                request_id=group.request.request_id, seq_index=index, token_ids=hypothesis.token_ids,
                finish_reason=hypothesis.finish_reason, stop_reason=hypothesis.stop_reason,
                num_cached_tokens=group.num_cached_tokens, cumulative_logprob=hypothesis.cumulative_logprob,
                beam_score=hypothesis.score)))
        for beam in list(group.live):
            self._end(beam)
        return news

    def _fail(self, group: SequenceGroup, message: str) -> tuple[SequenceGroup, Delta]:
        for sequence in list(group.live):
            # What it computed is not to be found by others.
            self._space.disown_keys(sequence.blocks)
            self._end(sequence)
        return group, Delta(request_id=group.request.request_id, error=RequestError(
            name=KvartoError.__name__, message=message))
