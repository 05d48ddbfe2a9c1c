"""The scheduler in single cases, one after the other; random ones are in `test_scheduler_properties.py`."""

from __future__ import annotations

import importlib.util
from collections import deque
from pathlib import Path

import pytest

from kvarto.cluster.block_space import BlockSpace
from kvarto.cluster.scheduler import Scheduler, SchedulerLimits, policy
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.request import AddRequest
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import SequenceFailure

_spec = importlib.util.spec_from_file_location("memory_model", Path(__file__).with_name("memory_model.py"))
assert _spec and _spec.loader
memory_model = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(memory_model)

EOS = 3


class World:
    """A scheduler of blocks of 8 tokens, and ranks that execute its plans when told to."""

    def __init__(self, num_blocks=100, budget=64, max_num_seqs=8):
        self.space = BlockSpace([KVGroupSpec(layer_ids=(0,))], [num_blocks], 8)
        self.scheduler = Scheduler(
            self.space, SchedulerLimits(max_num_seqs, budget), epoch=1, eos_token_ids=frozenset({EOS}))
        self.rank = memory_model.MemoryModelRank(8, num_blocks)
        self.in_flight, self.deltas, self.names = deque(), [], {}

    def add(self, name, length=3, priority=0, **params):
        prompt = [10 + (i + len(self.names)) % 30 for i in range(length)]
        params = SamplingParams(**{"max_tokens": 5, "ignore_eos": True} | params)
        group = self.scheduler.add(
            AddRequest(request_id=name, prompt_token_ids=prompt, params=params, priority=priority), b"o",
            params.max_tokens)
        self.names |= {sequence.seq_id: name for sequence in group.sequences}
        return group

    def schedule(self):
        """(name, number of tokens) of each step of the next plan; None: there is none."""
        plan = self.scheduler.schedule()
        self.space.check_integrity()
        if plan is None:
            return None
        self.in_flight.append(plan)
        return [(self.names[step.seq_id], step.num_tokens) for step in plan.steps]

    def result(self):
        """The oldest plan ends."""
        return self.take(self.rank.execute(self.in_flight.popleft()))

    def take(self, result):
        news = [delta for _, delta in self.scheduler.update(result)]
        self.space.check_integrity()
        self.deltas.extend(news)
        return news

    def step(self):
        steps = self.schedule()
        self.result()
        return steps

    def finish(self):
        for _ in range(500):
            if len(self.in_flight) < 2:
                self.schedule()
            if not self.in_flight:
                return
            self.result()
        raise AssertionError("it does not end")

    def tokens(self, name):
        return [token for delta in self.deltas if delta.request_id == name for token in delta.token_ids]


def prompt_is_whole(world, group):
    """Whether every prompt position has had its log probabilities once, in order."""
    name, prompt = group.request.request_id, group.request.prompt_token_ids
    positions = [item for delta in world.deltas if delta.request_id == name for item in delta.prompt_logprobs]
    return [item.token_id for item in positions] == prompt[1:]


# -- who goes next ---------------------------------------------------------------------------------------------------


def test_arrivals_are_admitted_in_order():
    world = World(max_num_seqs=2)
    for name in "abc":
        world.add(name)
    assert world.schedule() == [("a", 3), ("b", 3)]


def test_a_lower_priority_number_is_admitted_first():
    world = World(max_num_seqs=1)
    world.add("late", priority=1)
    world.add("first", priority=0)
    assert world.schedule() == [("first", 3)]


def test_decodes_go_before_prompts():
    world = World(budget=8)
    world.add("old")
    world.step()
    world.add("new", length=20)
    assert world.schedule() == [("old", 1), ("new", 7)]


def test_a_long_prompt_is_computed_in_chunks_of_the_budget():
    world = World(budget=8)
    world.add("a", length=20)
    assert [world.step() for _ in range(3)] == [[("a", 8)], [("a", 8)], [("a", 4)]]


def test_a_group_waits_until_all_of_its_sequences_have_seats():
    world = World(max_num_seqs=3)
    world.add("a", n=2)
    world.add("b", n=2)
    assert [name for name, _ in world.schedule()] == ["a", "a"]


def test_nothing_to_do_is_no_plan():
    assert World().schedule() is None


# -- who is the victim -----------------------------------------------------------------------------------------------


def test_a_waiting_group_of_higher_priority_takes_a_running_ones_seat():
    world = World(max_num_seqs=1)
    world.add("low", priority=1, max_tokens=20)
    world.step()
    world.add("high", priority=0)
    assert world.schedule() == [("high", 3)]


def test_a_waiting_group_of_higher_priority_takes_a_running_ones_blocks():
    world = World(num_blocks=4)
    world.add("low", length=25, priority=1, max_tokens=5)
    world.step()
    world.add("high", length=20, priority=0)
    assert world.schedule() == [("high", 20)]


