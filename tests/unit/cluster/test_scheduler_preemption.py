"""The scheduler where blocks run out: swap and recompute, priorities, and that nobody stalls or fails of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("scheduler_world", Path(__file__).with_name("scheduler_world.py"))
assert _spec and _spec.loader
world_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world_module)
World, moves_of, prompt_of = world_module.World, world_module.moves_of, world_module.prompt_of
crowded, until_preempted = world_module.crowded, world_module.until_preempted
check_tokens, check_victims = world_module.check_tokens, world_module.check_victims

MODES = pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
HOSTS = pytest.mark.parametrize("num_host_blocks", [0, 1, 2, 3, 8])
DEPTHS = pytest.mark.parametrize("depth", [1, 2])


# -- swap ------------------------------------------------------------------------------------------------------------


def test_a_victim_moves_to_the_host_and_back():
    world = crowded()
    world.finish()
    outs = [len(moves_of(plan).swap_outs) for plan in world.plans]
    ins = [len(moves_of(plan).swap_ins) for plan in world.plans]
    assert (sum(outs), sum(ins), world.preemptions) == (2, 2, (1, 0))


@DEPTHS
def test_a_swapped_request_continues_with_the_same_tokens(depth):
    world = crowded()
    world.finish(depth)
    check_tokens(world)


@DEPTHS
def test_a_swap_computes_nothing_again(depth):
    world = crowded()
    world.finish(depth)
    assert world.preemptions == (1, 0)
    assert world.computed == {"first": 8 + 19, "second": 8 + 19}


def test_a_recompute_computes_again():
    world = crowded("recompute")
    world.finish()
    assert (world.preemptions[0], world.computed["second"] > 27, world.computed["first"]) == (0, True, 27)


@MODES
@HOSTS
@DEPTHS
@pytest.mark.parametrize("caching", [True, False])
def test_whatever_the_mode_the_tokens_are_the_same(mode, num_host_blocks, depth, caching):
    world = World(num_blocks=6, num_host_blocks=num_host_blocks, preemption_mode=mode, caching=caching)
    for name in "abcd":
        world.add(name, length=11, max_tokens=20, n=1 + (name == "b"))
    world.finish(depth)
    assert sum(world.preemptions) > 0
    check_tokens(world)
    check_victims(world)


def test_a_prompt_that_is_swapped_half_way_goes_on_there():
    world = World(num_blocks=4, budget=8, num_host_blocks=8, preemption_mode="swap")
    world.add("low", length=30, max_tokens=2, priority=1)
    world.step()
    world.step()
    world.add("high", length=20, max_tokens=2)
    world.finish()
    assert (world.preemptions, world.computed) == ((1, 0), {"low": 31, "high": 21})
    check_tokens(world)


def test_prompt_logprobs_of_a_prompt_that_is_swapped_half_way_are_whole():
    world = World(num_blocks=4, budget=8, num_host_blocks=8, preemption_mode="swap")
    low = world.add("low", length=30, max_tokens=2, priority=1, prompt_logprobs=0)
    world.step()
    world.schedule()
    world.add("high", length=20, max_tokens=2)
    world.finish()
    positions = [item.token_id for delta in world.deltas for item in delta.prompt_logprobs]
    assert (world.preemptions[0], positions) == (1, low.request.prompt_token_ids[1:])


def test_a_swapped_request_keeps_the_token_that_is_on_its_way():
    world = World(max_num_seqs=1, num_host_blocks=8, preemption_mode="swap")
    world.add("low", priority=1)
    world.schedule()
    world.add("high")
    world.schedule()
    world.result()
    assert (world.groups["low"].status.value, len(world.tokens("low"))) == ("swapped", 1)


def test_a_request_whose_last_token_is_on_its_way_can_end_on_the_host():
    world = World(max_num_seqs=1, num_host_blocks=8, preemption_mode="swap")
    world.add("low", priority=1, max_tokens=1)
    world.schedule()
    world.add("high")
    world.schedule()
    world.result()
    assert world.deltas[-1].finish_reason == "length"
    world.finish()
    assert world.counts(world.space.hosts[0]) == {"free": 8}


def test_what_a_plan_in_flight_reads_waits_for_it_though_the_host_has_a_copy():
    """Nothing moves for such a block: it is not emptied by the plan, and given back like any other."""
    world = World(max_num_seqs=1, num_blocks=20, num_host_blocks=20, preemption_mode="swap", caching=True)
    low = world.add("low", length=16, priority=1, max_tokens=9)
    world.step()
    world.add("high", max_tokens=1)
    world.step()
    world.step()
    assert world.running == ["low"]
    world.schedule()
    world.add("higher", max_tokens=1)
    world.schedule()
    device = world.space.devices[0]
    assert {device.states[device.find(key)].name for key in low.live[0].blocks.keys} == {"RELEASING"}


def test_blocks_that_were_taken_bring_no_victim_back_in_the_same_plan():
    """`small` alone does not make room enough, and what `large` leaves over would do for it again."""
    world = World(num_blocks=5, num_host_blocks=9, preemption_mode="swap", victim_policy="least_computed")
    world.add("small", length=3, priority=1)
    world.add("large", length=26, priority=1)
    world.step()
    world.add("high", length=20)
    assert world.schedule() == [("high", 20)]


def test_a_swapped_request_can_be_cancelled():
    world = until_preempted(crowded())
    world.cancel("second")
    world.finish()
    assert world.counts(world.space.hosts[0]) == {"free": 8}


def test_a_plan_may_do_nothing_but_move_blocks():
    """`high` has the victim's blocks at once, and waits for those of `gone`, which the plan in flight names."""
    world = World(num_blocks=4, num_host_blocks=8, preemption_mode="swap")
    world.add("low", length=10, priority=1)
    world.add("gone", length=10, priority=1)
    world.schedule()
    world.cancel("gone")
    world.add("high", length=30, max_tokens=2)
    assert (world.schedule(), len(world.moves.swap_outs)) == ([], 2)
    world.finish()
    assert [world.tokens(name) for name in ("low", "high")] == [world.alone(name) for name in ("low", "high")]


