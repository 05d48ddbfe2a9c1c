"""Who owns which block, and the three answers to an allocation."""

from __future__ import annotations

import pytest

from kvarto.cluster.block_space import Answer, BlockPool, BlockSpace
from kvarto.protos.errors import KvartoError
from kvarto.protos.model import KVGroupSpec

BLOCK_SIZE = 8


def make(*num_blocks):
    groups = [KVGroupSpec(layer_ids=(index,)) for index in range(len(num_blocks))]
    return BlockSpace(groups, list(num_blocks), BLOCK_SIZE)


@pytest.mark.parametrize(("lengths", "answer"), [
    ([1], Answer.OK), ([32], Answer.OK), ([33], Answer.NEVER), ([16, 16], Answer.OK), ([1, 1, 1, 1], Answer.OK),
    ([1, 1, 1, 1, 1], Answer.NEVER), ([17, 9], Answer.NEVER)])
def test_an_empty_pool_of_four_blocks_holds_four(lengths, answer):
    assert make(4).can_hold(lengths) is answer


def test_what_fits_only_an_empty_pool_must_wait():
    space = make(4)
    space.grow(1, 1)
    assert space.can_hold([32]) is Answer.LATER


def test_a_watermark_is_left_free():
    assert make(4).can_hold([25], watermark=1) is Answer.LATER


def test_a_watermark_never_makes_it_impossible():
    assert make(4).can_hold([32], watermark=4) is Answer.LATER


def test_the_tightest_kv_group_decides():
    assert make(9, 4).can_hold([33]) is Answer.NEVER


def test_releasing_blocks_are_not_free():
    space = make(4)
    space.grow(1, 32)
    space.free(1, busy_until=7)
    assert space.can_hold([1]) is Answer.LATER


def test_releasing_blocks_count_where_it_is_asked_what_will_be():
    space = make(4)
    space.grow(1, 32)
    space.free(1, busy_until=7)
    assert space.can_hold([32], count_releasing=True) is Answer.OK


def test_releasing_blocks_are_free_with_the_result_of_their_plan():
    space = make(4)
    space.grow(1, 32)
    space.free(1, busy_until=7)
    space.step_done(7)
    assert space.num_free == 4


def test_releasing_blocks_stay_with_an_earlier_result():
    space = make(4)
    space.grow(1, 32)
    space.free(1, busy_until=7)
    space.step_done(6)
    assert (space.num_free, space.num_releasing) == (0, 4)


def test_growing_brings_only_the_blocks_that_are_missing():
    space = make(4)
    space.grow(1, 8)
    assert [len(ids) for ids in space.grow(1, 17)] == [2]


def test_growing_within_a_block_brings_none():
    space = make(4)
    space.grow(1, 3)
    assert space.grow(1, 8) == []


def test_no_block_is_given_out_twice():
    space = make(4)
    given = [*space.grow(1, 16)[0], *space.grow(2, 16)[0]]
    assert len(set(given)) == 4


def test_the_null_block_is_never_given_out():
    assert 0 not in make(4).grow(1, 32)[0]


@pytest.mark.parametrize(("length", "answer"), [(16, True), (24, True), (25, False)])
def test_a_sequence_can_grow_as_far_as_the_free_blocks_go(length, answer):
    space = make(4)
    space.grow(1, 9)
    space.grow(2, 8)
    assert space.can_grow(1, length) is answer


def test_freeing_an_unknown_sequence_is_nothing():
    space = make(4)
    space.free(99, busy_until=None)
    assert space.num_free == 4


def test_used_and_allocated_slots_are_counted():
    space = make(4)
    space.grow(1, 9)
    assert space.slots == (9, 16)


def test_slots_of_a_freed_sequence_are_not_counted():
    space = make(4)
    space.grow(1, 9)
    space.free(1, busy_until=3)
    assert space.slots == (0, 0)


def test_capacity_is_what_one_sequence_alone_could_hold():
    assert make(9, 4).capacity_tokens == 32


def test_taking_more_than_is_free_is_a_defect_that_takes_nothing():
    pool = BlockPool(2)
    with pytest.raises(KvartoError):
        pool.allocate(3)
    assert pool.num_free == 2


@pytest.mark.parametrize("in_use", [[], [1, 1], [9]])
def test_integrity_notices_a_block_that_is_lost_doubled_or_made_up(in_use):
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.check_integrity(in_use)


def test_integrity_notices_a_table_that_is_too_short():
    space = make(4)
    space.grow(1, 8)
    space._num_tokens[1] = 9
    space._total_tokens = 9
    with pytest.raises(AssertionError, match="table of sequence 1"):
        space.check_integrity()
