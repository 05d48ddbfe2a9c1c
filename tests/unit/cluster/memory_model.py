"""A rank that executes plans on a model of memory: whose keys and values stand in which slot. The scheduler's oracle.

It knows the wire contract (`protos/step.py`) and nothing of the scheduler or the block space. What a slot holds is a
number that depends on all tokens up to it (`stand_in.chain`) and on its KV group, so that reading a wrong, stale or
unwritten slot shows, and sharing is right exactly where prefixes are equal. What no query sees may be anything.

A compaction keeps any rows, but always the last: from then on a query must see exactly these. The tokens that follow
depend on the whole prefix all the same, so that whoever drops rows must come to the tokens that it has alone.

Beside a residual the other KV groups are written a block at a time, from what the residual holds when it is full, and
read up to the block of the query; the rest is read in the residual.
"""

from __future__ import annotations

import importlib.util
import random
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from types import ModuleType

from kvarto.protos.model import KVGroupSpec
from kvarto.protos.sparsity import KVSparsity
from kvarto.protos.step import (
    BeamCandidates,
    PromptLogprobs,
    SampledToken,
    SequenceFailure,
    SequenceFork,
    SequenceStart,
    SequenceStep,
    StepPlan,
    StepResult,
    TokenLogprobs,
)


def _sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stand_in, held_sequences = _sibling("stand_in"), _sibling("held_sequences")
modelled_memory, sequence_text = _sibling("modelled_memory"), _sibling("sequence_text")
MOVE_ORDER, SequenceText = modelled_memory.MOVE_ORDER, sequence_text.SequenceText
VOCAB, next_token, generate, search = stand_in.VOCAB, stand_in.next_token, stand_in.generate, stand_in.search
HeldSequences, moves_of = held_sequences.HeldSequences, held_sequences.moves_of
moves_by_group, blocks_of = held_sequences.moves_by_group, held_sequences.blocks_of