def test_an_earlier_arrival_alone_takes_nobodys_place():
    world = World(max_num_seqs=1)
    world.add("first", max_tokens=20)
    world.step()
    world.add("second")
    assert world.schedule() == [("first", 1)]


def test_a_lower_priority_takes_nobodys_place():
    world = World(max_num_seqs=1)
    world.add("high", priority=0, max_tokens=20)
    world.step()
    world.add("low", priority=1)
    assert world.schedule() == [("high", 1)]


def test_the_last_in_line_is_preempted_when_blocks_run_out():
    world = World(num_blocks=4)
    world.add("first", length=8, max_tokens=20)
    world.add("second", length=8, max_tokens=20)
    for _ in range(10):
        world.step()
    assert [group.request.request_id for group in world.scheduler._running] == ["first"]


@pytest.mark.parametrize("priority", [0, 1])
def test_a_preempted_sequence_continues_with_the_same_tokens(priority):
    world = World(num_blocks=4)
    world.add("first", length=8, max_tokens=20)
    victim = world.add("second", length=8, max_tokens=20, priority=priority)
    world.finish()
    assert world.scheduler.num_preemptions > 0
    assert world.tokens("second") == memory_model.generate(victim.request.prompt_token_ids, 20, eos=-1)


def test_a_preempted_sequence_keeps_the_token_that_is_on_its_way():
    world = World(max_num_seqs=1)
    world.add("low", priority=1)
    world.schedule()
    world.add("high", priority=0)
    world.schedule()
    world.result()
    assert len(world.tokens("low")) == 1


def test_a_preempted_sequence_is_not_admitted_before_its_token_is_back():
    world = World(max_num_seqs=2)
    world.add("low", priority=1)
    world.add("other", priority=0, max_tokens=9)
    world.schedule()
    world.scheduler._preempt(world.scheduler._running[-1])
    assert world.schedule() == [("other", 1)]


def test_a_preempted_sequence_is_admitted_with_the_token_that_came_back():
    world = World(max_num_seqs=1)
    world.add("low", priority=1, length=3)
    world.schedule()
    world.scheduler._preempt(world.scheduler._running[-1])
    world.result()
    assert world.schedule() == [("low", 4)]


def test_the_blocks_of_a_preempted_sequence_are_releasing_until_its_plan_ends():
    world = World()
    world.add("a", length=20)
    world.schedule()
    world.scheduler._preempt(world.scheduler._running[-1])
    assert (world.space.num_used, world.space.num_releasing) == (0, 3)


# -- prompt log probabilities ----------------------------------------------------------------------------------------


def test_prompt_logprobs_come_once_and_whole():
    world = World(budget=8)
    group = world.add("a", length=20, prompt_logprobs=1)
    world.finish()
    assert prompt_is_whole(world, group)


def test_prompt_logprobs_are_not_repeated_after_a_preemption_in_the_prompt():
    world = World(budget=8)
    group = world.add("a", length=20, prompt_logprobs=1)
    world.step()
    world.scheduler._preempt(world.scheduler._running[-1])
    world.finish()
    assert prompt_is_whole(world, group)


def test_prompt_logprobs_are_not_repeated_after_a_preemption_in_the_output():
    world = World()
    group = world.add("a", length=20, prompt_logprobs=1)
    world.step()
    world.step()
    world.scheduler._preempt(world.scheduler._running[-1])
    world.finish()
    assert prompt_is_whole(world, group)


def test_prompt_logprobs_are_whole_when_the_sequence_is_preempted_with_its_first_token_on_its_way():
    world = World(budget=16)
    group = world.add("a", length=20, prompt_logprobs=1)
    world.step()
    world.schedule()
    world.scheduler._preempt(world.scheduler._running[-1])
    world.finish()
    assert prompt_is_whole(world, group)


def test_prompt_logprobs_are_whole_when_the_chunks_after_a_preemption_are_others():
    world = World(budget=8)
    world.add("other", max_tokens=2)
    group = world.add("a", length=20, prompt_logprobs=1)
    world.schedule()
    world.scheduler._preempt(world.scheduler._running[-1])
    world.finish()
    assert prompt_is_whole(world, group)


# -- ends ------------------------------------------------------------------------------------------------------------


def test_no_step_is_wasted_on_a_sequence_whose_last_token_is_on_its_way():
    world = World()
    world.add("a", max_tokens=2)
    world.schedule()
    world.schedule()
    assert world.schedule() is None


def test_a_sequence_ends_with_max_tokens():
    world = World()
    world.add("a", max_tokens=2)
    world.finish()
    assert [delta.finish_reason for delta in world.deltas] == [None, "length"]