# -- never an error, never a stall -----------------------------------------------------------------------------------


@MODES
@HOSTS
@DEPTHS
def test_vllm_546_an_exhausted_host_is_no_error(mode, num_host_blocks, depth):
    """vLLM aborted with "Aborted due to the lack of CPU swap space": we compute again instead."""
    world = World(num_blocks=8, num_host_blocks=num_host_blocks, preemption_mode=mode)
    for number in range(6):
        world.add(str(number), length=8, max_tokens=40)
    world.finish(depth)
    check_tokens(world)


def test_vllm_546_what_the_host_has_no_room_for_is_computed_again():
    world = crowded(num_host_blocks=1)
    world.finish()
    assert world.preemptions[0] == 0 < world.preemptions[1]
    check_tokens(world)


@DEPTHS
@pytest.mark.parametrize("num_host_blocks", [8, 12, 40])
def test_vllm_5578_swapped_requests_do_not_wait_for_ever(depth, num_host_blocks):
    """vLLM stalled with groups of several sequences in the swapped queue: `World.finish` fails on a stall."""
    world = World(num_blocks=16, num_host_blocks=num_host_blocks, preemption_mode="swap")
    for number in range(5):
        world.add(str(number), length=12, n=2, max_tokens=40)
    world.finish(depth)
    assert world.preemptions[0] > 0
    check_tokens(world)


@DEPTHS
def test_a_swapped_group_whose_blocks_on_the_device_pin_the_pool_is_computed_again(depth):
    """What `low` shares with `high` stays on the device, and still does when `high` has ended: the next one needs
    the whole pool."""
    world = World(num_blocks=6, num_host_blocks=9, preemption_mode="swap", caching=True)
    shared = prompt_of(16)
    world.add("high", prompt=[*shared, 5], max_tokens=9)
    world.add("low", prompt=[*shared, 6], priority=2, max_tokens=20)
    world.step()
    world.add("whole", prompt=prompt_of(40, start=17), priority=1, max_tokens=8)
    world.finish(depth)
    check_tokens(world)
    check_victims(world)
    assert world.preemptions[0] >= 1


