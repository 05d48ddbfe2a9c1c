"""The end of a step: from hidden states to the next tokens, beam candidates and prompt log probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from ..protos.sampling import SamplingParams
from ..protos.step import (
    BeamCandidates,
    PromptLogprobs,
    SampledToken,
    SequenceFailure,
    SequenceFork,
    SequenceStart,
    StepPlan,
    StepResult,
)
from .batch import Ints, SequenceTable, StepLayout
from .decoder import Decoder
from .recorded_forward import Best
from .sampling import NonFiniteLogitsError, Sampled, Sampler, SamplingState

PROMPT_LOGPROBS_ROWS = 128
"""Prompt rows whose logits are held at once: a whole chunk of a large vocabulary would take gigabytes."""
NOT_NUMBERS = "the model's logits for this sequence are not numbers: it cannot be continued"

Answer = TypeVar("Answer")


@dataclass(slots=True)
class _Running:
    """What is kept of a sequence between steps."""

    params: SamplingParams
    num_prompt_tokens: int
    state: SamplingState | None
    """None: a beam, whose tokens the Head chooses."""
    prompt: list[int]
    """The prompt whose log probabilities are wanted; empty: they are not, or were sent before."""


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Sequences that are to gain a token, `[R]` each."""

    seq_ids: list[int]
    hidden_rows: Ints
    """Of the last token computed; siblings share their parent's."""
    positions: Ints
    """Of the token to be gained."""
    take_the_best: bool = False
    """Whether nothing of their logits matters but which is the largest."""

    def take(self, places: dict[int, int]) -> SampledRows:
        """One row for each sequence that `places` names, like the row whose index it gives."""
        indices = list(places.values())
        return SampledRows(list(places), self.hidden_rows[indices], self.positions[indices])