class MemoryModelRank:
    """Executes plans as both ranks of a group would. Raises `AssertionError` where one breaks the contract, or where
    a sequence would read a slot that does not hold its own token after its own prefix."""

    def __init__(
        self, block_size: int, num_blocks: int | list[int], num_host_blocks: int | list[int] = 0,
        rng: random.Random | None = None, *, kv_groups: list[KVGroupSpec] | None = None, disk_capacity: int = 0,
        eos_token_ids: tuple[int, ...] = (), corruption: float = 0.0, sparsity: KVSparsity | None = None,
    ) -> None:
        """Blocks are per KV group, or of every one; `corruption`: how probable it is that a file cannot be loaded, on
        each of the two ranks."""
        self.block_size = block_size
        self.held = HeldSequences(block_size, kv_groups)
        self.kv_groups = self.held.kv_groups
        num_groups = len(self.kv_groups)
        self._has_residual = self.kv_groups[-1].residual
        self.texts: dict[int, SequenceText] = {}
        self.seen: Counter[str] = Counter()
        self._rng = rng or random.Random(0)
        self.memory = modelled_memory.ModelledMemory(
            block_size, _per_group(num_blocks, num_groups), _per_group(num_host_blocks, num_groups), self._rng,
            self.seen, disk_capacity=disk_capacity, corruption=corruption)
        self.devices = self.memory.devices
        self._eos_token_ids = eos_token_ids
        self._sparsity = sparsity
        self._kept_before: dict[int, list[int]] = {}

    def execute(
        self, plan: StepPlan, *, failing: Collection[int] = (), corrupt: Collection[bytes] = ()
    ) -> list[StepResult]:
        """The results, rank 0's first. `failing`: sequences whose logits are not numbers; `corrupt`: keys whose files
        rank 1 cannot load."""
        moves = moves_by_group(plan, len(self.kv_groups))
        assert plan.steps or any(getattr(each, kind) for each in moves for kind in MOVE_ORDER), "an empty plan"
        self._change(plan)
        survivors = self.held.change(plan)
        failed_loads: tuple[list[tuple[int, bytes]], ...] = ([], [])
        for group, each in enumerate(moves):
            self.memory.check(group, each, {block for where, block in survivors if where == group})
            self.memory.move(group, each, failed_loads, corrupt)
        self._grant(plan)
        result = StepResult(epoch=plan.epoch, step_id=plan.step_id, failed_loads=failed_loads[0])
        self._compute(plan, result)
        self._compact(plan)
        self._sample(plan, result, failing)
        other = StepResult(epoch=plan.epoch, step_id=plan.step_id, rank=1, failed_loads=failed_loads[1])
        return [result, other] if any(each.disk_loads for each in moves) else [result]

    # -- sequences -------------------------------------------------------------------------------------------------

    def _change(self, plan: StepPlan) -> None:
        for fork in plan.forks:
            parent = self.texts.get(fork.parent_seq_id)
            assert parent is None or parent.params.beam_width, "parallel samples are siblings"
            self._fork(fork)
        scored = self._sparsity is not None and self._sparsity.keeps_scores
        assert scored or not plan.suspends, "a sequence is suspended of which the ranks keep nothing"
        for seq_id in plan.suspends:
            self._kept_before[seq_id] = self.texts.pop(seq_id).kept
        # Those have no text here. `held` has not seen this plan yet, which may end or start what it copies.
        suspended = {*self.held.suspended, *plan.suspends}
        for fork in plan.forks:
            if fork.parent_seq_id in suspended:
                suspended.add(fork.seq_id)
        for seq_id in plan.ends:
            if seq_id not in suspended:
                self._kept_before[seq_id] = self.texts.pop(seq_id).kept
        for start in plan.starts:
            self._start(start, suspended)

    def _start(self, start: SequenceStart, suspended: set[int]) -> None:
        text = SequenceText(start.params, start.seq_index, start.num_prompt_tokens, start.token_ids)
        assert 0 < start.num_prompt_tokens <= len(text.tokens)
        self.texts[start.seq_id] = text
        self.seen["hits"] += start.num_computed_tokens > 0
        self.seen["sparse_swaps"] += start.num_dropped_tokens > 0
        if self._sparsity is not None and self._sparsity.keeps_scores:
            assert not start.num_computed_tokens or start.seq_id in suspended, "rows without their scores"

    def _fork(self, fork: SequenceFork) -> None:
        if fork.parent_seq_id in self.held.suspended:
            self._kept_before[fork.seq_id] = self._kept_before[fork.parent_seq_id]
            return
        self.texts[fork.seq_id] = self.texts[fork.parent_seq_id].fork(fork.seq_index)

    # -- steps -----------------------------------------------------------------------------------------------------

    def _grant(self, plan: StepPlan) -> None:
        for step in plan.steps:
            text = self.texts[step.seq_id]
            assert text.params.beam_width or not step.token_ids, "the Head chooses tokens of beams only"
            text.append(step.token_ids)
        for seq_id, blocks in self.held.grant(plan).items():
            named = blocks | self.held.blocks(seq_id)
            assert all(1 <= block < len(self.devices[group]) for group, block in named), "block id out of range"
            # What is not computed yet is not there: a stale content that happens to be right must not hide a fault.
            first, offset = divmod(self.held.rows(seq_id), self.block_size)
            for group, block in blocks:
                kept = offset if block == self.held.tables[seq_id][group][first] else 0
                self.devices[group][block][kept:] = [0] * (self.block_size - kept)
        for start in plan.starts:
            if start.num_dropped_tokens:
                self._recognize(start)
        if self._sparsity is not None:
            for step in plan.steps:
                self._check_schedule(step, self._sparsity)

    def _recognize(self, start: SequenceStart) -> None:
        """Which rows a sequence holds that comes back from the host: those that it was swapped out with."""
        text, size = self.texts[start.seq_id], self.block_size
        places = {number: position for position, number in enumerate(text.chain)}
        table = self.held.tables[start.seq_id][0]
        held = [places.get(self.devices[0][table[row // size]][row % size], -1)
                for row in range(self.held.rows(start.seq_id))]
        before = self._kept_before.pop(start.seq_id, [])
        assert held == sorted(set(held)) and held[0] >= 0, "rows come back out of order, or others"
        assert held[: len(before)] == before, "other rows come back than were kept"
        assert held[-1] == start.num_computed_tokens - 1
        text.kept = held

    def _check_schedule(self, step: SequenceStep, sparsity: KVSparsity) -> None:
        """`KVSparsity`, word for word."""
        begin, num_prompt = self.held.computed[step.seq_id], self.texts[step.seq_id].num_prompt_tokens
        end = begin + step.num_tokens
        num_rows = self.held.rows(step.seq_id) + step.num_tokens
        if begin < num_prompt and num_prompt > sparsity.budget:
            assert end <= num_prompt, "a step goes on beyond the end of a prompt that is compacted"
            is_due = end == num_prompt
            assert not is_due or step.num_tokens >= sparsity.window, "queries that score a prompt are missing"
        else:
            is_due = sparsity.policy != "snapkv" and num_rows == sparsity.budget + sparsity.interval
            assert sparsity.policy == "snapkv" or num_rows <= sparsity.budget + sparsity.interval, "too many rows"
        assert (step.compaction is not None) == is_due, "compacted too early, or not at all"
        assert step.compaction is None or step.compaction.num_kept == sparsity.budget

    def _compute(self, plan: StepPlan, result: StepResult) -> None:
        """All writes come before all reads: each layer writes the keys and values of the batch, quantizes the blocks
        that are full now, then attends."""
        size = self.block_size
        for step in plan.steps:
            text = self.texts[step.seq_id]
            begin = self.held.computed[step.seq_id]
            end = begin + step.num_tokens
            assert end <= len(text.tokens), "a token is computed that nobody knows"
            tables = self.held.tables[step.seq_id]
            for group, table in enumerate(tables):
                if self._has_residual and not self.kv_groups[group].residual:
                    continue
                dropped = self.held.dropped[step.seq_id]
                for position in range(begin, end):
                    row = position - dropped
                    self.devices[group][table[row // size]][row % size] = text.chain[position] + group
            if self._has_residual:
                for index in range(begin // size, end // size):
                    self._quantize([table[index] for table in tables])
            if text.scored and (known := text.tokens[begin + 1: min(end + 1, text.num_prompt_tokens)]):
                result.prompt_logprobs.append(PromptLogprobs(
                    seq_id=step.seq_id, first=begin + 1, positions=[_logprobs(token) for token in known]))
        for step in plan.steps:
            begin = self.held.computed[step.seq_id]
            end = begin + step.num_tokens
            if self.held.dropped[step.seq_id]:
                for group in range(len(self.kv_groups)):
                    self._check_read(step.seq_id, group, 0, self.held.rows(step.seq_id) + step.num_tokens)
                continue
            for group, spec in enumerate(self.kv_groups):
                # What the first query sees, what the last one sees and all between.
                seen_from = held_sequences.first_seen(spec, begin, self.block_size)
                in_residual = self._has_residual and not spec.residual
                seen_to = (end - 1) // self.block_size * self.block_size if in_residual else end
                self._check_read(step.seq_id, group, 0, min(spec.num_sinks, seen_from, seen_to))
                self._check_read(step.seq_id, group, seen_from, seen_to)

    def _quantize(self, blocks: list[int]) -> None:
        """`blocks`: of every KV group, the residual last."""
        residual = len(blocks) - 1
        self.seen["quantized"] += 1
        for group, block in enumerate(blocks[:-1]):
            self.devices[group][block] = [number - residual + group for number in self.devices[residual][blocks[-1]]]

    def _check_read(self, seq_id: int, group: int, begin: int, end: int) -> None:
        """The rows from `begin` to `end`, positions where none is dropped, hold what the sequence has put there, or
        somebody with its prefix."""
        size, device, table = self.block_size, self.devices[group], self.held.tables[seq_id][group]
        chain = self.texts[seq_id].chain
        while begin < end:
            stop = min((begin // size + 1) * size, end)
            wanted = self._numbers(seq_id, begin, stop) if self.held.dropped[seq_id] else chain[begin: stop]
            if group:
                wanted = [number + group for number in wanted]
            assert device[table[begin // size]][begin % size: begin % size + stop - begin] == wanted, (
                f"sequence {seq_id} reads what is not its own in positions {begin} to {stop} of KV group {group}")
            begin = stop

    def _numbers(self, seq_id: int, begin: int, end: int) -> list[int]:
        """What stands in rows of a sequence that has dropped some."""
        text, dropped = self.texts[seq_id], self.held.dropped[seq_id]
        return [text.chain[text.kept[row] if row < len(text.kept) else row + dropped] for row in range(begin, end)]

    def _compact(self, plan: StepPlan) -> None:
        """In any order, each sequence keeping any of its rows, of which the last is one."""
        size = self.block_size
        for step in self._rng.sample(plan.steps, len(plan.steps)):
            if (compaction := step.compaction) is None:
                continue
            self.seen["compactions"] += 1
            text, dropped = self.texts[step.seq_id], self.held.dropped[step.seq_id]
            num_rows = self.held.rows(step.seq_id) + step.num_tokens
            rows = [*sorted(self._rng.sample(range(num_rows - 1), compaction.num_kept - 1)), num_rows - 1]
            for group, new in enumerate(compaction.new_block_ids):
                device, table = self.devices[group], self.held.tables[step.seq_id][group]
                contents = [device[table[row // size]][row % size] for row in rows]
                contents += [0] * (len(new) * size - len(rows))
                for index, block in enumerate(new):
                    device[block] = contents[index * size: (index + 1) * size]
            text.kept = [text.kept[row] if row < len(text.kept) else row + dropped for row in rows]

    def _sample(self, plan: StepPlan, result: StepResult, failing: Collection[int]) -> None:
        self.held.finish(plan)
        done = [step.seq_id for step in plan.steps
                if self.held.computed[step.seq_id] == len(self.texts[step.seq_id].tokens)]
        parents = set(done)
        failing = set(failing)
        for sibling in plan.siblings:
            assert sibling.parent_seq_id in parents, "a sibling of a sequence that does not sample"
            assert not self.texts[sibling.parent_seq_id].params.beam_width, "beams are forked, not sampled"
            self._fork(sibling)
            done.append(sibling.seq_id)
            failing |= {sibling.seq_id} if sibling.parent_seq_id in failing else set()
        self.seen["forks"] += len(plan.forks)
        self.seen["siblings"] += len(plan.siblings)
        for seq_id in done:
            text = self.texts[seq_id]
            if text.failed or seq_id in failing:
                if not text.failed:
                    result.failures.append(SequenceFailure(seq_id=seq_id, message="not a number"))
                text.failed = True
                text.append([0])  # A plan that is made already may compute on.
            elif text.params.beam_width:
                tokens, logprobs = stand_in.candidates(
                    text.chain[-1], text.params.num_beam_candidates(self._eos_token_ids))
                result.beams.append(BeamCandidates(seq_id=seq_id, token_ids=tokens, logprobs=logprobs))
            else:
                token = stand_in.draw(text.chain[-1], text.seq_index)
                text.append([token])
                result.tokens.append(SampledToken(
                    seq_id=seq_id, token_id=token,
                    logprobs=None if text.params.logprobs is None else _logprobs(token)))


def _per_group(counts: int | list[int], num_groups: int) -> list[int]:
    return [counts] * num_groups if isinstance(counts, int) else counts


def _logprobs(token: int) -> TokenLogprobs:
    return TokenLogprobs(token_id=token, logprob=-1.0, rank=1, top_token_ids=[], top_logprobs=[])
