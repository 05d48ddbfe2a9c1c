"""Cached blocks that the device has no place for: to the host, to disk, and back."""

from __future__ import annotations

import pytest

from kvarto.cluster.block_space import BlockSpace, State
from kvarto.cluster.block_space.tiers import MAX_LOADS
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.step import BlockMoves

ROOT = b"r" * 16


class Space(BlockSpace):
    """Blocks of 8 tokens; `num_device` etc. are per KV group."""

    def __init__(self, num_device=1, num_host=2, disk_capacity=0, *, num_groups=1, **options):
        super().__init__(
            [KVGroupSpec(layer_ids=(index,)) for index in range(num_groups)], [num_device] * num_groups, 8,
            num_host_blocks=[num_host] * num_groups, enable_prefix_caching=True, disk_capacity=disk_capacity,
            **options)
        self.step_id = 0

    def fill(self, number, num_blocks=1):
        """Compute the prompt `number` in a plan, whose moves are returned, and leave it cached."""
        blocks = self.open(number, root=ROOT)
        self.grow(blocks, 8 * num_blocks)
        self.offer(blocks, prompt(number, num_blocks))
        self.free(blocks, busy_until=self.step_id)
        return self.plan()

    def plan(self):
        """End the plan that is being made, and its step."""
        self.check_integrity()
        moves = self.end_plan() or [BlockMoves() for _ in self.devices]
        self.step_done(self.step_id)
        self.step_id += 1
        self.check_integrity()
        return moves if len(moves) > 1 else moves[0]

    def where(self, number):
        """In which pools a prompt's first block is found."""
        key = key_of(self, number)
        return [name for name, pools in (("device", self.devices), ("host", self.hosts))
                if all(pool.find(key) is not None for pool in pools)] + ["disk"] * (key in self.tiers._disk)

    def match_of(self, number, num_blocks=1):
        return self.match(self.open(99, root=ROOT), [*prompt(number, num_blocks), 0])


def prompt(number, num_blocks=1):
    return [number] * 8 * num_blocks


def keys_of(space, number, num_blocks):
    keys = []
    space.prefix_keys.extend(keys, ROOT, prompt(number, num_blocks), 8 * num_blocks)
    return keys


def key_of(space, number):
    return keys_of(space, number, 1)[0]


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
    assert space.num_to_take(match) == 1
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


def on_disk(*numbers, num_device=1, num_host=1, disk_capacity=9):
    """A space whose disk tier holds these prompts, oldest first, and whose host and device hold others."""
    space = Space(num_device, num_host, disk_capacity)
    for number in (*numbers, *range(50, 50 + num_device + num_host)):
        space.fill(number)
    assert [space.where(number) for number in numbers] == [["disk"]] * len(numbers)
    return space


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


# -- back from disk --------------------------------------------------------------------------------------------------


def test_what_is_on_disk_can_be_loaded_in_a_row():
    space = on_disk(1, 2, 4)
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
    assert space.tiers.load([key]) == [key]
    assert (space.hosts[0].num_available(), space.tiers.num_loading) == (0, 1)
    assert space.plan() == BlockMoves(
        disk_stores=[(1, key_of(space, 50))], disk_loads=[(key, 1)])


def test_as_many_are_loaded_as_the_host_has_room_for():
    space = on_disk(1, 2, 3, num_host=2)
    keys = [key_of(space, number) for number in (1, 2, 3)]
    assert space.tiers.load(keys) == keys[:2]


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


def test_a_key_that_is_dropped_while_it_is_loading_is_loaded_all_the_same():
    space = on_disk(1, 2, num_host=2, disk_capacity=2)
    key = key_of(space, 1)
    space.tiers.load([key])
    space.plan()
    for number in (70, 71, 72):
        space.fill(number)
    assert space.where(1) == []
    space.tiers.loaded([key], failed=set())
    space.check_integrity()
    assert space.where(1) == ["host"]


def test_a_load_that_failed_and_was_dropped_meanwhile_is_dropped_once():
    space = on_disk(1, 2, num_host=2, disk_capacity=2)
    key = key_of(space, 1)
    space.tiers.load([key])
    space.plan()
    drops = [drop for number in (70, 71, 72) for drop in space.fill(number).disk_drops]
    space.tiers.loaded([key], failed={key})
    drops += space.plan().disk_drops
    assert drops.count(key) == 1


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