@pytest.mark.parametrize("num_blocks", [5, 7, 8])
def test_a_swapped_group_that_holds_nothing_on_the_device_is_not_computed_again(num_blocks):
    """To drop it helps nobody: the group that needs blocks has to give its own up all the same."""
    world = World(num_blocks=num_blocks, num_host_blocks=50, preemption_mode="swap")
    for name in "abcd":
        world.add(name, length=8, max_tokens=20)
    world.finish()
    assert world.preemptions[1] == 0


def pinned():
    """A group that was swapped but for two blocks, which only it holds by now; nobody runs."""
    world = World(num_blocks=4, num_host_blocks=9, preemption_mode="swap", caching=True)
    shared = prompt_of(16)
    world.add("low", prompt=[*shared, 6], priority=2, max_tokens=12)
    world.add("high", prompt=[*shared, 5], priority=0, max_tokens=3)
    while world.groups["low"].status.value != "swapped":
        world.step()
        if world.groups["high"].status.value == "running" and len(world.groups) == 2:
            world.add("other", prompt=prompt_of(6, start=17), priority=1, max_tokens=1)
            world.add("another", prompt=prompt_of(6, start=27), priority=1, max_tokens=1)
    return world


def test_a_pinning_group_is_found_swapped_with_blocks_on_the_device():
    table = pinned().groups["low"].live[0].blocks.tables[0]
    assert min(table) < 0 < max(table)


def test_a_pinned_pool_is_given_to_whoever_is_first_in_line():
    world = pinned()
    world.add("whole", prompt=prompt_of(30, start=11), priority=1, max_tokens=2)
    world.finish()
    assert world.preemptions[1] > 0
    check_tokens(world)


@DEPTHS
def test_the_first_in_line_always_makes_progress(depth):
    world = World(num_blocks=5, num_host_blocks=4, preemption_mode="swap", budget=8)
    for number in range(8):
        world.add(str(number), length=20, max_tokens=20)
    world.finish(depth)
    ends = [delta.request_id for delta in world.deltas if delta.finish_reason]
    assert ends == sorted(ends)


# -- several sequences -----------------------------------------------------------------------------------------------


@MODES
@DEPTHS
def test_all_samples_of_a_request_go_and_come_back_together(mode, depth):
    world = World(num_blocks=12, num_host_blocks=12, preemption_mode=mode)
    world.add("first", length=12, n=2, max_tokens=30)
    world.add("second", length=12, n=3, max_tokens=20)
    world.finish(depth)
    assert sum(world.preemptions) > 0
    check_tokens(world)
    held = [sum(seq.has_begun for seq in group.live) for group in world.groups.values()]
    assert held == [0, 0]


def test_samples_that_are_computed_again_share_what_they_can():
    """Their prompt is computed once, although nothing else may be found by its contents."""
    world = World()
    world.add("a", length=16, n=3, max_tokens=5)
    for _ in range(3):
        world.step()
    world.preempt("a")
    before = world.computed["a"]
    world.finish()
    # The prompt once; two of three tokens each that were there already; the two that were missing but for the last.
    assert world.computed["a"] - before == 16 + 3 * 2 + 3 * 2


def test_swapped_samples_move_what_they_share_once():
    world = World(num_blocks=12, num_host_blocks=12, preemption_mode="swap", max_num_seqs=3)
    world.add("low", length=16, n=3, priority=1)
    for _ in range(2):
        world.step()
    world.add("high", priority=0)
    world.schedule()
    assert len(world.moves.swap_outs) == 2 + 3
    world.result()
    world.finish()
    check_tokens(world)
