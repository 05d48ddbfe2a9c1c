"""The scheduler and the block space under random arrivals, forks, beams, cancels, failures and tiny pools, on ranks
that execute the plans on a model of memory.

`KVARTO_MACHINE_EXAMPLES=5000` looks longer; the default is some 50,000 steps.
`KVARTO_MACHINE_SHRINK=0` leaves a failure as it was found, which is quicker.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections import Counter, deque
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvarto.cluster.admission import check
from kvarto.cluster.block_space import BlockSpace
from kvarto.cluster.policies import Costs
from kvarto.cluster.scheduler import Scheduler, SchedulerLimits
from kvarto.protos.errors import InvalidRequestError
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.request import AddRequest, EngineInfo
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import StepPlan

_spec = importlib.util.spec_from_file_location("memory_model", Path(__file__).with_name("memory_model.py"))
assert _spec and _spec.loader
memory_model = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(memory_model)

EOS = 3
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

REACHED: Counter[str] = Counter()
"""What the machine has done in this process: a machine that never swaps proves nothing about swapping."""


def make_scheduler(config, stored_keys):
    """The real thing, from the machine's configuration: the only place that knows the constructors. `stored_keys`: what
    the disk tier holds from before."""
    space = BlockSpace(
        [KVGroupSpec(layer_ids=(0,))], [config["num_blocks"]], config["block_size"],
        num_host_blocks=[config["num_host_blocks"]], enable_prefix_caching=config["caching"], hash_key=b"k" * 16,
        eviction_policy=config["eviction"], disk_capacity=config["disk_capacity"], stored_keys=stored_keys)
    scheduler = Scheduler(
        space, SchedulerLimits(config["max_num_seqs"], config["budget"]), epoch=7, eos_token_ids=frozenset({EOS}),
        num_ranks=2, preemption_mode=config["mode"], victim_policy=config["victim"],
        watermark_policy=config["watermark"], costs=config["costs"])
    return space, scheduler


def num_used(space):
    """Blocks on device and host that are neither free nor cached."""
    return sum(pool.num_blocks - pool.num_available() for pool in (*space.devices, *space.hosts))


def give(scheduler, result):
    """A rank's result to the scheduler; returns the deltas."""
    if result.rank:
        scheduler.answered(result)
        return []
    return scheduler.update(result)


