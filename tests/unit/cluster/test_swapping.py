"""Sequence groups between device and host: what moves, what stays, and what is there already."""

from __future__ import annotations

import pytest

from kvarto.cluster.block_space import BlockSpace, State
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.step import BlockMoves

ROOT = b"r" * 16
TOKENS = list(range(100, 148))
FREE, CACHED, RELEASING, EMPTIED, USED = State


class Space(BlockSpace):
    """Blocks of 8 tokens, as many of them on the host as on the device unless told otherwise."""

    def __init__(self, *num_device, host=None):
        groups = [KVGroupSpec(layer_ids=(index,)) for index in range(len(num_device))]
        super().__init__(groups, list(num_device), 8, enable_prefix_caching=True,
                         num_host_blocks=[n if host is None else host for n in num_device])
        self.step_id = 0

    def hold(self, seq_id, num_tokens, root=None):
        blocks = self.open(seq_id, root=root)
        self.attach(blocks, self.match(blocks, TOKENS[:num_tokens]))
        self.grow(blocks, num_tokens)
        self.offer(blocks, TOKENS)
        return blocks

    def forks(self, parent, *seq_ids):
        """The parent and its new children."""
        children = [self.open(seq_id) for seq_id in seq_ids]
        for child in children:
            self.fork(parent, child)
        return [parent, *children]

    def plan(self):
        """The moves of the plan, whose result is in at once."""
        moves = self.end_plan() or [BlockMoves() for _ in self.devices]
        self.check_integrity()
        self.step_done(self.step_id)
        self.step_id += 1
        self.check_integrity()
        return moves if len(moves) > 1 else moves[0]

    def out(self, *members):
        self.swap_out(list(members), busy_until=self.step_id - 1)
        return self.plan()

    def back(self, *members):
        self.swap_in(list(members))
        return self.plan()


# -- out -------------------------------------------------------------------------------------------------------------


def test_every_block_of_a_sequence_moves():
    space = Space(4)
    blocks = space.hold(1, 20)
    assert space.out(blocks) == BlockMoves(swap_outs=[(1, 1), (2, 2), (3, 3)])
    assert blocks.tables == [[-1, -2, -3]]


def test_every_kv_group_moves():
    space = Space(4, 6)
    blocks = space.hold(1, 20)
    assert [len(moves.swap_outs) for moves in space.out(blocks)] == [3, 3]
    assert [[entry < 0 for entry in table] for table in blocks.tables] == [[True] * 3] * 2
    assert not blocks.holds_device_blocks


def test_what_moves_out_is_free_afterwards():
    space = Space(4)
    space.out(space.hold(1, 20))
    assert (space.num_free, space.hosts[0].counts[USED]) == (4, 3)


def test_the_plan_that_moves_blocks_out_may_use_their_places():
    space = Space(2)
    space.swap_out([space.hold(1, 16)], busy_until=-1)
    other = space.open(2)
    space.grow(other, 16)
    assert sorted(other.tables[0]) == [1, 2]
    assert len(space.plan().swap_outs) == 2


def test_places_that_the_plan_does_not_use_wait_for_its_result():
    space = Space(2)
    space.swap_out([space.hold(1, 16)], busy_until=-1)
    space.end_plan()
    assert space.devices[0].counts[RELEASING] == 2


def test_a_block_that_the_group_shares_moves_once():
    space = Space(6)
    members = space.forks(space.hold(1, 20), 2, 3)
    assert space.num_to_swap_out(members) == 3
    assert len(space.out(*members).swap_outs) == 3
    assert [blocks.tables for blocks in members] == [[[-1, -2, -3]]] * 3
    assert space.hosts[0].ref_counts[1:4] == [3, 3, 3]


def test_a_block_that_another_live_group_holds_stays():
    space = Space(6)
    victim, other = space.hold(1, 20, ROOT), space.hold(2, 20, ROOT)
    assert victim.tables[0][:2] == other.tables[0][:2]
    assert space.num_to_swap_out([victim]) == 1
    assert len(space.out(victim).swap_outs) == 1
    assert victim.tables[0] == [1, 2, -1]