class StepSampling:
    """Knows every sequence's parameters; tokens and places are the `SequenceTable`'s."""

    def __init__(self, decoder: Decoder, sampler: Sampler, table: SequenceTable, device: torch.device) -> None:
        self._decoder = decoder
        self._sampler = sampler
        self._table = table
        self._device = device
        self._running: dict[int, _Running] = {}

    def start(self, start: SequenceStart) -> None:
        """Raises `InvalidRequestError` if it is to be sampled at random and has no seed."""
        params, num_prompt_tokens = start.params, start.num_prompt_tokens
        # One that has generated already has had its prompt's log probabilities sent.
        wanted = params.prompt_logprobs is not None and len(start.token_ids) == num_prompt_tokens
        state = self._state(params, start.seq_index, start.seq_id, num_prompt_tokens)
        self._running[start.seq_id] = _Running(params, num_prompt_tokens, state, start.token_ids if wanted else [])

    def fork(self, fork: SequenceFork) -> None:
        """A sequence that stands as its parent does and will sample for itself."""
        parent = self._running[fork.parent_seq_id]
        state = self._state(parent.params, fork.seq_index, fork.seq_id, parent.num_prompt_tokens)
        self._running[fork.seq_id] = _Running(parent.params, parent.num_prompt_tokens, state, [])

    def end(self, seq_id: int) -> None:
        del self._running[seq_id]

    def rows(self, plan: StepPlan, layout: StepLayout) -> SampledRows:
        """The sequences whose last known token is computed in this step."""
        ends = layout.ends
        done = np.flatnonzero(ends == self._table.num_tokens[layout.rows])
        seq_ids = [plan.steps[index].seq_id for index in done.tolist()]
        states = (self._running[seq_id].state for seq_id in seq_ids)
        return SampledRows(seq_ids, layout.query_start_loc[done + 1] - 1, ends[done], not plan.siblings
                           and all(state is not None and state.takes_the_best for state in states))

    def finish(self, plan: StepPlan, layout: StepLayout, rows: SampledRows, hidden: torch.Tensor, best: Best | None,
               result: StepResult) -> None:
        """Give every sequence of `rows`, and their siblings, the next token, or say what a beam's could be; put all
        into `result`. `hidden`: `[T, hidden_size]` of the step; `best`: of these rows, where they take the best.
        Raises `ValueError` for a sibling whose parent is not among them."""
        result.prompt_logprobs = self._prompt_logprobs(plan, layout, hidden)
        place = {seq_id: i for i, seq_id in enumerate(rows.seq_ids)}
        if early := [sibling.seq_id for sibling in plan.siblings if sibling.parent_seq_id not in place]:
            raise ValueError(f"siblings {early} of sequences that do not sample in step {plan.step_id}")
        if not place:
            return
        if best is not None:
            self._take_the_best(rows, best, result)
            return
        logits = self._logits(hidden, rows)
        beams = {seq_id: i for seq_id, i in place.items() if self._running[seq_id].state is None}
        draws = {seq_id: i for seq_id, i in place.items() if seq_id not in beams}
        draws |= {sibling.seq_id: place[sibling.parent_seq_id] for sibling in plan.siblings}
        # Beams first: draws change their logits in place.
        if beams:
            found, candidates = self._finite(self._candidates, rows.take(beams), _take(logits, beams), hidden, result)
            result.beams = [BeamCandidates(seq_id=seq_id, token_ids=token_ids, logprobs=logprobs)
                            for seq_id, (token_ids, logprobs) in zip(found.seq_ids, candidates, strict=True)]
        if draws:
            drawn, sampled = self._finite(self._sample, rows.take(draws), _take(logits, draws), hidden, result)
            self._append(drawn, sampled, result)

    def _state(
        self, params: SamplingParams, seq_index: int, seq_id: int, num_prompt_tokens: int
    ) -> SamplingState | None:
        """`seq_id` has its row in the table."""
        if params.beam_width is not None:
            return None
        return self._sampler.start(
            params, seq_index=seq_index, token_ids=self._table.tokens(seq_id), num_prompt_tokens=num_prompt_tokens,
            eos_token_ids=self._decoder.config.eos_token_ids)

    def _logits(self, hidden: torch.Tensor, rows: SampledRows) -> torch.Tensor:
        return self._decoder.logits(hidden[torch.from_numpy(rows.hidden_rows).to(self._device)])

    def _finite(
        self, work: Callable[[SampledRows, torch.Tensor], list[Answer]], rows: SampledRows, logits: torch.Tensor,
        hidden: torch.Tensor, result: StepResult,
    ) -> tuple[SampledRows, list[Answer]]:
        """What `work` makes of `rows` whose logits are numbers; the others go to `result.failures`."""
        try:
            return rows, work(rows, logits)
        except NonFiniteLogitsError as error:
            bad = error.rows
        good = _without(rows, bad, result)
        # The first call has applied penalties and biases in place: the logits are taken afresh.
        return good, work(good, self._logits(hidden, good))

    def _take_the_best(self, rows: SampledRows, best: Best, result: StepResult) -> None:
        token_ids, bad = self._sampler.take_the_best(best.values, best.columns)
        if bad:
            token_ids = [token_id for i, token_id in enumerate(token_ids) if i not in bad]
            rows = _without(rows, bad, result)
        self._append(rows, [Sampled(token_id) for token_id in token_ids], result)

    def _sample(self, rows: SampledRows, logits: torch.Tensor) -> list[Sampled]:
        states = [state for s in rows.seq_ids if (state := self._running[s].state) is not None]
        return self._sampler.sample(logits, states, rows.positions.tolist())

    def _candidates(self, rows: SampledRows, logits: torch.Tensor) -> list[tuple[list[int], list[float]]]:
        config = self._decoder.config
        wanted = [self._running[s].params.num_beam_candidates(config.eos_token_ids) for s in rows.seq_ids]
        return self._sampler.likeliest(logits, [min(count, config.vocab_size) for count in wanted])

    def _append(self, rows: SampledRows, sampled: list[Sampled], result: StepResult) -> None:
        for seq_id, token in zip(rows.seq_ids, sampled, strict=True):
            state = self._running[seq_id].state
            assert state is not None
            state.append(token.token_id)
            result.tokens.append(SampledToken(seq_id=seq_id, token_id=token.token_id, logprobs=token.logprobs))
        table_rows = np.array([self._table.row(seq_id) for seq_id in rows.seq_ids], np.int64)
        self._table.append(table_rows, np.array([token.token_id for token in sampled], np.int64))

    def _prompt_logprobs(self, plan: StepPlan, layout: StepLayout, hidden: torch.Tensor) -> list[PromptLogprobs]:
        found = []
        for index, step in enumerate(plan.steps):
            running = self._running[step.seq_id]
            if not running.prompt or running.params.prompt_logprobs is None:
                continue
            first, row = int(layout.begins[index]) + 1, int(layout.query_start_loc[index])
            targets = running.prompt[first: int(layout.ends[index]) + 1]
            positions = []
            for offset in range(0, len(targets), PROMPT_LOGPROBS_ROWS):
                some = targets[offset: offset + PROMPT_LOGPROBS_ROWS]
                logits = self._decoder.logits(hidden[row + offset: row + offset + len(some)])
                positions.extend(self._sampler.prompt_logprobs(logits, some, running.params.prompt_logprobs))
            if positions:
                found.append(PromptLogprobs(seq_id=step.seq_id, first=first, positions=positions))
        return found


def _without(rows: SampledRows, bad: list[int], result: StepResult) -> SampledRows:
    """`rows` but those whose logits are no numbers, which go to `result.failures`."""
    result.failures += [SequenceFailure(seq_id=rows.seq_ids[i], message=NOT_NUMBERS) for i in bad]
    return rows.take({seq_id: i for i, seq_id in enumerate(rows.seq_ids) if i not in bad})


def _take(logits: torch.Tensor, places: dict[int, int]) -> torch.Tensor:
    """The rows whose indices `places` gives; without a copy where they are all, in order."""
    indices = list(places.values())
    return logits if indices == list(range(len(logits))) else logits[indices]
