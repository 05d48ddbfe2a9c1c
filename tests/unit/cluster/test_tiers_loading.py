"""Cached blocks that are on disk: read back into host memory, or forgotten."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from kvarto.cluster.block_space import State
from kvarto.cluster.block_space.tiers import MAX_LOADS
from kvarto.protos.step import BlockMoves

_spec = importlib.util.spec_from_file_location("tiers_space", Path(__file__).with_name("tiers_space.py"))
assert _spec and _spec.loader
tiers_space = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiers_space)
ROOT, Space, prompt = tiers_space.ROOT, tiers_space.Space, tiers_space.prompt
keys_of, key_of, on_disk = tiers_space.keys_of, tiers_space.key_of, tiers_space.on_disk


def on_disk_of_one_group():
    """A space of two KV groups whose prompt 1 has fallen from the host in the first of them only."""
    space = Space(num_host=1, disk_capacity=9, num_groups=2)
    space.fill(1)
    space.fill(2)
    space.hosts[0].release(space.hosts[0].allocate())
    assert [len(moves.disk_stores) for moves in space.plan()] == [1, 0]
    return space


# -- back from disk --------------------------------------------------------------------------------------------------


def test_what_is_on_disk_can_be_loaded_in_a_row():
    space = on_disk(1, 2, 4, num_host=4)
    keys = [key_of(space, number) for number in (1, 2, 9, 4)]
    assert space.tiers.num_loadable(keys) == 2


def test_what_the_plan_is_about_to_write_cannot_be_loaded_by_it():
    space = Space(num_host=1, disk_capacity=9)
    space.fill(1)
    space.fill(2)
    space.grow(space.open(3), 8)
    assert key_of(space, 1) in space.moves.written_keys
    assert space.tiers.num_loadable([key_of(space, 1)]) == 0


def test_a_request_loads_so_many_blocks_at_a_time():
    keys = [i.to_bytes(16, "big") for i in range(MAX_LOADS + 9)]
    space = Space(num_host=99, disk_capacity=99, stored_keys=keys)
    assert space.tiers.num_loadable(keys) == MAX_LOADS


def test_a_load_goes_to_a_host_block_of_its_own():
    space = on_disk(1, 2)
    key = key_of(space, 1)
    space.tiers.load([key])
    assert (space.hosts[0].num_available(), space.tiers.num_loading) == (0, 1)
    assert space.plan() == BlockMoves(
        disk_stores=[(1, key_of(space, 50))], disk_loads=[(key, 1)])


def test_as_many_can_be_loaded_as_the_host_has_room_for():
    space = on_disk(1, 2, 3, num_host=2)
    keys = [key_of(space, number) for number in (1, 2, 3)]
    assert space.tiers.num_loadable(keys) == 2
    space.tiers.load(keys[:2])
    assert [key for key, _ in space.plan().disk_loads] == keys[:2]
    assert space.hosts[0].num_available() == 0


def test_where_the_host_is_in_use_nothing_can_be_loaded():
    space = on_disk(1, num_host=2)
    for _ in range(2):
        space.hosts[0].allocate()
    assert space.tiers.num_loadable([key_of(space, 1)]) == 0


def test_the_tightest_host_pool_says_how_many_can_be_loaded():
    keys = [bytes([i]) * 16 for i in range(4)]
    space = Space(num_host=3, disk_capacity=9, num_groups=2, stored_keys=keys)
    space.hosts[1].allocate()
    assert space.tiers.num_loadable(keys) == 2


def test_what_some_kv_groups_lack_cannot_be_loaded():
    space = on_disk_of_one_group()
    assert space.tiers.num_loadable([key_of(space, 1)]) == 0


def test_every_kv_group_loads_a_key_into_a_block_of_its_own():
    key = b"k" * 16
    space = Space(num_host=2, disk_capacity=9, num_groups=2, stored_keys=[key])
    space.hosts[0].allocate()
    space.tiers.load([key])
    assert [moves.disk_loads for moves in space.end_plan()] == [[(key, 2)], [(key, 1)]]
    space.step_done(0)
    space.tiers.loaded([key], failed=set())
    assert [host.find(key) for host in space.hosts] == [2, 1]


def test_what_is_being_loaded_is_not_loaded_again():
    space = on_disk(1, 2, num_host=2)
    space.tiers.load([key_of(space, 1)])
    assert space.tiers.num_loadable([key_of(space, 1)]) == 0


def test_what_is_being_loaded_is_no_hit_yet():
    space = on_disk(1)
    space.tiers.load([key_of(space, 1)])
    space.plan()
    assert space.match_of(1) == []


def test_what_was_loaded_is_a_hit_on_the_host():
    space = on_disk(1)
    key = key_of(space, 1)
    space.tiers.load([key])
    space.plan()
    space.tiers.loaded([key], failed=set())
    space.check_integrity()
    assert (space.match_of(1), space.where(1)) == ([[-1]], ["host", "disk"])


def test_a_load_that_failed_is_a_miss_and_its_files_go(caplog):
    space = on_disk(1)
    key = key_of(space, 1)
    space.tiers.load([key])
    space.plan()
    space.tiers.loaded([key], failed={key})
    assert space.plan() == BlockMoves(disk_drops=[key])
    assert (space.where(1), space.hosts[0].num_available()) == ([], 1)
    assert key.hex() in caplog.text


def test_one_load_that_failed_leaves_the_others():
    space = on_disk(1, 2, num_host=2)
    keys = [key_of(space, 1), key_of(space, 2)]
    space.tiers.load(keys)
    space.plan()
    space.tiers.loaded(keys, failed={keys[0]})
    space.plan()
    assert (space.where(1), space.where(2)) == ([], ["host", "disk"])


def test_a_block_that_was_computed_while_it_was_loaded_is_kept_once():
    space = on_disk(1, num_device=2, num_host=3)
    key = key_of(space, 1)
    space.tiers.load([key])
    space.plan()
    for number in (1, 60, 61):
        space.fill(number)
    assert space.where(1) == ["host", "disk"]
    space.tiers.loaded([key], failed=set())
    space.check_integrity()
    assert space.hosts[0].counts[State.FREE] == 1


def test_what_is_being_loaded_is_not_dropped_for_what_falls_to_disk():
    space = on_disk(1, 2, num_host=2, disk_capacity=2)
    key = key_of(space, 1)
    space.tiers.load([key])
    space.plan()
    drops = [drop for number in (70, 71, 72) for drop in space.fill(number).disk_drops]
    assert (key in drops, space.where(1), space.where(2)) == (False, ["disk"], [])
    space.tiers.loaded([key], failed=set())
    space.check_integrity()
    assert (space.where(1), space.tiers.num_on_disk) == (["host", "disk"], 2)


def test_where_all_of_the_disk_is_being_read_nothing_falls_there():
    space = on_disk(1, num_host=2, disk_capacity=1)
    space.tiers.load([key_of(space, 1)])
    moves = space.plan()
    assert (moves.disk_drops, moves.disk_stores, space.where(1)) == ([], [], ["disk"])


def test_a_load_that_failed_and_was_forgotten_meanwhile_is_dropped_once():
    space = on_disk(1, 2, num_host=2, disk_capacity=2)
    key = key_of(space, 1)
    space.tiers.load([key])
    space.plan()
    space.tiers.forget(key)
    drops = space.plan().disk_drops
    space.tiers.loaded([key], failed={key})
    drops += space.plan().disk_drops
    assert drops == [key]


def test_what_is_about_to_be_read_is_not_what_its_host_block_pushes_out():
    space = on_disk(1, 2, disk_capacity=2)
    key = key_of(space, 1)
    space.tiers.load([key])
    moves = space.plan()
    assert (moves.disk_loads, moves.disk_drops) == ([(key, 1)], [key_of(space, 2)])


def test_a_plan_does_not_drop_the_only_file_that_it_reads():
    """Drops come first: the load fails, and a sound file is reported as unreadable."""
    space = on_disk(1, disk_capacity=1)
    key = key_of(space, 1)
    space.tiers.load([key])
    moves = space.plan()
    assert not set(moves.disk_drops) & {key for key, _ in moves.disk_loads}


# -- forgotten -------------------------------------------------------------------------------------------------------


def everywhere(**options):
    """A sequence whose only full block is on the device, a copy on the host, and a file."""
    space = on_disk(1, num_device=2, **options)
    key = key_of(space, 1)
    space.tiers.load([key])
    space.plan()
    space.tiers.loaded([key], failed=set())
    blocks = space.open(1, root=ROOT)
    space.attach(blocks, space.match(blocks, [*prompt(1), 0]))
    space.plan()
    assert space.where(1) == ["device", "host", "disk"]
    return space, blocks


def test_what_is_disowned_is_found_in_no_tier():
    space, blocks = everywhere()
    space.disown_keys(blocks)
    space.free(blocks, busy_until=-1)
    assert (space.where(1), space.match_of(1)) == ([], [])
    assert space.plan().disk_drops == [key_of(space, 1)]


def test_places_of_what_is_disowned_are_free():
    space, blocks = everywhere()
    space.disown_keys(blocks)
    space.free(blocks, busy_until=-1)
    space.check_integrity()
    assert [space.devices[0].counts[State.FREE], space.hosts[0].counts[State.FREE]] == [1, 1]


def test_what_another_holds_on_the_device_is_disowned_in_the_other_tiers_only():
    """What it computes on is found as before; no copy outlives it."""
    space, blocks = everywhere()
    other = space.open(2, root=ROOT)
    space.attach(other, space.match(other, [*prompt(1), 0]))
    space.disown_keys(blocks)
    space.free(blocks, busy_until=-1)
    space.check_integrity()
    assert space.where(1) == ["device"]


def test_what_is_disowned_is_not_written_by_the_plan_that_was_to_write_it():
    """It falls from the host by the plan that is being made when the failure is known."""
    space = Space(num_device=1, num_host=1, disk_capacity=9)
    space.fill(1)
    space.fill(2)
    blocks = space.open(1, root=ROOT)
    space.prefix_keys.extend(blocks.keys, ROOT, prompt(1), 8)
    blocks.num_keyed = 1
    space.devices[0].allocate()
    assert space.moves.written_keys == {key_of(space, 1)}
    space.disown_keys(blocks)
    moves, = space.end_plan()
    assert (moves.disk_stores, moves.disk_drops) == ([], [key_of(space, 1)])


def test_a_file_that_is_forgotten_goes_where_there_is_one():
    space = on_disk_of_one_group()
    key = key_of(space, 1)
    space.tiers.forget(key)
    assert [moves.disk_drops for moves in space.plan()] == [[key], []]
    assert space.tiers.num_on_disk == 0


def test_to_forget_what_is_not_on_disk_is_no_move():
    space = on_disk(1)
    space.tiers.forget(key_of(space, 9))
    assert space.end_plan() == []


def test_what_is_forgotten_while_it_is_read_is_found_by_nobody():
    space = on_disk(1, num_host=2)
    key = key_of(space, 1)
    space.tiers.load([key])
    space.plan()
    space.tiers.forget(key)
    space.plan()
    space.tiers.loaded([key], set())
    assert space.where(1) == []
