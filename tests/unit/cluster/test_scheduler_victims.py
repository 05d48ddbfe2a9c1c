"""Whose blocks the scheduler takes, for whom, and what it records of that."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvarto.cluster.policies import Costs

_spec = importlib.util.spec_from_file_location("scheduler_world", Path(__file__).with_name("scheduler_world.py"))
assert _spec and _spec.loader
world_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world_module)
World = world_module.World
crowded, until_preempted = world_module.crowded, world_module.until_preempted
check_tokens, check_victims = world_module.check_tokens, world_module.check_victims

MODES = pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
DEPTHS = pytest.mark.parametrize("depth", [1, 2])


# -- priorities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_an_urgent_newcomer_preempts(mode):
    world = World(num_blocks=4, num_host_blocks=8, preemption_mode=mode)
    world.add("low", length=25, priority=1, max_tokens=5)
    world.step()
    world.add("high", length=20, priority=0)
    assert (world.step(), world.running) == ([("high", 20)], ["high"])
    world.finish()
    check_tokens(world)


def test_a_group_that_a_plan_swaps_out_for_others_does_not_come_back_in_it():
    """The last newcomer leaves a token of the budget, which would do for a group that is more urgent than the one that
    was swapped out first."""
    world = World(num_host_blocks=50, budget=10, max_num_seqs=20, preemption_mode="swap")
    world.add("low", length=3, priority=2, n=3)
    world.add("middle", length=3, priority=1, n=3)
    world.step()
    for name, length in (("a", 20), ("b", 2), ("c", 2), ("d", 2)):
        world.add(name, length=length, priority=0)
    world.step()
    assert (world.preemptions, world.running) == ((2, 0), ["a", "b", "c", "d"])
    world.finish()
    check_tokens(world)


def test_an_urgent_newcomer_takes_only_what_it_needs():
    world = World(num_blocks=8, num_host_blocks=8, preemption_mode="swap")
    for name in "abc":
        world.add(name, length=14, priority=1)
    world.step()
    world.add("high", length=20, priority=0)
    world.step()
    assert world.running == ["a", "b", "high"]


def test_an_urgent_newcomer_takes_nothing_where_there_is_room():
    world = World(num_host_blocks=8)
    world.add("low", priority=1)
    world.step()
    world.add("high", priority=0)
    assert world.schedule() == [("high", 3), ("low", 1)]


@pytest.mark.parametrize("victim", ["latest", "least_computed"])
@pytest.mark.parametrize("mode", ["swap", "recompute"])
@DEPTHS
def test_victims_are_never_in_the_same_plan(victim, mode, depth):
    world = World(num_blocks=10, num_host_blocks=9, budget=16, victim_policy=victim, preemption_mode=mode, caching=True)
    for number in range(12):
        world.add(str(number), length=5 + number, priority=(number * 7) % 3, n=1 + number % 2, max_tokens=12)
        world.schedule()
        if len(world.in_flight) >= depth:
            world.result()
    world.finish(depth)
    check_victims(world)
    check_tokens(world)


@pytest.mark.parametrize("victim", ["latest", "least_computed"])
def test_the_victim_is_the_policys(victim):
    world = World(num_blocks=7, num_host_blocks=8, victim_policy=victim, preemption_mode="swap")
    world.add("long", length=8, priority=1, max_tokens=30)
    world.add("longer", length=20, priority=1)
    world.step()
    world.add("high", length=30, priority=0, max_tokens=2)
    world.step()
    assert ("long" in world.running, "longer" in world.running) == (
        (True, False) if victim == "latest" else (False, True))


def test_an_urgent_newcomer_preempts_where_decodes_take_the_whole_budget():
    world = World(max_num_seqs=2, budget=2, num_host_blocks=8)
    world.add("a", priority=1, max_tokens=20, length=1)
    world.add("b", priority=1, max_tokens=20, length=1)
    world.step()
    world.add("high", priority=0, length=1)
    world.step()
    assert "high" in world.running


# -- the log ---------------------------------------------------------------------------------------------------------

COSTS = Costs(block_copy_s=0.25, prefill_token_s=0.125)


def record_of(mode, num_host_blocks=8, costs=COSTS):
    world = until_preempted(crowded(mode, num_host_blocks, costs=costs))
    record, = world.scheduler.preemptor.records
    return record


@MODES
def test_a_preemption_is_recorded_with_both_estimates(mode):
    choice = record_of(mode).choice
    # Two blocks there and back, or sixteen tokens.
    assert (choice.swap_s, choice.recompute_s) == (2 * 2 * 0.25, 16 * 0.125)


def test_a_preemption_is_recorded_with_what_it_took():
    record = record_of("swap")
    assert (record.request_id, record.num_blocks, record.num_tokens, record.swapped) == ("second", 2, 16, True)


def test_a_swap_that_the_host_has_no_room_for_is_recorded_as_such():
    record = record_of("swap", num_host_blocks=1)
    assert (record.choice.swap, record.swapped) == (True, False)


def test_what_samples_share_is_estimated_once():
    world = World(num_blocks=12, num_host_blocks=12, preemption_mode="swap", max_num_seqs=3, costs=COSTS)
    world.add("low", length=16, n=3, priority=1)
    world.step()
    world.step()
    world.add("high")
    world.step()
    record, = world.scheduler.preemptor.records
    # Two blocks of the prompt and one of each sample, in which there is a token: no more than those blocks hold.
    assert (record.num_blocks, record.num_tokens) == (5, 5 * 8)


@pytest.mark.parametrize(("copy", "swapped"), [(0.49, True), (0.51, False)])
def test_auto_decides_by_the_costs_on_both_sides_of_the_crossover(copy, swapped):
    """Sixteen tokens take 2 s to compute; four block copies take as long at half a second each."""
    assert record_of("auto", costs=Costs(block_copy_s=copy, prefill_token_s=0.125)).swapped is swapped