def common_length(one, other):
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class Expected:
    """One request: what it must come to, and what has come of it."""

    def __init__(self, prompt, params, priority, salt, produced):
        self.prompt, self.params, self.priority, self.salt = prompt, params, priority, salt
        if params.beam_width:
            self.beams = memory_model.search(prompt, params, params.max_tokens, EOS)[: params.n]
            self.outputs = [list(beam.token_ids) for beam in self.beams]
        else:
            self.beams = None
            self.outputs = [
                memory_model.generate(
                    prompt, params.max_tokens, EOS, index, params.min_tokens, params.ignore_eos)
                for index in range(params.num_sequences)]
        self.produced = [
            output[: min(count, len(output) - 1)] for output, count in zip(self.outputs, produced, strict=False)]
        self.got = [list(tokens) for tokens in self.produced] or [[] for _ in self.outputs]
        self.num_deltas = [0] * len(self.outputs)
        self.scored = False
        self.ended: set[int] = set()
        self.cancelled: set[int] = set()
        self.failed = False
        self.must_hit = 0
        """Tokens that must be found in the prefix cache as long as nothing was evicted."""

    def hand_over(self):
        """It begins again in a new Head, with the tokens that have come."""
        self.produced = [list(tokens) for tokens in self.got] if any(self.got) else []
        self.num_deltas = [0] * len(self.outputs)
        self.must_hit = 0

    @property
    def over(self):
        return self.failed or self.ended | self.cancelled >= set(range(len(self.outputs)))

    def take(self, delta, block_size, caching):
        """Check one delta against all that came before."""
        index, first = delta.seq_index, not self.num_deltas[delta.seq_index]
        assert not self.failed, "a delta after the error"
        assert index not in self.cancelled, "a delta of a cancelled sequence"
        assert index not in self.ended, "a delta after the last"
        assert delta.first == len(self.got[index]), "tokens are lost or repeated"
        assert delta.token_ids, "a delta without news"
        assert len(delta.logprobs) in (0, len(delta.token_ids))
        assert bool(delta.logprobs) or self.params.logprobs is None
        self.num_deltas[index] += 1
        self.got[index].extend(delta.token_ids)
        assert self.got[index] == self.outputs[index][: len(self.got[index])], "not the tokens that it has alone"
        complete = len(self.got[index]) == len(self.outputs[index])
        assert bool(delta.finish_reason) == complete, "ends too early or too late"
        if complete:
            self.ended.add(index)
        self._check_beam(delta)
        self._check_cached(delta, first, block_size, caching)
        if delta.prompt_logprobs:
            assert not self.scored, "prompt_logprobs are sent twice"
            assert [entry.token_id for entry in delta.prompt_logprobs] == self.prompt[1:]
            self.scored = True
        if self.params.prompt_logprobs is not None:
            assert self.scored or len(self.prompt) == 1, "tokens come before the prompt_logprobs"

    def _check_beam(self, delta):
        if self.beams is None:
            assert delta.cumulative_logprob is None and delta.beam_score is None
            last = self.outputs[delta.seq_index][-1]
            ends_by_length = last != EOS or self.params.ignore_eos or len(self.outputs[delta.seq_index]) < \
                self.params.min_tokens
            assert delta.finish_reason in (None, "length" if ends_by_length else "stop")
            return
        beam = self.beams[delta.seq_index]
        assert delta.first == 0 and delta.token_ids == list(beam.token_ids), "a beam comes whole"
        assert delta.cumulative_logprob == pytest.approx(beam.cumulative_logprob)
        assert delta.beam_score == pytest.approx(beam.score)
        assert (delta.finish_reason, delta.stop_reason) == (beam.finish_reason, beam.stop_reason)

    def check_hits(self, delta, others, block_size):
        """Nothing is found that no other request of the same salt can have left there."""
        if not self.produced and not self.num_deltas[delta.seq_index] and delta.num_cached_tokens:
            tokens = [other.prompt + output for other in others if other.salt == self.salt for output in other.outputs]
            most = max((common_length(self.prompt, text) for text in tokens), default=0)
            assert delta.num_cached_tokens <= most // block_size * block_size, "a hit on what nobody has computed"

    def _check_cached(self, delta, first, block_size, caching):
        cached = delta.num_cached_tokens
        assert cached == 0 or first, "num_cached_tokens belongs to the first delta"
        assert cached >= 0
        if not caching or self.params.prompt_logprobs is not None:
            assert cached == 0, "a prefix was found where none may be used"
        if not self.produced:
            assert cached % block_size == 0 and cached < len(self.prompt)
        if first and cached:
            REACHED["cached"] += 1
        if first and delta.seq_index == 0:
            assert cached >= self.must_hit, "a prefix that must be cached was not found"
            REACHED["follow_ups_hit"] += self.must_hit > 0