def test_when_the_other_group_is_gone_the_rest_can_move_too():
    space = Space(6)
    victim, other = space.hold(1, 20, ROOT), space.hold(2, 20, ROOT)
    space.out(victim)
    space.free(other, busy_until=-1)
    assert len(space.out(victim).swap_outs) == 2
    assert all(entry < 0 for entry in victim.tables[0])


def test_only_some_of_a_group_may_have_diverged():
    space = Space(9)
    members = space.forks(space.hold(1, 20), 2)
    for blocks in members:
        space.grow(blocks, 25)
    space.plan()
    assert space.num_to_swap_out(members) == 6
    space.out(*members)
    first, second = (blocks.tables[0] for blocks in members)
    assert first[:2] == second[:2] and not set(first[2:]) & set(second[2:])


@pytest.mark.parametrize(("host", "num_moves"), [(3, 3), (2, None), (0, None)])
def test_a_host_without_room_is_no_place_for_a_group(host, num_moves):
    space = Space(4, host=host)
    assert space.num_to_swap_out([space.hold(1, 20)]) == num_moves


def test_cached_host_blocks_make_room():
    space = Space(1, host=1)
    first = space.hold(1, 8, ROOT)
    space.out(first)
    space.free(first, busy_until=-1)
    assert space.hosts[0].counts[CACHED] == 1
    second = space.hold(2, 8)
    assert space.num_to_swap_out([second]) == 1
    assert len(space.out(second).swap_outs) == 1


def twice_there(num_host=3):
    """A sequence whose first two blocks, which it alone holds, are on the host as well."""
    space = Space(3, host=num_host)
    blocks = space.hold(1, 17, ROOT)
    space.out(blocks)
    space.back(blocks)
    assert space.hosts[0].counts[CACHED] == 2
    return space, blocks


def test_a_copy_on_the_host_is_used_again():
    space, blocks = twice_there()
    before = [space.hosts[0].find(key) for key in blocks.keys]
    assert space.num_to_swap_out([blocks]) == 1
    assert len(space.out(blocks).swap_outs) == 1
    assert blocks.tables[0][:2] == [-host_id for host_id in before]


def test_a_copy_on_the_host_is_no_room_for_the_rest():
    """It looks like a cached block that could be given out, until it is used again."""
    space, blocks = twice_there()
    space.hosts[0].allocate()
    assert space.num_to_swap_out([blocks]) is None


def test_a_copy_on_the_host_is_not_evicted_by_the_swap_that_uses_it():
    space, blocks = twice_there(num_host=4)
    host, younger = space.hosts[0], b"y" * 16
    host.allocate()
    block_id = host.allocate()
    host.register(block_id, younger)
    host.release(block_id)
    space.swap_out([blocks], busy_until=-1)
    assert (len(set(blocks.tables[0])), host.find(younger)) == (3, None)


def test_the_device_keeps_what_the_host_has_a_copy_of():
    space, blocks = twice_there()
    space.out(blocks)
    assert [space.devices[0].find(key) is not None for key in blocks.keys] == [True, True]


def test_slots_of_a_swapped_group_are_not_counted():
    space = Space(6)
    members = space.forks(space.hold(1, 20), 2)
    space.out(*members)
    assert space.slots == (0, 0)


# -- back ------------------------------------------------------------------------------------------------------------


def test_every_block_comes_back():
    space = Space(4)
    blocks = space.hold(1, 20)
    space.out(blocks)
    assert space.num_to_swap_in([blocks]) == [3]
    assert sorted(host_id for host_id, _ in space.back(blocks).swap_ins) == [1, 2, 3]
    assert all(entry > 0 for entry in blocks.tables[0])
    assert (space.hosts[0].counts[FREE], space.slots) == (4, (20, 24))


def test_a_block_that_is_read_back_is_given_out_after_that_plan_only():
    space = Space(4)
    blocks = space.hold(1, 20)
    space.out(blocks)
    space.swap_in([blocks])
    assert space.hosts[0].counts[RELEASING] == 3


def test_a_shared_block_comes_back_once():
    space = Space(6)
    members = space.forks(space.hold(1, 20), 2, 3)
    space.out(*members)
    assert space.num_to_swap_in(members) == [3]
    assert len(space.back(*members).swap_ins) == 3
    assert len({tuple(blocks.tables[0]) for blocks in members}) == 1
    assert space.devices[0].num_shared == 3


