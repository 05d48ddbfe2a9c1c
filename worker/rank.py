"""One rank: its part of the model, its blocks and its sequences. Executes plans; knows no socket and no Ray."""

from __future__ import annotations

import os
import platform
import time

import numpy as np
import torch

from ..kernels import backend
from ..protos.step import (
    PromptLogprobs,
    RankConfig,
    RankReady,
    SampledToken,
    SequenceFailure,
    StepPlan,
    StepResult,
)
from .batch import SequenceTable, StepLayout, build, lay_out
from .collectives import Communicator
from .decoder import Decoder
from .kv_groups import block_bytes, cache_shape
from .layout import TPLayout
from .memory import available_bytes
from .sampling import NonFiniteLogitsError, Sampler, SamplingState
from .weights import open_weights

PROMPT_LOGPROBS_ROWS = 128
"""Prompt rows whose logits are held at once: a whole chunk of a large vocabulary would take gigabytes."""


class Rank:
    """Load, then `allocate`, then `execute` plans in order. All ranks of a group execute the same plans."""

    def __init__(self, config: RankConfig, comm: Communicator) -> None:
        """Reads this rank's slices of the weights. Raises `ModelLoadError` when they cannot be read."""
        self._config = config
        self._comm = comm
        self._device = torch.device(config.device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._layout = TPLayout.of(config.model, config.tp_size, config.rank)
        torch.set_num_threads(config.num_threads)
        self._decoder = Decoder.load(
            config.model, self._layout, open_weights(config.model), self._dtype, self._device, comm,
            config.max_model_len)
        vocab = self._layout.vocab
        self._sampler = Sampler(comm, vocab_start=vocab.start, local_vocab=len(vocab))
        self._caches: list[torch.Tensor] = []
        self._table = SequenceTable(
            config.max_num_seqs, config.max_model_len, config.block_size, len(self._decoder.kv_groups))
        self._states: dict[int, SamplingState] = {}
        self._prompts: dict[int, tuple[list[int], int]] = {}

    def ready(self) -> RankReady:
        """What the Head needs to size the KV pool."""
        groups = self._decoder.kv_groups
        return RankReady(
            rank=self._config.rank, kv_groups=groups,
            block_bytes=[
                block_bytes(self._config.model, self._layout, group, self._config.block_size, self._dtype)
                for group in groups],
            available_bytes=available_bytes(self._device), kernels=backend(), node=platform.node(), pid=os.getpid())

    def allocate(self, num_blocks: list[int]) -> None:
        """Make the KV pools: `num_blocks` blocks per KV group, and the null block before them."""
        self._caches = [
            torch.empty(
                cache_shape(self._config.model, self._layout, group, count + 1, self._config.block_size),
                dtype=self._dtype, device=self._device)
            for group, count in zip(self._decoder.kv_groups, num_blocks, strict=True)]

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. Every rank returns the same tokens."""
        started = time.perf_counter()
        for seq_id in plan.ends:
            self._table.end(seq_id)
            del self._states[seq_id]
            self._prompts.pop(seq_id, None)
        for start in plan.starts:
            self._table.start(start)
            self._states[start.seq_id] = self._sampler.start(
                start.params, seq_index=start.seq_index, token_ids=start.token_ids,
                num_prompt_tokens=start.num_prompt_tokens, eos_token_ids=self._config.model.eos_token_ids)
            # One that has generated already has had its prompt's log probabilities sent.
            if start.params.prompt_logprobs is not None and len(start.token_ids) == start.num_prompt_tokens:
                self._prompts[start.seq_id] = start.token_ids, start.params.prompt_logprobs
        layout = lay_out(plan.steps, self._table)
        hidden = self._decoder.forward(build(layout, self._table, self._device), self._caches)
        self._table.num_computed[layout.rows] = layout.ends
        result = StepResult(epoch=plan.epoch, step_id=plan.step_id, rank=self._config.rank)
        result.prompt_logprobs = self._prompt_logprobs(plan, layout, hidden)
        self._sample(plan, layout, hidden, result)
        result.seconds = time.perf_counter() - started
        return result

    def close(self) -> None:
        """Leave the group: collectives that wait for this rank fail."""
        self._comm.close()

    def _sample(self, plan: StepPlan, layout: StepLayout, hidden: torch.Tensor, result: StepResult) -> None:
        """The next token of every sequence whose last known token was computed."""
        done = np.flatnonzero(layout.ends == self._table.num_tokens[layout.rows])
        if not len(done):
            return
        last_rows = torch.from_numpy(layout.query_start_loc[done + 1] - 1).to(self._device)
        logits = self._decoder.logits(hidden[last_rows])
        seq_ids = [plan.steps[index].seq_id for index in done]
        positions = layout.ends[done]
        try:
            sampled = self._sampler.sample(logits, [self._states[s] for s in seq_ids], positions.tolist())
        except NonFiniteLogitsError as error:
            bad = set(error.rows)
            message = "the model's logits for this sequence are not numbers: it cannot be continued"
            result.failures = [SequenceFailure(seq_id=seq_ids[row], message=message) for row in sorted(bad)]
            good = [row for row in range(len(seq_ids)) if row not in bad]
            done, positions = done[good], positions[good]
            seq_ids = [seq_ids[row] for row in good]
            # The first call has applied penalties and biases in place: the rows are taken afresh.
            logits = self._decoder.logits(hidden[last_rows[good]])
            sampled = self._sampler.sample(logits, [self._states[s] for s in seq_ids], positions.tolist())
        for seq_id, token in zip(seq_ids, sampled, strict=True):
            self._states[seq_id].append(token.token_id)
            result.tokens.append(SampledToken(seq_id=seq_id, token_id=token.token_id, logprobs=token.logprobs))
        self._table.append(layout.rows[done], np.array([token.token_id for token in sampled], np.int64))

    def _prompt_logprobs(self, plan: StepPlan, layout: StepLayout, hidden: torch.Tensor) -> list[PromptLogprobs]:
        found = []
        for index, step in enumerate(plan.steps):
            if step.seq_id not in self._prompts:
                continue
            token_ids, num_top = self._prompts[step.seq_id]
            first, row = int(layout.begins[index]) + 1, int(layout.query_start_loc[index])
            targets = token_ids[first: int(layout.ends[index]) + 1]
            positions = []
            for offset in range(0, len(targets), PROMPT_LOGPROBS_ROWS):
                some = targets[offset: offset + PROMPT_LOGPROBS_ROWS]
                logits = self._decoder.logits(hidden[row + offset: row + offset + len(some)])
                positions.extend(self._sampler.prompt_logprobs(logits, some, num_top))
            if positions:
                found.append(PromptLogprobs(seq_id=step.seq_id, first=first, positions=positions))
        return found
