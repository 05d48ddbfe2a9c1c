"""The scheduler where cached blocks are on disk: one request waits for them while others pass."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("disk_world", Path(__file__).with_name("disk_world.py"))
assert _spec and _spec.loader
disk_world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(disk_world)
World, prompt_of, moves_of = disk_world.World, disk_world.prompt_of, disk_world.moves_of
STORED, PROMPT, KEYS = disk_world.STORED, disk_world.PROMPT, disk_world.KEYS
restarted, status = disk_world.restarted, disk_world.status


# -- loads -----------------------------------------------------------------------------------------------------------


def test_a_plan_may_do_nothing_but_load():
    world = restarted()
    world.add("a", prompt=PROMPT)
    assert world.schedule() == []
    assert [key for key, _ in world.moves.disk_loads] == KEYS


def test_a_request_waits_for_its_blocks():
    world = restarted()
    world.add("a", prompt=PROMPT)
    world.schedule()
    assert (status(world, "a"), world.schedule()) == ("loading", None)


def test_what_was_loaded_is_not_computed():
    world = restarted()
    world.add("a", prompt=PROMPT)
    world.step()
    assert (world.step(), len(world.moves.swap_ins)) == ([("a", 2)], 5)
    world.finish()
    assert (world.tokens("a"), world.cached("a")[0]) == (world.alone("a"), 40)


def test_other_requests_pass_one_that_waits_for_the_disk():
    world = restarted()
    world.add("a", prompt=PROMPT)
    world.add("b")
    assert [world.schedule(), world.schedule()] == [[("b", 3)], [("b", 1)]]


def test_no_seat_is_kept_for_a_request_that_waits_for_the_disk():
    world = restarted(max_num_seqs=1)
    world.add("a", prompt=PROMPT)
    world.add("b")
    assert world.schedule() == [("b", 3)]


def test_a_request_goes_on_in_its_old_place():
    world = restarted(max_num_seqs=1)
    world.add("a", prompt=PROMPT)
    world.add("b", max_tokens=1)
    world.add("c")
    world.step()
    assert world.step() == [("a", 2)]


def test_only_what_follows_the_hits_is_loaded():
    world = restarted()
    world.add("first", prompt=PROMPT[:25])
    world.finish()
    world.add("a", prompt=PROMPT)
    world.schedule()
    assert [key for key, _ in world.moves.disk_loads] == KEYS[3:]


def test_prompt_logprobs_load_nothing():
    world = restarted()
    world.add("a", prompt=PROMPT, prompt_logprobs=0)
    assert world.schedule() == [("a", 42)]


def test_after_the_first_token_prompt_logprobs_are_no_reason_not_to_load():
    world = restarted()
    group = world.add("a", prompt=PROMPT, prompt_logprobs=0, produced=[[7]])
    assert (world.schedule(), len(world.moves.disk_loads)) == ([], 5)
    world.result()
    assert world.step() == [("a", 3)]
    world.finish()
    assert not any(delta.prompt_logprobs for delta in world.deltas)
    assert len(world.tokens("a")) == group.max_tokens - 1


def test_another_salt_loads_nothing():
    world = restarted()
    world.add("a", prompt=PROMPT, salt="t")
    assert world.schedule() == [("a", 42)]


def test_a_host_too_small_for_all_loads_what_it_has_room_for():
    world = restarted(num_host_blocks=2)
    world.add("a", prompt=PROMPT)
    world.finish()
    assert world.computed["a"] <= 42 + 4 - 16


def test_a_host_too_small_for_all_is_no_stall():
    world = restarted(num_host_blocks=2)
    world.add("a", prompt=PROMPT)
    world.finish()
    assert world.tokens("a") == world.alone("a")


def test_four_samples_load_once():
    world = restarted()
    world.add("a", prompt=PROMPT, n=4)
    world.finish()
    assert world.rank.seen["disk_loads"] == 5
    assert [world.tokens("a", index) for index in range(4)] == [world.alone("a", index) for index in range(4)]


def test_a_cancelled_request_gives_its_blocks_up_when_they_are_loaded():
    world = restarted()
    world.add("a", prompt=PROMPT)
    world.schedule()
    world.cancel("a")
    assert world.counts(world.space.hosts[0]) == {"used": 5, "free": 3}
    world.result()
    assert world.counts(world.space.hosts[0]) == {"cached": 5, "free": 3}


def test_what_was_loaded_for_a_cancelled_request_is_a_hit():
    world = restarted()
    world.add("a", prompt=PROMPT)
    world.schedule()
    world.cancel("a")
    world.result()
    world.add("b", prompt=PROMPT)
    assert world.step() == [("b", 2)]


# -- answers ---------------------------------------------------------------------------------------------------------


def test_a_request_waits_for_the_answer_of_every_rank():
    world = restarted()
    world.add("a", prompt=PROMPT)
    world.schedule()
    first, second = world.rank.execute(world.in_flight.popleft())
    world.take(first)
    assert (status(world, "a"), world.schedule()) == ("loading", None)
    world.scheduler.answered(second)
    assert world.schedule() == [("a", 2)]


def test_the_answers_may_come_in_any_order():
    world = restarted()
    world.add("a", prompt=PROMPT)
    world.schedule()
    first, second = world.rank.execute(world.in_flight.popleft())
    world.take(first, second)
    assert world.schedule() == [("a", 2)]


def test_one_rank_that_answers_twice_is_not_two():
    world = restarted()
    world.add("a", prompt=PROMPT)
    world.schedule()
    first, _ = world.rank.execute(world.in_flight.popleft())
    world.take(first, first)
    assert status(world, "a") == "loading"


@pytest.mark.parametrize(("broken", "num_tokens"), [(0, 42), (2, 26), (4, 10)])
def test_what_failed_on_one_rank_is_computed(broken, num_tokens):
    world = restarted()
    world.add("a", prompt=PROMPT)
    world.schedule()
    world.result(corrupt=[KEYS[broken]])
    assert world.step() == [("a", num_tokens)]
    world.finish()
    assert world.tokens("a") == world.alone("a")


def test_a_file_that_failed_on_one_rank_goes_on_every_rank():
    world = restarted()
    world.add("a", prompt=PROMPT)
    world.schedule()
    world.result(corrupt=[KEYS[2]])
    world.schedule()
    assert (world.moves.disk_drops, world.space.tiers.num_on_disk) == ([KEYS[2]], 4)


def test_a_request_does_not_try_a_load_again():
    world = restarted()
    world.add("a", prompt=PROMPT)
    world.schedule()
    world.result(corrupt=[KEYS[0]])
    world.finish()
    assert sum(bool(moves_of(plan).disk_loads) for plan in world.plans) == 1


def test_orphaned_files_are_dropped_by_a_plan_of_their_own():
    world = World(caching=True, num_host_blocks=2, space={"disk_capacity": 4, "orphaned_keys": KEYS[:2]})
    assert (world.schedule(), world.moves.disk_drops) == ([], KEYS[:2])


# -- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_host_blocks", [1, 2, 5])
@pytest.mark.parametrize("disk_capacity", [1, 3, 30])
def test_blocks_go_through_all_tiers_and_come_back(depth, num_host_blocks, disk_capacity):
    world = World(8, num_host_blocks=num_host_blocks, caching=True, space={"disk_capacity": disk_capacity})
    for turn in range(3):
        for number in range(4):
            world.add(f"{turn}/{number}", prompt=prompt_of(25 + turn, start=7 * number), max_tokens=9)
            world.finish(depth)
    assert all(world.tokens(name) == world.alone(name) for name in world.groups)
    assert world.rank.seen["disk_stores"] > 0


# -- who passed may be needed ----------------------------------------------------------------------------------------


def test_a_group_that_was_passed_waits_for_one_of_equal_priority():
    """What `last` gives up is not enough for it."""
    world = restarted(num_stored=1, num_blocks=5, preemption_mode="recompute")
    world.add("late", prompt=PROMPT[:30], priority=1)
    world.add("passed", length=8, priority=1, max_tokens=9)
    world.add("last", length=3, priority=2)
    world.step()
    assert world.step() == [("passed", 1)]


def test_a_group_that_was_passed_takes_no_blocks_of_one_that_the_plan_names():
    """`late` comes back from the disk behind `passed`, which is behind it in line. `last`, less urgent, lets it start
    in the middle of the walk, where its second sequence finds no room: by then `passed` is in the plan."""
    world = restarted(num_stored=1, num_blocks=6, preemption_mode="recompute")
    world.add("late", prompt=STORED[:8], priority=1, max_tokens=20, n=2, produced=[[5] * 15, [6] * 15])
    world.add("passed", length=8, priority=1, max_tokens=20)
    world.add("last", length=3, priority=2, max_tokens=9)
    world.step()
    world.step()
