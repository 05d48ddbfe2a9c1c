"""Cached blocks that the device has no place for: to the host, and from there to disk."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from kvarto.protos.step import BlockMoves

_spec = importlib.util.spec_from_file_location("tiers_space", Path(__file__).with_name("tiers_space.py"))
assert _spec and _spec.loader
tiers_space = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiers_space)
ROOT, Space, prompt = tiers_space.ROOT, tiers_space.Space, tiers_space.prompt
keys_of, key_of, on_disk = tiers_space.keys_of, tiers_space.key_of, tiers_space.on_disk


# -- to the host -----------------------------------------------------------------------------------------------------


def test_an_evicted_block_falls_to_the_host():
    space = Space()
    space.fill(1)
    assert space.fill(2) == BlockMoves(swap_outs=[(1, 1)])
    assert space.where(1) == ["host"]


def test_a_block_that_the_host_has_already_does_not_move_again():
    space = Space()
    space.fill(1)
    space.fill(2)
    blocks = space.open(3, root=ROOT)
    space.attach(blocks, space.match(blocks, [*prompt(1), 0]))
    space.free(blocks, busy_until=space.step_id)
    space.plan()
    assert space.where(1) == ["device", "host"]
    assert space.fill(4).swap_outs == []


def test_where_there_is_no_host_memory_an_evicted_block_is_gone():
    space = Space(num_host=0)
    space.fill(1)
    assert (space.fill(2), space.where(1)) == (BlockMoves(), [])


def test_where_the_host_is_in_use_an_evicted_block_is_gone():
    space = Space(num_host=1)
    space.fill(1)
    space.hosts[0].allocate()
    space.devices[0].allocate()
    assert (space.end_plan(), space.where(1)) == ([], [])


def test_a_host_block_that_is_being_written_is_no_hit_yet():
    space = Space()
    space.fill(1)
    space.grow(space.open(2), 8)
    assert space.match_of(1) == []


def test_a_host_block_is_a_hit_from_the_next_plan_on():
    space = Space()
    space.fill(1)
    space.grow(space.open(2), 8)
    space.end_plan()
    assert space.match_of(1) == [[-1]]


def test_a_host_block_that_is_being_written_is_not_given_to_another():
    space = Space(num_host=1)
    space.fill(1)
    space.grow(space.open(2), 8)
    assert space.hosts[0].num_available() == 0


def test_a_hit_on_the_host_brings_the_block_back():
    space = Space()
    space.fill(1)
    space.fill(2)
    blocks = space.open(3, root=ROOT)
    match = space.match(blocks, [*prompt(1), 0])
    assert space.num_to_take(match) == [1]
    space.attach(blocks, match)
    assert space.plan() == BlockMoves(swap_outs=[(1, 2)], swap_ins=[(1, 1)])
    assert (blocks.tables, space.where(1)) == ([[1]], ["device", "host"])


def test_a_block_that_is_being_brought_back_is_not_overwritten_in_the_same_plan():
    space = Space(num_device=2, num_host=1)
    space.fill(1)
    space.fill(2)
    space.fill(3)
    blocks = space.open(4, root=ROOT)
    space.attach(blocks, space.match(blocks, [*prompt(1), 0]))
    assert not space.hosts[0].num_available()
    assert space.plan() == BlockMoves(swap_ins=[(1, 2)])


def test_what_is_attached_is_not_evicted_by_attaching_it():
    """A prompt whose first block is on the host and whose second is cached on a full device."""
    space = Space(num_device=2, num_host=4)
    space.fill(1, num_blocks=2)
    first, second = keys_of(space, 1, 2)
    space.devices[0].take(space.devices[0].find(first))
    space.devices[0].forget(space.devices[0].find(first))
    host_id = space.hosts[0].allocate()
    space.hosts[0].register(host_id, first)
    space.hosts[0].release(host_id)
    space.devices[0].release(1, -1)
    blocks = space.open(3, root=ROOT)
    space.attach(blocks, space.match(blocks, [*prompt(1, 2), 0]))
    assert len(set(blocks.tables[0])) == 2
    assert space.devices[0].keys[blocks.tables[0][1]] == second


# -- to disk ---------------------------------------------------------------------------------------------------------


def test_a_block_evicted_from_the_host_falls_to_disk():
    space = Space(disk_capacity=9)
    for number in (1, 2, 3):
        space.fill(number)
    assert space.fill(4) == BlockMoves(disk_stores=[(1, key_of(space, 1))], swap_outs=[(1, 1)])
    assert space.where(1) == ["disk"]


def test_without_a_disk_tier_it_is_gone():
    space = Space()
    for number in (1, 2, 3):
        space.fill(number)
    assert (space.fill(4).disk_stores, space.where(1)) == ([], [])


def test_what_is_on_disk_already_is_not_written_again():
    space = Space(num_host=1, disk_capacity=9, stored_keys=[])
    for number in (1, 2, 3, 1, 4):
        space.fill(number)
    assert space.where(1) == ["host", "disk"]
    assert space.fill(5).disk_stores == []


def test_the_oldest_file_goes_when_the_disk_is_full():
    space = on_disk(1, 2, disk_capacity=2)
    moves = space.fill(3)
    assert (moves.disk_drops, space.tiers.num_on_disk) == ([key_of(space, 1)], 2)


def test_a_capacity_that_has_shrunk_drops_the_oldest_at_the_start():
    keys = [bytes([i]) * 16 for i in range(5)]
    space = Space(disk_capacity=2, stored_keys=keys)
    assert (space.plan().disk_drops, space.tiers.num_on_disk) == (keys[:3], 2)


def test_orphaned_files_are_dropped_at_the_start():
    space = Space(disk_capacity=2, stored_keys=[b"a" * 16], orphaned_keys=[b"b" * 16, b"c" * 16])
    assert space.plan() == BlockMoves(disk_drops=[b"b" * 16, b"c" * 16])


def test_orphaned_files_are_dropped_in_every_kv_group():
    space = Space(num_groups=2, disk_capacity=2, orphaned_keys=[b"b" * 16])
    assert [moves.disk_drops for moves in space.plan()] == [[b"b" * 16]] * 2


def test_a_file_that_is_dropped_by_the_plan_that_was_to_write_it_is_not_written():
    """Drops come before stores: a rank would write it and keep it."""
    space = Space(num_device=2, num_host=2, disk_capacity=1)
    for number in (1, 2, 3, 4):
        space.fill(number)
    space.grow(space.open(5), 16)
    assert [key for _, key in space.plan().disk_stores] == [key_of(space, 2)]
    assert (space.where(1), space.where(2)) == ([], ["disk"])


def test_a_key_is_on_disk_once_every_kv_group_has_written_it():
    """Pools of KV groups need not evict the same block in the same plan: a window frees earlier, say."""
    space = Space(num_host=1, disk_capacity=9, num_groups=2)
    space.fill(1)
    space.fill(2)
    key, stores = key_of(space, 1), [[], []]
    for host in space.hosts:
        host.release(host.allocate())
        for group, moves in enumerate(space.plan()):
            stores[group] += [stored for _, stored in moves.disk_stores]
    assert stores == [[key], [key]]
