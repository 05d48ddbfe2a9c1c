"""The scheduler and the block space under random arrivals, cancels and tiny pools, one plan ahead of the results."""

from __future__ import annotations

import importlib.util
from collections import deque
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvarto.cluster.admission import check
from kvarto.cluster.block_space import BlockSpace
from kvarto.cluster.scheduler import Scheduler, SchedulerLimits
from kvarto.protos.errors import InvalidRequestError
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.request import AddRequest, EngineInfo
from kvarto.protos.sampling import SamplingParams

_spec = importlib.util.spec_from_file_location("memory_model", Path(__file__).with_name("memory_model.py"))
assert _spec and _spec.loader
memory_model = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(memory_model)

EOS = 3
OWNER = b"frontend"


class SchedulerMachine(RuleBasedStateMachine):
    """Every request's tokens are those it would have had alone; every step leaves the block space whole."""

    @initialize(
        block_size=st.sampled_from([8, 16]), num_blocks=st.integers(2, 12), budget=st.integers(2, 40),
        max_num_seqs=st.integers(1, 6), depth=st.integers(1, 2))
    def start(self, block_size: int, num_blocks: int, budget: int, max_num_seqs: int, depth: int) -> None:
        self.info = EngineInfo(
            epoch=7, max_model_len=100, vocab_size=memory_model.VOCAB, max_num_seqs=max_num_seqs, block_size=block_size,
            kv_capacity_tokens=num_blocks * block_size, num_blocks=num_blocks, kernels="", dtype="", tp_size=1,
            num_groups=1)
        self.space = BlockSpace([KVGroupSpec(layer_ids=(0,))], [num_blocks], block_size)
        self.scheduler = Scheduler(
            self.space, SchedulerLimits(max_num_seqs, budget), epoch=7, eos_token_ids=frozenset({EOS}))
        self.budget, self.depth = budget, depth
        self.rank = memory_model.MemoryModelRank(block_size, num_blocks)
        self.in_flight: deque = deque()
        self.expected: dict[tuple[str, int], list[int]] = {}
        self.got: dict[tuple[str, int], list[int]] = {}
        self.finished: set[tuple[str, int]] = set()
        self.cancelled: set[str] = set()
        self.next_id = 0

    @rule(
        prompt=st.lists(st.integers(0, memory_model.VOCAB - 1), min_size=1, max_size=60),
        max_tokens=st.integers(1, 30), priority=st.integers(0, 2), n=st.integers(1, 2))
    def add(self, prompt: list[int], max_tokens: int, priority: int, n: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, n=n)
        worst = n * -(-(len(prompt) + max_tokens) // self.info.block_size)
        if n > self.info.max_num_seqs or worst > self.info.num_blocks:
            with pytest.raises(InvalidRequestError):
                check(prompt, params, self.info)
            return
        resolved = check(prompt, params, self.info)
        request_id = str(self.next_id)
        self.next_id += 1
        for index in range(n):
            self.expected[request_id, index] = memory_model.generate(prompt, max_tokens, EOS)
            self.got[request_id, index] = []
        self.scheduler.add(
            AddRequest(request_id=request_id, prompt_token_ids=prompt, params=params, priority=priority), OWNER,
            resolved)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted({key[0] for key in self.expected})))
        self.scheduler.cancel(OWNER, request_id)
        self.cancelled.add(request_id)

    @precondition(lambda self: len(self.in_flight) < self.depth)
    @rule()
    def schedule(self) -> None:
        plan = self.scheduler.schedule()
        if plan is None:
            return
        assert 0 < sum(step.num_tokens for step in plan.steps) <= self.budget
        granted = {block for step in plan.steps for table in step.new_block_ids for block in table}
        for _, named in self.in_flight:
            assert not granted & named, "a block of a plan in flight was given out again"
        named = {block for step in plan.steps for block in self.space.block_tables(step.seq_id)[0]}
        self.in_flight.append((plan, named))

    @precondition(lambda self: self.in_flight)
    @rule()
    def result(self) -> None:
        plan, _ = self.in_flight.popleft()
        for group, delta in self.scheduler.update(self.rank.execute(plan)):
            key = (group.request.request_id, delta.seq_index)
            assert group.request.request_id not in self.cancelled
            assert key not in self.finished
            assert delta.first == len(self.got[key])
            expected = [] if self.got[key] else group.request.prompt_token_ids[1:]
            assert [entry.token_id for entry in delta.prompt_logprobs] == expected
            self.got[key].extend(delta.token_ids)
            if delta.finish_reason:
                self.finished.add(key)
                assert self.got[key] == self.expected[key]

    @invariant()
    def whole(self) -> None:
        if not hasattr(self, "space"):
            return
        self.space.check_integrity()
        for key, tokens in self.got.items():
            assert tokens == self.expected[key][: len(tokens)]

    def teardown(self) -> None:
        if not hasattr(self, "space"):
            return
        for _ in range(20_000):
            if len(self.in_flight) < self.depth:
                self.schedule()
            if not self.in_flight:
                break
            self.result()
            self.space.check_integrity()
        assert self.scheduler.num_unfinished == 0, "a request never ended"
        assert self.space.num_free == self.space.num_blocks
        assert self.finished >= {key for key in self.expected if key[0] not in self.cancelled}


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck))
