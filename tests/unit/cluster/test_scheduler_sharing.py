"""The scheduler where sequences share blocks: parallel sampling, the prefix cache, and what is never shared."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("scheduler_world", Path(__file__).with_name("scheduler_world.py"))
assert _spec and _spec.loader
world_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world_module)
World, prompt_of = world_module.World, world_module.prompt_of

SYSTEM = prompt_of(40)
"""Five blocks."""


def ask(tail):
    """A prompt that begins with the system prompt."""
    return [*SYSTEM, 5, 6, tail]


# -- parallel sampling -----------------------------------------------------------------------------------------------


def test_four_samples_compute_their_prompt_once():
    world = World()
    world.add("a", length=20, n=4)
    world.step()
    assert world.computed == {"a": 20}


@pytest.mark.parametrize("budget", [64, 7])
def test_four_samples_compute_nothing_twice(budget):
    world = World(budget=budget)
    world.add("a", length=20, n=4, max_tokens=5)
    world.finish()
    # The last token of an output is never computed.
    assert world.computed == {"a": 20 + 4 * 4}


def test_four_samples_share_the_blocks_of_their_prompt():
    world = World()
    world.add("a", length=20, n=4)
    world.step()
    assert (world.space.num_used, world.space.devices[0].num_references) == (3, 12)


def test_the_shared_last_block_is_copied_for_all_but_one_in_one_plan():
    world = World()
    world.add("a", length=20, n=4)
    world.step()
    world.step()
    assert len(world.moves.copies) == 3
    assert (world.space.num_used, len(world.plans[-1].steps)) == (2 + 4, 4)


def test_a_prompt_of_full_blocks_is_shared_without_a_copy():
    world = World()
    world.add("a", length=16, n=4)
    world.finish()
    assert not any(plan.moves for plan in world.plans)


@pytest.mark.parametrize("index", range(4))
def test_every_sample_has_the_tokens_of_its_own_place(index):
    world = World()
    world.add("a", length=20, n=4, max_tokens=12)
    world.finish()
    assert world.tokens("a", index) == world.alone("a", index)


def test_samples_begin_with_the_leader_however_its_prompt_is_cut():
    world = World(budget=8)
    world.add("a", length=20, n=4)
    siblings = []
    for _ in range(6):
        world.step()
        siblings.append(len(world.plans[-1].siblings))
    assert sum(siblings) == 3 and siblings.index(3) == max(
        index for index, plan in enumerate(world.plans) if plan.starts or plan.steps[0].num_tokens > 1)


def test_a_sample_that_is_cancelled_leaves_the_others_theirs():
    world = World()
    world.add("a", length=20, n=3, max_tokens=9)
    world.step()
    world.cancel("a", 1)
    world.finish()
    assert [world.tokens("a", index) for index in (0, 2)] == [world.alone("a", index) for index in (0, 2)]


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_a_leader_that_is_cancelled_before_the_fork_is_followed_by_the_next(num_steps):
    world = World(budget=10)
    world.add("a", length=28, n=3)
    for _ in range(num_steps):
        world.step()
    world.cancel("a", 0)
    world.finish()
    assert [world.tokens("a", index) for index in (1, 2)] == [world.alone("a", index) for index in (1, 2)]


def test_a_leader_that_is_cancelled_with_its_prompt_in_flight_is_followed_by_the_next():
    world = World(budget=10)
    world.add("a", length=28, n=3)
    world.schedule()
    world.schedule()
    world.cancel("a", 0)
    world.finish()
    assert [world.tokens("a", index) for index in (1, 2)] == [world.alone("a", index) for index in (1, 2)]


def test_the_next_leader_finds_what_the_cancelled_one_computed():
    world = World(budget=10, caching=True)
    world.add("a", length=28, n=3)
    world.step()
    world.step()
    world.cancel("a", 0)
    world.finish()
    # Of the 20 tokens that were computed two full blocks are found.
    assert world.computed["a"] == 20 + 12 + 2 * 4


def test_a_leader_that_is_cancelled_while_its_group_waits_makes_room_for_nobody_else():
    world = World(max_num_seqs=3)
    world.add("a", n=3)
    world.add("b", n=1)
    world.cancel("a", 0)
    assert world.schedule() == [("a", 3), ("b", 3)]


def test_the_whole_request_can_be_cancelled_at_the_fork():
    world = World()
    world.add("a", length=20, n=4)
    world.schedule()
    world.schedule()
    world.cancel("a")
    world.finish()
    assert (world.space.num_free, world.deltas) == (100, [])


# -- simultaneous arrivals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [500, 64, 24, 9])
def test_simultaneous_arrivals_compute_their_system_prompt_once(budget):
    world = World(caching=True, budget=budget)
    for number in range(6):
        world.add(str(number), prompt=ask(number), max_tokens=1)
    world.finish()
    assert sum(world.computed.values()) == 40 + 6 * 3


@pytest.mark.parametrize("budget", [500, 24, 9])
def test_simultaneous_arrivals_have_the_tokens_of_each_alone(budget):
    world = World(caching=True, budget=budget)
    for number in range(6):
        world.add(str(number), prompt=ask(number), max_tokens=9)
    world.finish()
    assert all(world.tokens(str(number)) == world.alone(str(number)) for number in range(6))


def test_simultaneous_arrivals_share_within_one_plan():
    world = World(caching=True, budget=500)
    for number in range(3):
        world.add(str(number), prompt=ask(number))
    assert world.schedule() == [("0", 43), ("1", 3), ("2", 3)]
    assert world.space.num_used == 5 + 3


def test_what_a_plan_that_is_in_flight_computes_is_found():
    world = World(caching=True)
    world.add("a", prompt=ask(1))
    world.schedule()
    world.add("b", prompt=ask(2))
    assert world.schedule() == [("a", 1), ("b", 3)]


def test_what_a_cancelled_request_was_computing_in_flight_is_found():
    """The plan is executed all the same."""
    world = World(caching=True)
    world.add("a", prompt=ask(1))
    world.schedule()
    world.cancel("a")
    world.add("b", prompt=ask(2))
    assert world.schedule() == [("b", 3)]
    world.finish()
    assert world.tokens("b") == world.alone("b")


# -- hits ------------------------------------------------------------------------------------------------------------


def asked_before(**options):
    world = World(caching=True, **options)
    world.add("a", prompt=ask(1))
    world.finish()
    return world


def test_the_prompt_of_one_that_has_ended_is_found():
    world = asked_before()
    world.add("b", prompt=ask(2))
    assert world.step() == [("b", 3)]


@pytest.mark.parametrize(("length", "cached"), [(7, 0), (8, 0), (9, 8), (39, 32), (40, 32), (41, 40), (43, 40)])
def test_hits_are_whole_blocks_and_leave_a_token(length, cached):
    world = asked_before()
    world.add("b", prompt=ask(1)[:length], max_tokens=3)
    world.finish()
    assert world.cached("b") == [cached, 0, 0]


def test_a_miss_reports_no_cached_tokens():
    assert set(asked_before().cached("a")) == {0}


def test_cached_tokens_are_reported_once_by_every_sample():
    world = asked_before()
    world.add("b", prompt=ask(2), n=2, max_tokens=3)
    world.finish()
    assert sorted(world.cached("b")) == [0, 0, 0, 0, 40, 40]


def test_what_a_request_finds_of_its_own_after_a_preemption_is_not_reported():
    world = World(caching=True)
    world.add("a", prompt=ask(1), max_tokens=5)
    world.schedule()
    world.preempt("a")
    world.finish()
    assert set(world.cached("a")) == {0}
    assert world.computed["a"] < 2 * 43


def test_a_preempted_request_reports_what_it_found_at_first():
    world = asked_before()
    world.add("b", prompt=ask(2), max_tokens=3)
    world.schedule()
    world.preempt("b")
    world.finish()
    assert world.cached("b") == [40, 0, 0]


def test_a_follow_up_finds_the_answer_that_was_generated():
    world = World(caching=True)
    world.add("a", length=20, max_tokens=21)
    world.finish()
    turn = world.groups["a"].request.prompt_token_ids + world.tokens("a")
    world.add("b", prompt=[*turn, 5, 6, 7])
    # The last token was never computed: 40 of 41 are there.
    assert world.step() == [("b", 4)]
    world.finish()
    assert world.tokens("b") == world.alone("b")


def test_a_follow_up_that_comes_with_the_last_token_finds_the_answer():
    world = World(caching=True)
    world.add("a", length=8, max_tokens=9)
    while not world.deltas or not world.deltas[-1].finish_reason:
        world.step()
    world.add("b", prompt=world.groups["a"].request.prompt_token_ids + world.tokens("a"), max_tokens=1)
    assert world.step() == [("b", 1)]


def test_every_sample_of_an_answer_is_found():
    world = World(caching=True)
    world.add("a", length=20, n=3, max_tokens=21)
    world.finish()
    for index in range(3):
        world.add(str(index), prompt=world.groups["a"].request.prompt_token_ids + world.tokens("a", index))
    assert [num_tokens for _, num_tokens in world.step()] == [1, 1, 1]


# -- what is not shared ----------------------------------------------------------------------------------------------


def test_without_prefix_caching_nothing_is_found():
    world = World()
    world.add("a", prompt=ask(1))
    world.add("b", prompt=ask(1))
    assert world.schedule() == [("a", 43), ("b", 21)]


@pytest.mark.parametrize(("one", "other", "num_tokens"), [("", "t", 43), ("t", "u", 43), ("t", "", 43), ("t", "t", 3)])
def test_a_salt_separates(one, other, num_tokens):
    world = World(caching=True)
    world.add("a", prompt=ask(1), salt=one)
    world.finish()
    world.add("b", prompt=ask(2), salt=other)
    assert world.step() == [("b", num_tokens)]


def test_until_the_first_token_prompt_logprobs_use_no_hits():
    world = asked_before()
    world.add("b", prompt=ask(2), prompt_logprobs=0, max_tokens=1)
    assert world.step() == [("b", 43)]
    assert world.cached("b") == [0]
    assert len(world.deltas[-1].prompt_logprobs) == 42


def test_until_the_first_token_prompt_logprobs_use_not_even_what_they_computed():
    world = World(caching=True, budget=24)
    world.add("a", prompt=ask(1), prompt_logprobs=0)
    world.step()
    world.preempt("a")
    world.step()
    assert world.plans[-1].starts[0].num_computed_tokens == 0


def test_after_the_first_token_prompt_logprobs_use_hits():
    world = World(caching=True)
    world.add("a", prompt=ask(1), prompt_logprobs=0)
    world.step()
    world.preempt("a")
    assert world.step() == [("a", 4)]
    world.finish()
    assert world.tokens("a") == world.alone("a")
    assert [len(delta.prompt_logprobs) for delta in world.deltas] == [42, 0, 0, 0, 0]


def test_samples_beside_the_one_with_prompt_logprobs_use_hits_when_they_are_computed_again():
    world = World(caching=True)
    world.add("a", prompt=ask(1), prompt_logprobs=0, n=3)
    world.step()
    world.preempt("a")
    assert world.step() == [("a", 4)] * 3
    world.finish()
    assert [world.tokens("a", index) for index in range(3)] == [world.alone("a", index) for index in range(3)]


def test_what_prompt_logprobs_computed_is_found_by_others():
    world = World(caching=True)
    world.add("a", prompt=ask(1), prompt_logprobs=0)
    world.finish()
    world.add("b", prompt=ask(2))
    assert world.step() == [("b", 3)]
