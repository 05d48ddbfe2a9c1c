"""The scheduler where logits are not numbers: what a failed request has computed is found by nobody."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("disk_world", Path(__file__).with_name("disk_world.py"))
assert _spec and _spec.loader
disk_world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(disk_world)
World, prompt_of = disk_world.World, disk_world.prompt_of

SYSTEM = prompt_of(40)
"""Five blocks."""


def ask(tail):
    """A prompt that begins with the system prompt."""
    return [*SYSTEM, 5, 6, tail]


def failing(world, name):
    return [sequence.seq_id for sequence in world.groups[name].live]


def test_the_blocks_of_a_failed_sequence_are_found_by_nobody():
    world = World(caching=True)
    world.add("a", prompt=ask(1))
    world.schedule()
    world.result(failing=failing(world, "a"))
    world.add("b", prompt=ask(2))
    assert world.step() == [("b", 43)]


def test_the_blocks_of_a_failed_sequence_are_free():
    world = World(caching=True)
    world.add("a", prompt=ask(1))
    world.schedule()
    world.result(failing=failing(world, "a"))
    assert world.counts() == {"free": 100}


@pytest.mark.parametrize("n", [1, 3])
def test_the_generated_blocks_of_a_failed_request_are_found_by_nobody(n):
    world = World(caching=True)
    world.add("a", prompt=ask(1), n=n, max_tokens=20)
    for _ in range(9):
        world.step()
    turn = world.groups["a"].request.prompt_token_ids + world.tokens("a")
    world.schedule()
    world.result(failing=failing(world, "a")[:1])
    world.add("b", prompt=turn)
    assert world.step() == [("b", len(turn))]


def test_copies_on_the_host_of_what_a_failed_request_computed_are_found_by_nobody():
    """Its prompt was swapped out half-way and came back before the logits were looked at for the first time."""
    world = World(caching=True, budget=16, max_num_seqs=1, num_host_blocks=20, preemption_mode="swap")
    world.add("a", prompt=ask(1), priority=1)
    world.step()
    world.add("high", prompt=[7, 8, 9], max_tokens=1)
    world.step()
    world.step()
    world.schedule()
    world.result(failing=failing(world, "a"))
    assert world.deltas[-1].error
    world.add("b", prompt=ask(2))
    world.step()
    assert world.plans[-1].starts[0].num_computed_tokens == 0


def test_what_a_running_request_shares_with_a_failed_one_is_not_taken_from_it():
    world = World(caching=True)
    world.add("a", prompt=ask(1), max_tokens=9)
    world.add("b", prompt=ask(2), max_tokens=9)
    world.step()
    world.schedule()
    world.result(failing=failing(world, "a"))
    world.finish()
    assert world.tokens("b") == world.alone("b")


def test_a_failed_request_tells_the_error_once():
    world = World(caching=True)
    world.add("a", prompt=ask(1), n=3)
    world.schedule()
    world.schedule()
    world.result(failing=failing(world, "a")[:1])
    world.finish()
    assert [delta.error.message for delta in world.deltas if delta.error] == ["not a number"]


# -- in all tiers ----------------------------------------------------------------------------------------------------


def loaded(*names):
    """A world whose requests have read all of their blocks from disk, so that every tier holds them, and are about to
    have their first token."""
    world = disk_world.restarted()
    for number, name in enumerate(names):
        world.add(name, prompt=[*disk_world.STORED, 5, number], max_tokens=9)
    world.step()
    world.schedule()
    assert world.moves.swap_ins and where(world) == [[True] * 5] * 3
    return world


def where(world):
    """For each tier, which of the stored blocks are found there."""
    space = world.space
    return [[pool.find(key) is not None for key in disk_world.KEYS] for pool in (space.devices[0], space.hosts[0])] + [
        [key in space.tiers._disk[0] for key in disk_world.KEYS]]


def test_what_a_failed_request_held_is_found_in_no_tier():
    world = loaded("a")
    world.result(failing=failing(world, "a"))
    assert where(world) == [[False] * 5] * 3


def test_what_a_failed_request_held_is_computed_by_the_next():
    world = loaded("a")
    world.result(failing=failing(world, "a"))
    world.add("b", prompt=disk_world.PROMPT)
    assert world.schedule() == [("b", 42)]
    assert (world.moves.disk_drops, world.moves.disk_loads) == (disk_world.KEYS, [])
    world.finish()
    assert world.tokens("b") == world.alone("b")


def test_the_files_of_a_failed_request_go_from_every_rank_though_nobody_else_comes():
    world = loaded("a")
    world.result(failing=failing(world, "a"))
    assert (world.schedule(), world.moves.disk_drops) == ([], disk_world.KEYS)
    world.result()
    assert world.rank.memory.disks[0] == {}
    assert (world.counts(), world.counts(world.space.hosts[0])) == ({"free": 20}, {"free": 8})


def test_what_a_running_request_shares_with_a_failed_one_stays_on_the_device_alone():
    world = loaded("a", "b")
    world.result(failing=failing(world, "a"))
    assert where(world) == [[True] * 5, [False] * 5, [False] * 5]
    world.finish()
    assert world.tokens("b") == world.alone("b")


def test_what_it_computed_before_it_was_preempted_is_found_by_nobody():
    world = World(caching=True)
    world.add("a", prompt=ask(1))
    world.schedule()
    failed = failing(world, "a")
    world.preempt("a")
    world.result(failing=failed)
    world.add("b", prompt=ask(2))
    assert world.schedule() == [("b", 43)]
