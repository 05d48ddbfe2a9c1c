"""The scheduler in single cases: who goes next, who is the victim, and how sequences end."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvarto.protos.errors import InvalidRequestError
from kvarto.protos.step import SequenceFailure

_spec = importlib.util.spec_from_file_location("scheduler_world", Path(__file__).with_name("scheduler_world.py"))
assert _spec and _spec.loader
world_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world_module)
World, EOS, memory_model = world_module.World, world_module.EOS, world_module.memory_model


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
    world.step()
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
    assert world.running == ["first"]


@pytest.mark.parametrize("priority", [0, 1])
def test_a_preempted_sequence_continues_with_the_same_tokens(priority):
    world = World(num_blocks=4)
    world.add("first", length=8, max_tokens=20)
    victim = world.add("second", length=8, max_tokens=20, priority=priority)
    world.finish()
    assert sum(world.preemptions) > 0
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
    world.preempt("low")
    assert world.schedule() == [("other", 1)]


def test_a_preempted_sequence_is_admitted_with_the_token_that_came_back():
    world = World(max_num_seqs=1)
    world.add("low", priority=1, length=3)
    world.schedule()
    world.preempt("low")
    world.result()
    assert world.schedule() == [("low", 4)]


def test_the_blocks_of_a_preempted_sequence_are_releasing_until_its_plan_ends():
    world = World()
    world.add("a", length=20)
    world.schedule()
    world.preempt("a")
    assert world.counts() == {"free": 97, "releasing": 3}


# -- recovery --------------------------------------------------------------------------------------------------------


def recovered(world, *lengths, ended=(), max_tokens=6, **options):
    """A request that is handed over again: its sequences had so many of their tokens."""
    prompt, n = world_module.prompt_of(20), len(lengths)
    produced = [memory_model.generate(prompt, length, EOS, index, ignore_eos=True)
                for index, length in enumerate(lengths)]
    return world.add("a", prompt=prompt, n=n, max_tokens=max_tokens, produced=produced, ended=ended, **options)


@pytest.mark.parametrize(("lengths", "ended", "going_on"), [
    ((6, 2), [0], 1), ((2, 6), [1], 0),
    ((3, 2), [0], 1),  # By a stop token, or cancelled.
])
def test_of_a_recovered_request_only_those_go_on_that_had_not_ended(lengths, ended, going_on):
    world = World()
    group = recovered(world, *lengths, ended=ended)
    assert (len(group.live), group.num_seats) == (1, 1)
    world.finish()
    assert world.tokens("a", going_on) == world.alone("a", going_on)[2:]
    assert world.tokens("a", 1 - going_on) == []
    assert [delta.finish_reason for delta in world.deltas] == [None] * 3 + ["length"]


def test_a_recovered_request_that_had_no_token_yet_shares_its_prompt_among_those_that_are_left():
    world = World()
    recovered(world, 0, 0, 0, ended=[0])
    world.finish()
    assert [world.tokens("a", index) for index in range(3)] == [[], world.alone("a", 1), world.alone("a", 2)]
    assert world.computed == {"a": 20 + 2 * 5}


def test_a_recovered_sequence_that_has_all_of_its_tokens_and_is_not_marked_is_refused():
    """It would wait, and hold its seat, for ever."""
    world = World()
    with pytest.raises(InvalidRequestError, match="all of its 4 tokens") as caught:
        recovered(world, 4, 2, max_tokens=4)
    assert caught.value.param == "ended_indices"


def test_a_request_whose_sequences_have_all_ended_is_refused():
    world = World()
    with pytest.raises(InvalidRequestError) as caught:
        recovered(world, 4, 2, ended=[0, 1])
    assert caught.value.param == "ended_indices"
    assert world.scheduler.num_unfinished == 0


def test_a_recovered_request_that_is_refused_takes_nothing():
    world = World()
    with pytest.raises(InvalidRequestError):
        recovered(world, 4, 2, max_tokens=4)
    assert (world.scheduler.num_unfinished, world.schedule()) == (0, None)
    recovered(world, 4, 2, max_tokens=4, ended=[0])
    world.finish()
    assert len(world.tokens("a", 1)) == 2


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
    result, = world.rank.execute(world.in_flight.popleft())
    result.tokens[0].token_id = EOS if "ignore_eos" in params else 11
    delta, = world.take(result)
    assert (delta.finish_reason, delta.stop_reason) == (reason, stop_reason)


def test_the_blocks_of_a_sequence_that_ended_wait_for_the_plan_in_flight():
    world = World()
    world.add("a", length=8, stop_token_ids=list(range(50)))
    world.schedule()
    world.schedule()
    world.result()
    assert world.counts() == {"free": 98, "releasing": 2}


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
    result, = world.rank.execute(world.in_flight.popleft())
    result.failures = [SequenceFailure(seq_id=result.tokens.pop().seq_id, message="not numbers")]
    assert world.take(result)[-1].error.message == "not numbers"


def test_a_failed_sequence_leaves_no_block_behind():
    world = World()
    world.add("a")
    world.schedule()
    result, = world.rank.execute(world.in_flight.popleft())
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
    world.cancel("b")
    assert [world.step(), world.step()] == [[("a", 3)], [("c", 3)]]