@pytest.mark.parametrize(("params", "reason", "stop_reason"), [
    ({"stop_token_ids": [11]}, "stop", 11), ({"ignore_eos": False}, "stop", None), ({"min_tokens": 3}, None, None)])
def test_a_token_ends_a_sequence_only_where_it_may(params, reason, stop_reason):
    world = World()
    world.add("a", **params)
    world.schedule()
    result = world.rank.execute(world.in_flight.popleft())
    result.tokens[0].token_id = EOS if "ignore_eos" in params else 11
    delta, = world.take(result)
    assert (delta.finish_reason, delta.stop_reason) == (reason, stop_reason)


def test_the_blocks_of_a_sequence_that_ended_wait_for_the_plan_in_flight():
    world = World()
    world.add("a", length=8, stop_token_ids=list(range(50)))
    world.schedule()
    world.schedule()
    world.result()
    assert (world.space.num_used, world.space.num_releasing) == (0, 2)


def test_the_token_of_a_sequence_that_ended_meanwhile_is_dropped():
    world = World()
    world.add("a", stop_token_ids=list(range(50)))
    world.schedule()
    world.schedule()
    world.result()
    assert world.result() == []


def test_a_failed_sequence_ends_its_request_with_an_error():
    world = World()
    world.add("a", n=2)
    world.schedule()
    result = world.rank.execute(world.in_flight.popleft())
    result.failures = [SequenceFailure(seq_id=result.tokens.pop().seq_id, message="not numbers")]
    assert world.take(result)[-1].error.message == "not numbers"


def test_a_failed_sequence_leaves_no_block_behind():
    world = World()
    world.add("a")
    world.schedule()
    result = world.rank.execute(world.in_flight.popleft())
    result.failures = [SequenceFailure(seq_id=result.tokens.pop().seq_id, message="not numbers")]
    world.take(result)
    assert world.space.num_free == 100


def test_ranks_are_told_of_the_end_with_the_next_plan():
    world = World()
    world.add("a", max_tokens=1)
    world.step()
    world.add("b")
    world.schedule()
    assert world.in_flight[0].ends == [0]


def test_cancelling_a_waiting_request_leaves_the_others_in_order():
    world = World(max_num_seqs=1)
    for name in "abc":
        world.add(name, max_tokens=1)
    world.scheduler.cancel(b"o", "b")
    assert [world.step(), world.step()] == [[("a", 3)], [("c", 3)]]


@pytest.mark.parametrize(("num_blocks", "num_running", "left"), [(1000, 0, 0), (1000, 5, 10), (99, 5, 0)])
def test_admissions_leave_one_block_in_a_hundred_to_the_running(num_blocks, num_running, left):
    assert policy.watermark_blocks(num_blocks, num_running) == left


# -- size ------------------------------------------------------------------------------------------------------------


class CountingSpace(BlockSpace):
    """Counts the questions of the scheduler: what grows when its work does."""

    num_questions = 0

    def can_hold(self, *args, **kwargs):
        self.num_questions += 1
        return super().can_hold(*args, **kwargs)

    def can_grow(self, *args, **kwargs):
        self.num_questions += 1
        return super().can_grow(*args, **kwargs)


@pytest.fixture(scope="module")
def crowd():
    """4,096 running sequences and 100,000 waiting ones."""
    space = CountingSpace([KVGroupSpec(layer_ids=(0,))], [100_000], 8)
    scheduler = Scheduler(space, SchedulerLimits(4096, 16_384), epoch=1)
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    prompt = [1, 2, 3]
    for number in range(104_096):
        scheduler.add(AddRequest(request_id=str(number), prompt_token_ids=prompt, params=params), b"o", 50)
    rank = memory_model.MemoryModelRank(8, 100_000)
    scheduler.update(rank.execute(scheduler.schedule()))
    return scheduler, rank


def test_a_step_asks_the_block_space_once_for_each_running_sequence(crowd):
    scheduler, rank = crowd
    scheduler.space.num_questions = 0
    scheduler.update(rank.execute(scheduler.schedule()))
    assert scheduler.num_running == 4096
    assert scheduler.space.num_questions < 4096 + 10


def test_a_step_does_not_walk_over_the_waiting(crowd, monkeypatch):
    scheduler, rank = crowd
    seen = []
    group_type = type(scheduler.groups[0])
    live = group_type.live.fget
    monkeypatch.setattr(group_type, "live", property(lambda group: seen.append(group) or live(group)))
    scheduler.update(rank.execute(scheduler.schedule()))
    assert len(seen) < 3 * 4096


def test_cancelling_everyone_asks_nothing_of_the_block_space(crowd):
    scheduler, _ = crowd
    scheduler.space.num_questions = 0
    for group in scheduler.groups[::-1]:
        scheduler.cancel(group.owner, group.request.request_id)
    assert (scheduler.num_unfinished, scheduler.space.num_questions) == (0, 0)