class PlanInFlight:
    """A plan, and the blocks that it names."""

    def __init__(self, plan, held):
        self.plan = plan
        moves = memory_model.moves_of(plan)
        self.emptied = {old for old, _ in moves.swap_outs}
        self.emptied_host = {block for block, _ in moves.disk_stores}
        self.to_host = {new for _, new in moves.swap_outs} | {new for _, new in moves.disk_loads}
        to_device = {new for _, new in moves.swap_ins} | {new for _, new in moves.copies}
        self.most_held = len(held.tables) + len(plan.forks)
        before = {seq_id: set(table) for seq_id, table in held.tables.items()}
        self.survivors = held.change(plan)
        writes = held.grant(plan)
        self.written = to_device.union(*writes.values()) if writes else to_device
        gained = [set(blocks) - before.get(seq_id, set()) for seq_id, blocks in writes.items()]
        self.gained = to_device.union(*gained) if gained else to_device
        self.named = self.emptied | {old for old, _ in moves.copies} | to_device
        for step in plan.steps:
            self.named |= set(held.tables[step.seq_id])
        self.named_host = self.to_host | self.emptied_host | {old for old, _ in moves.swap_ins}
        self.filled = {
            block for seq_id, blocks in writes.items() for block in self._whole(held, plan, seq_id) if block in blocks}
        held.finish(plan)
        self.most_held = max(self.most_held, len(held.tables))

    @staticmethod
    def _whole(held, plan, seq_id):
        num_tokens = next(step.num_tokens for step in plan.steps if step.seq_id == seq_id)
        return held.tables[seq_id][: (held.computed[seq_id] + num_tokens) // held.block_size]

    def check_against(self, earlier):
        """What an earlier plan in flight names and nobody owns any more is left alone."""
        orphaned = earlier.named - self.survivors
        assert not self.written & orphaned - self.emptied, "writes a block of a plan in flight"
        assert not self.to_host & earlier.named_host - self.emptied_host, "writes a host block of a plan in flight"


class SchedulerMachine(RuleBasedStateMachine):
    """Every request's tokens are those it would have had alone; every step leaves the block space whole."""

    is_whole = False
    """Whether the last rule went through: after a failure there is nothing to tear down."""

    @initialize(
        block_size=st.sampled_from([8, 16]), num_blocks=st.sampled_from([4, 6, 8, 5, 10, 12, 14, 24, 3, 2]),
        num_host_blocks=st.sampled_from([4, 0, 10, 2, 6, 1, 3]), budget=st.integers(4, 40),
        max_num_seqs=st.integers(1, 8), depth=st.integers(1, 2), caching=st.sampled_from([True, False, True]),
        disk_capacity=st.sampled_from([3, 0, 12]), eviction=st.sampled_from(["lru", "retention"]),
        mode=st.sampled_from(["auto", "swap", "recompute"]), victim=st.sampled_from(["latest", "least_computed"]),
        watermark=st.sampled_from(["one_percent", "none"]), block_copy_s=st.sampled_from([1e-6, 3e-3, 1.0]),
        corruption=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 2**16), pressure=st.booleans())
    def start(self, seed, depth, block_copy_s, pressure, **config):
        if pressure:
            # Blocks are what is short: neither seats nor budget, and results are late.
            depth, config["max_num_seqs"], config["budget"] = 2, 8, max(20, config["budget"])
        if not config["caching"] or not config["num_host_blocks"]:
            config["disk_capacity"] = 0
        if not config["num_host_blocks"] and config["mode"] == "swap":
            config["mode"] = "auto"
        self.config = config | {"costs": Costs(block_copy_s=block_copy_s, prefill_token_s=1e-3)}
        self.block_size, self.caching, self.depth = config["block_size"], config["caching"], depth
        num_blocks = config["num_blocks"]
        self.info = EngineInfo(
            epoch=7, max_model_len=MAX_MODEL_LEN, vocab_size=memory_model.VOCAB, max_num_seqs=config["max_num_seqs"],
            block_size=self.block_size, kv_capacity_tokens=num_blocks * self.block_size, num_blocks=num_blocks,
            num_host_blocks=config["num_host_blocks"], kernels="", dtype="", tp_size=1, num_groups=1)
        self.rng = random.Random(seed)
        self.requests: dict[str, Expected] = {}
        self.num_restarts = 0
        self._start_all({})

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
        if follow_up and self.caching and request.params.prompt_logprobs is None and not request.produced:
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
        self._start_all(self.rank.disk)
        for request_id, request in self.requests.items():
            if not request.over:
                request.hand_over()
                self._send(request_id, request)

    @precondition(lambda self: len(self.in_flight) < self.depth)
    @rule()
    def schedule(self):
        self.is_whole = False
        plan = self.scheduler.schedule()
        if plan is None:
            return
        plan = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan)
        assert sum(step.num_tokens for step in plan.steps) <= self.config["budget"]
        assert len(plan.steps) + len(plan.siblings) <= self.config["max_num_seqs"]
        flight = PlanInFlight(plan, self.held)
        assert flight.most_held <= 2 * self.config["max_num_seqs"], "more sequences than the ranks have rows for"
        for earlier in self.in_flight:
            flight.check_against(earlier)
        self._watch_evictions(flight)
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
        if results[1:] and (order == 2 or self.late):
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
            blocks = -(-(len(prompt) + params.max_tokens) // self.block_size)
            fits = params.num_sequences * blocks <= self.info.num_blocks
            assert (
                not fits or params.num_sequences > self.info.max_num_seqs
                or len(prompt) + params.max_tokens > MAX_MODEL_LEN), "a request that fits is refused"
            return None
        assert max_tokens == params.max_tokens
        request_id = str(len(self.requests))
        request = self.requests[request_id] = Expected(prompt, params, priority, salt, produced)
        self._send(request_id, request)
        return request

    def _send(self, request_id, request):
        self.scheduler.add(
            AddRequest(
                request_id=request_id, prompt_token_ids=list(request.prompt), params=request.params,
                priority=request.priority, cache_salt=request.salt,
                output_token_ids=[list(tokens) for tokens in request.produced],
                ended_indices=[] if request.beams is not None else sorted(request.ended | request.cancelled)),
            OWNER, request.params.max_tokens)

    def _start_all(self, disk):
        """A Head and its ranks, with nothing but the files of those before."""
        config = self.config
        self.space, self.scheduler = make_scheduler(config, list(disk))
        self.rank = memory_model.MemoryModelRank(
            self.block_size, config["num_blocks"], config["num_host_blocks"], self.rng,
            disk_capacity=config["disk_capacity"], eos_token_ids=(EOS,), corruption=config["corruption"])
        self.rank.disk = dict(disk)
        self.held = memory_model.HeldSequences(self.block_size)
        self.in_flight: deque[PlanInFlight] = deque()
        self.late: deque = deque()
        self.full: set[int] = set()
        self.may_have_evicted = self.num_restarts > 0
        self.started: set[int] = set()
        self.num_failures = 0
        self.idle = 0

    def _take(self, result):
        for group, delta in give(self.scheduler, result):
            assert delta.request_id == group.request.request_id
            request = self.requests[delta.request_id]
            self.idle = 0
            if delta.error is None:
                if self.may_have_evicted:
                    request.must_hit = 0
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
            self.full & flight.gained or starts & self.started or memory_model.moves_of(flight.plan).swap_outs)
        self.full = (self.full - flight.gained) | flight.filled
        self.started |= starts

    def _check_the_end(self):
        assert num_used(self.space) == 0, "blocks of sequences that are gone"
        for request_id, request in self.requests.items():
            assert request.over, f"request {request_id} never ended"


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    phases=[phase for phase in Phase if phase is not Phase.explain and (SHRINK or phase is not Phase.shrink)],
    max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, suppress_health_check=list(HealthCheck))


def test_the_machine_has_been_everywhere():
    if REACHED["steps"] < 10_000:
        pytest.skip("the machine has not run in this process, or was told to run little")
    for what in ("swap_outs", "swap_ins", "copies", "disk_stores", "disk_loads", "disk_drops", "failed_loads", "late",
                 "forks", "siblings", "hits", "cached", "follow_ups_hit", "errors", "restarts"):
        assert REACHED[what], f"{what}: never in {REACHED['steps']} steps"
