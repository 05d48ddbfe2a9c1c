"""The scheduler and the block space under random arrivals, forks, beams, cancels, failures and tiny pools, on ranks
that execute the plans on a model of memory.

`KVARTO_MACHINE_EXAMPLES=5000` looks longer; the default is some 50,000 steps.
`KVARTO_MACHINE_SHRINK=0` leaves a failure as it was found, which is quicker.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections import deque
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvarto.cluster.admission import check
from kvarto.cluster.policies import Costs
from kvarto.protos.errors import InvalidRequestError
from kvarto.protos.request import AddRequest, EngineInfo, KVPool
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import StepPlan


def _sibling(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


memory_model, expected_request, plan_in_flight = map(_sibling, ("memory_model", "expected_request", "plan_in_flight"))
Expected, REACHED, EOS = expected_request.Expected, expected_request.REACHED, expected_request.EOS
PlanInFlight = plan_in_flight.PlanInFlight
world = _sibling("machine_world")

OWNER = b"frontend"
MAX_MODEL_LEN = 100
STEPS = 60
EXAMPLES = int(os.environ.get("KVARTO_MACHINE_EXAMPLES", "1000"))
SHRINK = os.environ.get("KVARTO_MACHINE_SHRINK", "1") == "1"
PATIENCE = 400
"""Plans in a row without a token after which a request counts as starved."""

COUNTING = [10 + i % 30 for i in range(48)]
BASES = [COUNTING, COUNTING[:24] + COUNTING[10:34], [9] * 16 + COUNTING[16:], [7] * 48]
"""Prompts begin like one of these: with common prefixes, with equal blocks after different prefixes, and with blocks
that repeat."""


class SchedulerMachine(RuleBasedStateMachine):
    """Every request's tokens are those it would have had alone; every step leaves the block space whole."""

    is_sparse = False
    is_whole = False
    """Whether the last rule went through: after a failure there is nothing to tear down."""

    @initialize(
        block_size=st.sampled_from([8, 16]), num_blocks=st.sampled_from([4, 6, 8, 5, 10, 12, 14, 24, 3, 2]),
        num_host_blocks=st.sampled_from([4, 0, 10, 2, 6, 1, 3]), budget=st.integers(4, 40),
        mixed=st.sampled_from([None, 4, 7, 16]),
        max_num_seqs=st.integers(1, 8), depth=st.integers(1, 2), caching=st.sampled_from([True, False, True]),
        disk_capacity=st.sampled_from([3, 0, 12]), eviction=st.sampled_from(["lru", "retention"]),
        mode=st.sampled_from(["auto", "swap", "recompute"]), victim=st.sampled_from(["latest", "least_computed"]),
        watermark=st.sampled_from(["one_percent", "none"]), block_copy_s=st.sampled_from([1e-6, 3e-3, 1.0]),
        corruption=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 2**16), pressure=st.booleans(),
        layout=st.sampled_from(["full", "full and window", "window", "full", "two windows", "residual",
                                "window and residual", "full, window and residual"]),
        window=st.sampled_from([8, 20, 5, 12, 1, 33, 2]), num_sinks=st.sampled_from([0, 1, 3]),
        num_seats=st.sampled_from([1, 2, 0]),
        policy=st.sampled_from(["tova", "snapkv", "h2o"]),
        kept=st.sampled_from([8, 12, 5, 16, 20]), interval=st.sampled_from([8, 1, 3, 16]),
        observed=st.sampled_from([4, 2]), has_host=st.sampled_from([True, False, True]))
    def start(self, seed, depth, block_copy_s, pressure, **config):
        if pressure:
            # Blocks are what is short: neither seats nor budget, and results are late.
            depth, config["max_num_seqs"], config["budget"] = 2, 8, max(20, config["budget"])
        if not self.is_sparse:
            config["policy"] = None
        world.add_sparsity(config)
        if not config["caching"] or not config["num_host_blocks"]:
            config["disk_capacity"] = 0
        if not config["num_host_blocks"] and config["mode"] == "swap":
            config["mode"] = "auto"
        world.add_pools(config)
        self.config = config | {
            "costs": Costs(block_copy_s=block_copy_s, prefill_token_s=1e-3), "eos": EOS}
        self.block_size, self.caching, self.depth = config["block_size"], config["caching"], depth
        pools = [KVPool(num_blocks=count, window=group.window, num_sinks=group.num_sinks, residual=group.residual)
                 for count, group in zip(config["num_blocks"], config["kv_groups"], strict=True)]
        self.info = EngineInfo(
            epoch=7, max_model_len=MAX_MODEL_LEN, vocab_size=memory_model.VOCAB,
            max_num_seqs=self._most_seqs(), kv_sparsity=config["sparsity"],
            block_size=self.block_size, kv_capacity_tokens=max(config["num_blocks"]) * self.block_size,
            max_num_batched_tokens=config["budget"], kv_pools=pools, num_host_blocks=min(config["num_host_blocks"]),
            kernels="", dtype="", kv_cache_dtype="", tp_size=1, num_groups=1)
        self.rng = random.Random(seed)
        self.requests: dict[str, Expected] = {}
        self.num_restarts = 0
        self._start_all([{} for _ in pools])

    # -- rules -------------------------------------------------------------------------------------------------------

    @rule(
        base=st.integers(0, len(BASES) - 1), cut=st.sampled_from([8, 16, 17, 24, 0, 5, 33, 40, 48]),
        tail=st.lists(st.integers(0, 2), max_size=6), max_tokens=st.integers(1, 25), kind=st.integers(0, 9),
        width=st.integers(2, 4), n=st.integers(1, 3), priority=st.integers(0, 2), salt=st.sampled_from(["", "a"]),
        produced=st.lists(st.integers(1, 20), max_size=4))
    def add(self, base, cut, tail, max_tokens, kind, width, n, priority, salt, produced):
        prompt = BASES[base][:cut] + tail or [1]
        options = {"max_tokens": max_tokens}
        if kind < 3:
            options |= {"beam_width": width, "n": min(n, width), "length_penalty": [1.0, 0.0, 2.0][n - 1],
                        "early_stopping": [False, True, "never"][kind], "ignore_eos": priority == 1}
        elif kind == 3:
            options |= {"best_of": width, "n": min(n, width), "logprobs": 0}
        elif kind == 4:
            options |= {"n": n, "prompt_logprobs": 0}
        elif kind == 5:
            options |= {"n": n, "min_tokens": max_tokens // 2, "logprobs": 1}
        else:
            options |= {"n": n}
        if kind < 5 or len(produced) < n:
            produced = []
        self._add(prompt, SamplingParams(**options), priority, salt, produced)

    @precondition(lambda self: any(request.ended for request in self.requests.values()))
    @rule(which=st.integers(0, 100), tail=st.lists(st.integers(0, 2), min_size=1, max_size=12))
    def follow_up(self, which, tail):
        ended = [(request, index) for request in self.requests.values() for index in sorted(request.ended)]
        request, index = ended[which % len(ended)]
        old = request.prompt + request.outputs[index]
        follow_up = self._add(old + tail, SamplingParams(max_tokens=3), 0, request.salt, [])
        # The last token of an output is never computed.
        is_kept = self.caching and not self.config["sparsity"] and not request.produced
        if follow_up and is_kept and request.params.prompt_logprobs is None:
            follow_up.must_hit = (len(old) - 1) // self.block_size * self.block_size

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 100), index=st.sampled_from([None, 0, 1, 2]))
    def cancel(self, which, index):
        self.is_whole = False
        request_id = list(self.requests)[which % len(self.requests)]
        request = self.requests[request_id]
        self.scheduler.cancel(OWNER, request_id, index)
        if index is None:
            request.cancelled |= set(range(len(request.outputs)))
        elif request.beams is None and index < len(request.outputs):
            request.cancelled.add(index)
        # Beams come all at once or not at all: which of the running ones comes out as the `index`th nobody knows yet.

    @precondition(lambda self: self.num_restarts < 2 and len(self.requests) > 3)
    @rule()
    def restart(self):
        """Head and ranks die. Files outlive them, and frontends hand over what has not ended."""
        self.is_whole = False
        self.num_restarts += 1
        REACHED.update(self.rank.seen)
        REACHED["restarts"] += 1
        self._start_all(self.rank.memory.disks)
        for request_id, request in self.requests.items():
            if not request.over:
                request.hand_over()
                self._send(request_id, request)

    @precondition(lambda self: len(self.in_flight) < self.depth)
    @rule()
    def schedule(self):
        self.is_whole = False
        decoding = world.decoding(self.scheduler)
        plan = self.scheduler.schedule()
        if plan is None:
            return
        plan = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan)
        assert sum(step.num_tokens for step in plan.steps) <= self.config["budget"]
        world.check_mixed(plan, decoding, self.config)
        assert len(plan.steps) + len(plan.siblings) <= self.config["max_num_seqs"]
        flight = PlanInFlight(plan, self.held)
        assert flight.most_held <= 2 * self.config["max_num_seqs"], "more sequences than the ranks have rows for"
        for earlier in self.in_flight:
            flight.check_against(earlier)
        self._watch_evictions(flight)
        begun = [blocks for blocks in self.space.live.values() if any(blocks.num_behind)]
        REACHED["behind"] += bool(begun)
        REACHED["hits_behind"] += any(
            table and 0 in table[: start.num_computed_tokens // self.block_size]
            for start in plan.starts for table in self.held.tables[start.seq_id])
        self.in_flight.append(flight)

    @precondition(lambda self: self.in_flight)
    @rule(failing=st.integers(0, 40), order=st.integers(0, 2))
    def result(self, failing, order):
        self.is_whole = False
        plan = self.in_flight.popleft().plan
        failing = [step.seq_id for step in plan.steps[:1]] if failing == 40 else []
        results = self.rank.execute(plan, failing=failing)
        self.num_failures += len(results[0].failures)
        # Every rank's own results come in order.
        if results[1:] and (order == 2 or plan.step_id % 2 or self.late):
            self.late.append(results.pop())
            REACHED["late"] += 1
        for result in reversed(results) if order == 1 else results:
            self._take(result)

    @precondition(lambda self: not self.in_flight)
    @rule(count=st.integers(1, 12))
    def run(self, count):
        """Several plans, one after the other."""
        for _ in range(count):
            self.schedule()
            if self.in_flight:
                self.result(0, count % 3)
            self.space.check_integrity()

    @precondition(lambda self: self.late)
    @rule()
    def late_result(self):
        self.is_whole = False
        self._take(self.late.popleft())

    @invariant()
    def whole(self):
        if hasattr(self, "space"):
            REACHED["steps"] += 1
            self.space.check_integrity()
            for group in self.scheduler.groups:
                for sequence in group.live:
                    blocks = sequence.blocks
                    assert sequence.num_computed_tokens == blocks.num_tokens + blocks.num_dropped
            self.is_whole = True

    def teardown(self):
        if not self.is_whole:
            return
        self.idle = 0
        while self.scheduler.num_unfinished or self.in_flight or self.late:
            before = len(self.in_flight)
            if before < self.depth:
                self.schedule()
            assert self.in_flight or self.late or not self.scheduler.num_unfinished, "a deadlock: nothing is scheduled"
            if self.late and self.idle % 4 == 0:
                self.late_result()
            if self.in_flight:
                self.result(0, self.idle % 3)
            self.space.check_integrity()
            self.idle += 1
            assert self.idle < PATIENCE, "starvation: no request gets a token"
        self._check_the_end()
        REACHED.update(self.rank.seen)

    # -- inside the rules --------------------------------------------------------------------------------------------

    def _add(self, prompt, params, priority, salt, produced):
        """Returns the request, or None where it is refused: rightly so, as far as can be told from outside."""
        self.is_whole = False
        try:
            max_tokens = check(prompt, params, self.info)
        except InvalidRequestError:
            blocks = self._most_blocks(len(prompt), params.max_tokens)
            fits = all(pool.num_blocks >= min(
                params.num_sequences * blocks, world.enough_blocks(pool, self.config, params.num_sequences))
                for pool in self.info.kv_pools)
            assert (
                not fits or params.num_sequences > self.info.max_num_seqs
                or len(prompt) + params.max_tokens > MAX_MODEL_LEN), "a request that fits is refused"
            return None
        assert max_tokens == params.max_tokens
        request_id = str(len(self.requests))
        request = self.requests[request_id] = Expected(prompt, params, priority, salt, produced)
        self._send(request_id, request)
        return request

    def _most_seqs(self):
        sparsity = self.config["sparsity"]
        return min(self.config["max_num_seqs"], self.config["budget"] - (sparsity.window - 1 if sparsity else 0))

    def _most_blocks(self, num_prompt, max_tokens):
        """A pool that has so many for every sequence of a request is never too small for it."""
        most, fresh, sparsity = num_prompt + max_tokens, 0, self.config["sparsity"]
        if sparsity and (num_prompt > sparsity.budget or sparsity.policy != "snapkv"):
            fresh = -(-sparsity.budget // self.block_size)
            if sparsity.policy != "snapkv":
                most = min(most, max(num_prompt, sparsity.budget + sparsity.interval))
        return -(-most // self.block_size) + fresh

    def _send(self, request_id, request):
        self.scheduler.add(
            AddRequest(
                request_id=request_id, prompt_token_ids=list(request.prompt), params=request.params,
                priority=request.priority, cache_salt=request.salt,
                output_token_ids=[list(tokens) for tokens in request.produced],
                ended_indices=[] if request.beams is not None else sorted(request.ended | request.cancelled)),
            OWNER, request.params.max_tokens)

    def _start_all(self, disks):
        """A Head and its ranks, with nothing but the files of those before."""
        config = self.config
        stored = [disk for disk, group in zip(disks, config["kv_groups"], strict=True) if not group.residual]
        everywhere = set.intersection(*map(set, stored))
        self.space, self.scheduler = world.make_scheduler(
            config, [key for key in stored[0] if key in everywhere], sorted(set().union(*stored) - everywhere))
        self.rank = memory_model.MemoryModelRank(
            self.block_size, config["num_blocks"], config["num_host_blocks"], self.rng,
            kv_groups=config["kv_groups"], disk_capacity=config["disk_capacity"], eos_token_ids=(EOS,),
            corruption=config["corruption"], sparsity=config["sparsity"])
        self.rank.memory.disks = [dict(disk) for disk in disks]
        self.held = memory_model.HeldSequences(self.block_size, config["kv_groups"])
        self.in_flight: deque[PlanInFlight] = deque()
        self.late: deque = deque()
        self.full: set[tuple[int, int]] = set()
        self.may_have_evicted = self.num_restarts > 0
        self.started: set[int] = set()
        self.num_failures = 0
        self.idle = 0

    def _take(self, result):
        for group, delta in world.give(self.scheduler, result):
            assert delta.request_id == group.request.request_id
            request = self.requests[delta.request_id]
            self.idle = 0
            if delta.error is None:
                if self.may_have_evicted:
                    request.must_hit = 0
                sparsity = self.config["sparsity"]
                assert not (sparsity and sparsity.policy == "h2o" and delta.num_cached_tokens), "a hit without scores"
                # After a restart it may find its own blocks on disk.
                others = [other for other in self.requests.values() if other is not request or self.num_restarts]
                request.check_hits(delta, others, self.block_size)
                request.take(delta, self.block_size, self.caching)
                continue
            assert not request.over, "an error after the end"
            request.failed = True
            # What a failed sequence holds is not to be found any more.
            self.may_have_evicted = True
            self.num_failures -= 1
            assert self.num_failures >= 0, "an error that no rank reported"
            REACHED["errors"] += 1

    def _watch_evictions(self, flight):
        """Whether a cached block may be gone: one that was full was taken, or a sequence was preempted."""
        starts = {start.seq_id for start in flight.plan.starts}
        self.may_have_evicted |= bool(
            self.full & flight.gained or starts & self.started or flight.swaps_out)
        self.full = (self.full - flight.gained) | flight.filled
        self.started |= starts

    def _check_the_end(self):
        assert world.num_used(self.space) == 0, "blocks of sequences that are gone"
        for request_id, request in self.requests.items():
            assert request.over, f"request {request_id} never ended"


class SparseMachine(SchedulerMachine):
    """The same with KV sparsity, with which much else cannot happen."""

    is_sparse = True


def _settings(max_examples):
    return settings(
        phases=[phase for phase in Phase if phase is not Phase.explain and (SHRINK or phase is not Phase.shrink)],
        max_examples=max_examples, stateful_step_count=STEPS, deadline=None, suppress_health_check=list(HealthCheck))


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = _settings(EXAMPLES)
TestSparseMachine = SparseMachine.TestCase
TestSparseMachine.settings = _settings(EXAMPLES // 2)


def test_the_machine_has_been_everywhere():
    if REACHED["steps"] < 10_000:
        pytest.skip("the machine has not run in this process, or was told to run little")
    for what in ("swap_outs", "swap_ins", "copies", "disk_stores", "disk_loads", "disk_drops", "failed_loads", "late",
                 "forks", "siblings", "hits", "cached", "follow_ups_hit", "errors", "restarts", "behind",
                 "hits_behind", "compactions", "sparse_swaps", "quantized"):
        assert REACHED[what], f"{what}: never in {REACHED['steps']} steps"
