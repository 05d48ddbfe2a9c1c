"""A scheduler, and two ranks that execute its plans on a model of memory when told to, for tests of single cases."""

from __future__ import annotations

import importlib.util
from collections import Counter, deque
from pathlib import Path

from kvarto.cluster.block_space import BlockSpace
from kvarto.cluster.scheduler import Scheduler, SchedulerLimits
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.request import AddRequest
from kvarto.protos.sampling import SamplingParams

_spec = importlib.util.spec_from_file_location("memory_model", Path(__file__).with_name("memory_model.py"))
assert _spec and _spec.loader
memory_model = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(memory_model)

BLOCK_SIZE = 8
EOS = 3
OWNER = b"o"


def prompt_of(length, start=10):
    """Tokens that count from `start`: prompts with different starts have no prefix in common."""
    return [10 + (start + i) % 30 for i in range(length)]


def moves_of(plan):
    return memory_model.moves_of(plan)


class World:
    """Blocks of 8 tokens, so many of every KV group or a list of numbers. `space` options are `BlockSpace`'s, `options`
    the scheduler's. The block space is checked after everything that is done to it, and the ranks check every slot that
    a sequence reads."""

    def __init__(self, num_blocks=100, budget=64, max_num_seqs=8, *, num_host_blocks=0, caching=False, space=None,
                 kv_groups=None, mixed=None, **options):
        space, kv_groups = space or {}, kv_groups or [KVGroupSpec(layer_ids=(0,))]
        num_blocks, num_host_blocks = (
            count if isinstance(count, list) else [count] * len(kv_groups) for count in (num_blocks, num_host_blocks))
        self.space = BlockSpace(
            kv_groups, num_blocks, BLOCK_SIZE, num_host_blocks=num_host_blocks,
            enable_prefix_caching=caching, hash_key=b"k" * 16, **space)
        self.scheduler = Scheduler(
            self.space, SchedulerLimits(max_num_seqs, budget, mixed), epoch=1, eos_token_ids=frozenset({EOS}),
            num_ranks=2, **options)
        self.rank = memory_model.MemoryModelRank(
            BLOCK_SIZE, num_blocks, num_host_blocks, kv_groups=kv_groups, disk_capacity=space.get("disk_capacity", 0),
            eos_token_ids=(EOS,), sparsity=space.get("sparsity"))
        self.in_flight, self.plans, self.deltas = deque(), [], []
        self.groups, self.names, self.computed = {}, {}, Counter()

    def add(self, name, length=3, priority=0, *, prompt=None, salt="", produced=(), ended=(), **params):
        """`produced`: what each sequence had before a recovery; `ended`: which of them had had their last token."""
        prompt = prompt or prompt_of(length, start=len(self.groups))
        params = SamplingParams(**{"max_tokens": 5, "ignore_eos": True} | params)
        group = self.groups[name] = self.scheduler.add(
            AddRequest(request_id=name, prompt_token_ids=prompt, params=params, priority=priority, cache_salt=salt,
                       output_token_ids=list(produced), ended_indices=list(ended)), OWNER, params.max_tokens)
        return group

    def cancel(self, name, seq_index=None):
        self.scheduler.cancel(OWNER, name, seq_index)
        self.space.check_integrity()

    def preempt(self, name):
        """Not with a swap: the next plan could undo one, which a scheduler that preempts by itself never does."""
        self.scheduler.preemptor.preempt(self.groups[name])

    def schedule(self):
        """(name, number of tokens) of each step of the next plan; None: there is none."""
        plan = self.scheduler.schedule()
        self.space.check_integrity()
        if plan is None:
            return None
        self.names |= {sequence.seq_id: name for name, group in self.groups.items() for sequence in group.live}
        self.in_flight.append(plan)
        self.plans.append(plan)
        steps = [(self.names[step.seq_id], step.num_tokens) for step in plan.steps]
        for name, num_tokens in steps:
            self.computed[name] += num_tokens
        return steps

    def result(self, **how):
        """The oldest plan ends; `how` as `MemoryModelRank.execute` takes it."""
        return self.take(*self.rank.execute(self.in_flight.popleft(), **how))

    def take(self, result, *others):
        for other in others:
            self.scheduler.answered(other)
        news = [delta for _, delta in self.scheduler.update(result)]
        self.space.check_integrity()
        self.deltas.extend(news)
        return news

    def step(self):
        steps = self.schedule()
        assert steps is not None, "there is nothing to do"
        self.result()
        return steps

    def finish(self, depth=2):
        """Until every request has ended, with up to `depth` plans in flight."""
        for _ in range(1000):
            while len(self.in_flight) < depth and self.schedule() is not None:
                pass
            if not self.in_flight:
                assert not self.scheduler.num_unfinished, "a stall: requests wait, and nothing is scheduled"
                return
            self.result()
        raise AssertionError("it does not end")

    def tokens(self, name, index=0):
        return [token for delta in self.deltas if (delta.request_id, delta.seq_index) == (name, index)
                for token in delta.token_ids]

    def alone(self, name, index=0):
        """The tokens that a sequence must come to, whoever else is there."""
        request = self.groups[name].request
        return memory_model.generate(
            request.prompt_token_ids, request.params.max_tokens, EOS, index, ignore_eos=request.params.ignore_eos)

    def cached(self, name):
        """`num_cached_tokens` of every delta, in order."""
        return [delta.num_cached_tokens for delta in self.deltas if delta.request_id == name]

    @property
    def moves(self):
        """Of the last plan."""
        return moves_of(self.plans[-1])

    @property
    def running(self):
        return [name for name, group in self.groups.items() if group.status.value == "running"]

    @property
    def preemptions(self):
        """(by swap, by recompute)"""
        return self.scheduler.preemptor.num_swaps, self.scheduler.preemptor.num_recomputes

    def counts(self, pool=None):
        """Blocks by the lower-case name of their state, those that there are none of left out."""
        pool = pool or self.space.devices[0]
        return {state.name.lower(): pool.counts[state] for state in type(pool.states[0]) if pool.counts[state]}


def crowded(mode="swap", num_host_blocks=8, **options):
    """Two requests of four blocks each in a pool of four."""
    world = World(num_blocks=4, num_host_blocks=num_host_blocks, preemption_mode=mode, **options)
    world.add("first", length=8, max_tokens=20)
    world.add("second", length=8, max_tokens=20)
    return world


def until_preempted(world):
    while not sum(world.preemptions):
        world.step()
    return world


def check_tokens(world):
    assert {name: [world.tokens(name, index) for index in range(group.request.params.n)]
            for name, group in world.groups.items()} == {
        name: [world.alone(name, index) for index in range(group.request.params.n)]
        for name, group in world.groups.items()}


def check_victims(world):
    """No plan computes a sequence that it ends, unless that begins anew: ends come before starts."""
    for plan in world.plans:
        assert {step.seq_id for step in plan.steps} & set(plan.ends) <= {start.seq_id for start in plan.starts}
