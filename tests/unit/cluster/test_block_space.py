"""Block tables: growing and freeing, the answers to an allocation, and the check of the invariants."""

from __future__ import annotations

import pytest

from kvarto.cluster.block_space import Answer, BlockSpace, State
from kvarto.protos.errors import ConfigError
from kvarto.protos.model import KVGroupSpec

BLOCK_SIZE = 8
ROOT = b"r" * 16


def make(*num_blocks, host=0, **options):
    groups = [KVGroupSpec(layer_ids=(index,)) for index in range(len(num_blocks))]
    return BlockSpace(groups, list(num_blocks), BLOCK_SIZE, num_host_blocks=[host] * len(num_blocks), **options)


def caching(*num_blocks, **options):
    return make(*num_blocks, enable_prefix_caching=True, **options)


def held(space, seq_id, num_tokens, root=None):
    """A sequence that holds so many tokens."""
    blocks = space.open(seq_id, root=root)
    space.grow(blocks, num_tokens)
    space.check_integrity()
    return blocks


def forked(space, parent, *seq_ids):
    children = []
    for seq_id in seq_ids:
        children.append(space.open(seq_id))
        space.fork(parent, children[-1])
        space.check_integrity()
    return children


def count(space, state):
    return space.devices[0].counts[state]


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_blocks", "answer"), [
    (0, Answer.OK), (1, Answer.OK), (4, Answer.OK), (5, Answer.NEVER)])
def test_an_empty_pool_of_four_blocks_holds_four(num_blocks, answer):
    assert make(4).answer([num_blocks]) is answer


def test_what_fits_only_an_empty_pool_must_wait():
    space = make(4)
    held(space, 1, 1)
    assert space.answer([4]) is Answer.LATER


def test_the_tightest_kv_group_decides():
    assert make(9, 4).answer([5, 5]) is Answer.NEVER


def test_releasing_blocks_are_not_free():
    space = make(4)
    space.free(held(space, 1, 32), busy_until=7)
    assert space.answer([1]) is Answer.LATER


def test_releasing_blocks_count_where_it_is_asked_what_will_be():
    space = make(4)
    space.free(held(space, 1, 32), busy_until=7)
    assert space.answer([4], count_releasing=True) is Answer.OK


@pytest.mark.parametrize(("step_id", "num_free"), [(6, 0), (7, 4)])
def test_releasing_blocks_are_free_with_the_result_of_their_plan(step_id, num_free):
    space = make(4)
    space.free(held(space, 1, 32), busy_until=7)
    space.step_done(step_id)
    assert space.num_free == num_free


def test_cached_blocks_can_be_had():
    space = caching(4)
    blocks = held(space, 1, 32, ROOT)
    space.offer(blocks, list(range(32)))
    space.free(blocks, busy_until=-1)
    assert (count(space, State.CACHED), space.answer([4])) == (4, Answer.OK)


def test_capacity_is_what_one_sequence_alone_could_hold():
    assert make(9, 4).capacity_tokens == 32


def test_an_unknown_eviction_policy_is_refused_by_its_key():
    with pytest.raises(ConfigError, match=r"^eviction_policy: .*'fifo'.*lru, retention"):
        make(4, eviction_policy="fifo")


# -- growing ---------------------------------------------------------------------------------------------------------


def test_growing_brings_only_the_blocks_that_are_missing():
    space = make(4, 4)
    blocks = held(space, 1, 8)
    assert [len(ids) for ids in space.grow(blocks, 17)[0]] == [2, 2]


def test_growing_within_a_block_brings_none():
    space = make(4)
    assert space.grow(held(space, 1, 3), 8) == ([], [])


def test_no_block_is_given_out_twice():
    space = make(4)
    first, second = held(space, 1, 16), held(space, 2, 16)
    assert sorted(first.tables[0] + second.tables[0]) == [1, 2, 3, 4]


@pytest.mark.parametrize(("num_tokens", "in_place"), [(10, True), (16, True), (17, False)])
def test_a_sequence_fills_its_last_block_in_place(num_tokens, in_place):
    space = make(4)
    assert space.extend_in_place(held(space, 1, 9), num_tokens) is in_place


def test_filling_a_block_in_place_is_counted():
    space = make(4)
    space.extend_in_place(held(space, 1, 9), 12)
    space.check_integrity()
    assert space.slots == (12, 16)


@pytest.mark.parametrize(("num_tokens", "missing"), [(9, 0), (16, 0), (17, 1), (33, 3)])
def test_missing_blocks_are_those_beyond_the_table(num_tokens, missing):
    space = make(9)
    assert space.num_missing([(held(space, 1, 9), num_tokens)]) == [missing]


# -- freeing and counting --------------------------------------------------------------------------------------------


def test_freeing_what_holds_nothing_is_nothing():
    space = make(4)
    space.free(space.open(99), busy_until=-1)
    assert space.num_free == 4


def test_a_sequence_that_was_freed_can_be_filled_anew():
    space = make(4)
    blocks = held(space, 1, 20)
    space.free(blocks, busy_until=-1)
    space.grow(blocks, 9)
    space.check_integrity()
    assert len(blocks.tables[0]) == 2


def test_used_and_allocated_slots_are_counted():
    space = make(4)
    held(space, 1, 9)
    assert space.slots == (9, 16)


def test_slots_of_every_kv_group_are_counted():
    space = make(4, 4)
    held(space, 1, 9)
    assert space.slots == (18, 32)


def test_slots_that_are_shared_are_counted_once():
    space = make(4)
    forked(space, held(space, 1, 9), 2, 3)
    assert space.slots == (9, 16)


def test_slots_of_a_freed_sequence_are_not_counted():
    space = make(4)
    space.free(held(space, 1, 9), busy_until=3)
    assert space.slots == (0, 0)


def test_slots_of_a_shared_block_count_until_the_last_holder_is_gone():
    space = make(4)
    parent = held(space, 1, 9)
    child, = forked(space, parent, 2)
    space.free(parent, busy_until=3)
    assert space.slots == (9, 16)
    space.free(child, busy_until=3)
    assert space.slots == (0, 0)


# -- integrity -------------------------------------------------------------------------------------------------------


def break_table(space, blocks):
    blocks.tables[0].append(blocks.tables[0].pop() + 1)


def break_length(space, blocks):
    blocks.num_tokens = blocks.capacity + 1


def break_count(space, blocks):
    space.num_unused_slots += 1


def break_key(space, blocks):
    blocks.keys[0] = b"x" * 16


def break_fullness(space, blocks):
    space.devices[0].register(blocks.tables[0][-1], b"y" * 16)
    blocks.keys.append(b"y" * 16)


def break_sharing(space, blocks):
    """Two would write one block."""
    child, = forked(space, blocks, 2)
    child.may_share_tail = False


def break_liveness(space, blocks):
    del space.live[blocks.seq_id]


@pytest.mark.parametrize("corrupt", [
    break_table, break_length, break_count, break_key, break_fullness, break_sharing, break_liveness])
def test_integrity_notices(corrupt):
    space = caching(6)
    blocks = held(space, 1, 12, ROOT)
    space.offer(blocks, list(range(12)))
    space.check_integrity()
    corrupt(space, blocks)
    with pytest.raises(AssertionError):
        space.check_integrity()