def test_a_shared_last_block_is_brought_in_twice_rather_than_copied():
    """A copy of what the same plan brings in would have to wait for it."""
    space = Space(6)
    parent, child = space.forks(space.hold(1, 13), 2)
    space.out(parent, child)
    space.swap_in([parent, child])
    space.grow(child, 14)
    moves = space.plan()
    assert (len(moves.swap_ins), moves.copies) == (3, [])
    assert (2, child.tables[0][1]) in moves.swap_ins


def test_what_is_found_on_the_device_does_not_move_back():
    space, blocks = twice_there()
    on_device = [space.devices[0].find(key) for key in blocks.keys]
    space.out(blocks)
    assert space.num_to_swap_in([blocks]) == [3]
    assert len(space.back(blocks).swap_ins) == 1
    assert blocks.tables[0][:2] == on_device


def test_what_another_group_has_computed_meanwhile_takes_no_room():
    space = Space(6)
    blocks = space.hold(1, 17, ROOT)
    space.out(blocks)
    device = space.devices[0]
    for _ in blocks.keys:
        device.release(device.allocate())
    other = space.hold(2, 17, ROOT)
    assert space.num_to_swap_in([blocks]) == [1]
    space.back(blocks)
    assert blocks.tables[0][:2] == other.tables[0][:2]


def test_what_stayed_on_the_device_stays():
    space = Space(6)
    victim, other = space.hold(1, 20, ROOT), space.hold(2, 20, ROOT)
    space.out(victim)
    assert space.num_to_swap_in([victim]) == [1]
    space.back(victim)
    assert victim.tables[0][:2] == other.tables[0][:2]


def test_every_kv_group_says_what_coming_back_takes():
    space = Space(6, 6)
    blocks = space.hold(1, 17, ROOT)
    space.out(blocks)
    for key in blocks.keys:
        space.devices[0].take(space.devices[0].find(key))
    assert space.num_to_swap_in([blocks]) == [1, 3]


def test_a_block_keeps_its_key_through_a_round_trip():
    space = Space(4)
    blocks = space.hold(1, 17, ROOT)
    space.out(blocks)
    for _ in range(4):
        space.devices[0].allocate()
    assert all(space.devices[0].find(key) is None for key in blocks.keys)
    for block_id in range(1, 5):
        space.devices[0].release(block_id)
    space.back(blocks)
    assert [space.devices[0].find(key) for key in blocks.keys] == blocks.tables[0][:2]


# -- while swapped ---------------------------------------------------------------------------------------------------


def test_a_swapped_sequence_can_be_forked():
    space = Space(4)
    blocks = space.hold(1, 13)
    space.out(blocks)
    members = space.forks(blocks, 2)
    space.check_integrity()
    space.back(*members)
    assert members[0].tables == members[1].tables


def test_a_swapped_sequence_can_be_freed():
    space = Space(4)
    blocks = space.hold(1, 13)
    space.out(blocks)
    space.free(blocks, busy_until=-1)
    space.check_integrity()
    assert space.hosts[0].counts[FREE] == 4


def test_a_host_block_is_not_given_out_before_it_was_written():
    space = Space(4)
    blocks = space.hold(1, 13)
    space.swap_out([blocks], busy_until=-1)
    space.free(blocks, busy_until=-1)
    assert space.hosts[0].counts[RELEASING] == 2


def test_a_swapped_block_is_a_hit_for_others():
    space = Space(6)
    blocks = space.hold(1, 17, ROOT)
    space.out(blocks)
    for _ in range(6):
        space.devices[0].allocate()
    assert space.match(space.open(2, root=ROOT), TOKENS) == [[-1], [-2]]


def test_full_blocks_of_a_swapped_sequence_can_be_offered():
    """The result of its last step comes when it is on the host already."""
    space = Space(6)
    blocks = space.open(1, root=ROOT)
    space.grow(blocks, 16)
    space.out(blocks)
    space.offer(blocks, TOKENS)
    space.check_integrity()
    assert [space.hosts[0].find(key) for key in blocks.keys] == [1, 2]
