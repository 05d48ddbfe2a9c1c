"""One pool of blocks: in which state each is, which is given out next, and who is told of an eviction."""

from __future__ import annotations

from collections import Counter

import pytest

from kvarto.cluster.block_space import BlockPool, State
from kvarto.cluster.policies import EVICTION
from kvarto.protos.errors import KvartoError

FREE, CACHED, RELEASING, EMPTIED, USED = State


def make(num_blocks=3, eviction="lru", keep_cached=True):
    return BlockPool(num_blocks, keep_cached=keep_cached, eviction=EVICTION[eviction])


def key(number):
    return bytes([number]) * 16


def cached(pool, number):
    """A block that holds the prefix `number` and is nobody's."""
    block_id = pool.allocate()
    pool.register(block_id, key(number))
    pool.release(block_id)
    return block_id


# -- states ----------------------------------------------------------------------------------------------------------


def test_a_new_pool_is_free():
    assert make().counts == [3, 0, 0, 0, 0]


def test_the_null_block_is_never_given_out():
    pool = make()
    assert sorted(pool.allocate() for _ in range(3)) == [1, 2, 3]


def test_a_block_that_is_given_out_has_one_reference():
    pool = make()
    block_id = pool.allocate()
    assert (pool.states[block_id], pool.ref_counts[block_id], pool.num_references) == (USED, 1, 1)


def test_taking_more_than_there_is_is_a_defect():
    pool = make(1)
    pool.allocate()
    with pytest.raises(KvartoError, match="scheduler defect"):
        pool.allocate()


def test_a_block_is_in_use_until_its_last_reference_is_given_back():
    pool = make()
    block_id = pool.allocate()
    pool.take(block_id)
    assert [pool.release(block_id), pool.states[block_id]] == [False, USED]
    assert [pool.release(block_id), pool.states[block_id]] == [True, FREE]


@pytest.mark.parametrize(("num_takes", "num_shared"), [(0, 0), (1, 1), (2, 1)])
def test_a_shared_block_is_counted_once(num_takes, num_shared):
    pool = make()
    block_id = pool.allocate()
    for _ in range(num_takes):
        pool.take(block_id)
    assert (pool.num_shared, pool.num_references) == (num_shared, num_takes + 1)


def test_a_block_is_shared_no_more_when_one_holds_it():
    pool = make()
    block_id = pool.allocate()
    pool.take(block_id)
    pool.release(block_id)
    assert (pool.num_shared, pool.num_references) == (0, 1)


@pytest.mark.parametrize(("keep_cached", "registered", "state"), [
    (True, True, CACHED), (True, False, FREE), (False, True, FREE)])
def test_a_registered_block_is_cached_where_blocks_are_kept(keep_cached, registered, state):
    pool = make(keep_cached=keep_cached)
    block_id = pool.allocate()
    if registered:
        pool.register(block_id, key(1))
    pool.release(block_id)
    assert pool.states[block_id] is state


def test_a_free_block_is_found_by_nobody():
    pool = make(keep_cached=False)
    cached(pool, 1)
    assert pool.find(key(1)) is None


# -- releasing -------------------------------------------------------------------------------------------------------


def test_a_block_that_a_plan_in_flight_names_is_not_given_out():
    pool = make(1)
    pool.release(pool.allocate(), busy_until=4)
    assert (pool.num_available(), pool.num_available(count_releasing=True)) == (0, 1)


@pytest.mark.parametrize(("done", "state"), [(3, RELEASING), (4, FREE), (9, FREE)])
def test_it_is_given_out_again_from_that_plans_result_on(done, state):
    pool = make(1)
    block_id = pool.allocate()
    pool.release(block_id, busy_until=4)
    pool.step_done(done)
    assert pool.states[block_id] is state


def test_a_plan_whose_result_is_in_holds_nothing_up():
    pool = make(1)
    pool.step_done(4)
    pool.release(pool.allocate(), busy_until=4)
    assert pool.num_available() == 1


def test_the_last_plan_of_all_who_gave_it_back_counts():
    pool = make(1)
    block_id = pool.allocate()
    pool.take(block_id)
    pool.release(block_id, busy_until=6)
    pool.release(block_id, busy_until=4)
    pool.step_done(5)
    assert pool.states[block_id] is RELEASING


def test_a_block_that_a_plan_reads_waits_for_it_whoever_gives_it_back():
    pool = make(1)
    block_id = pool.allocate()
    pool.touch(block_id, 6)
    pool.release(block_id, busy_until=4)
    pool.step_done(5)
    assert pool.states[block_id] is RELEASING


def releasing(pool):
    block_id = pool.allocate()
    pool.register(block_id, key(1))
    pool.release(block_id, busy_until=4)
    return block_id


def test_a_hit_on_a_releasing_block_keeps_it_in_use_beyond_the_result():
    pool = make(1)
    block_id = releasing(pool)
    pool.take(block_id)
    pool.step_done(4)
    assert pool.states[block_id] is USED
    pool.check_integrity({block_id: 1})


@pytest.mark.parametrize(("again", "states"), [(4, [CACHED, CACHED]), (7, [RELEASING, CACHED]), (-1, [CACHED, CACHED])])
def test_a_releasing_block_that_was_hit_and_given_back_waits_for_the_later_plan(again, states):
    pool = make(1)
    block_id = releasing(pool)
    pool.take(block_id)
    pool.release(block_id, busy_until=again)
    seen = []
    for step_id in (4, 7):
        pool.step_done(step_id)
        pool.check_integrity({})
        seen.append(pool.states[block_id])
    assert seen == states


# -- emptied ---------------------------------------------------------------------------------------------------------


def emptied(pool):
    block_id = pool.allocate()
    pool.register(block_id, key(1))
    pool.empty(block_id, 4)
    return block_id


def test_an_emptied_block_is_given_out_within_its_plan_once_none_is_free():
    """Until then its contents may still be found."""
    pool = make(2)
    block_id = emptied(pool)
    free = 3 - block_id
    assert [pool.allocate(), pool.allocate()] == [free, block_id]


def test_an_emptied_block_that_its_plan_reads_waits_for_the_result():
    """Somebody who gave it back before reads it in the same plan."""
    pool = make(1)
    block_id = pool.allocate()
    pool.touch(block_id, 4)
    pool.empty(block_id, 4)
    assert (pool.states[block_id], pool.num_available()) == (RELEASING, 0)
    pool.end_plan(4)
    pool.step_done(4)
    pool.check_integrity({})
    assert pool.allocate() == block_id


def test_an_emptied_block_is_given_out_before_a_cached_one():
    pool = make(2)
    cached(pool, 2)
    block_id = emptied(pool)
    assert pool.allocate() == block_id
    assert pool.find(key(2)) is not None


def test_of_several_emptied_blocks_the_first_to_be_emptied_is_given_out_first():
    pool = make(2)
    block_ids = [pool.allocate(), pool.allocate()]
    for block_id in reversed(block_ids):
        pool.empty(block_id, 4)
    assert [pool.allocate(), pool.allocate()] == block_ids[::-1]


def test_an_emptied_block_that_is_given_out_is_found_no_more():
    pool = make(1)
    emptied(pool)
    pool.allocate()
    assert pool.find(key(1)) is None


def test_an_emptied_block_is_available():
    pool = make(1)
    emptied(pool)
    assert pool.num_available() == 1


def test_an_emptied_block_waits_for_its_plan_once_that_is_made():
    pool = make(1)
    block_id = emptied(pool)
    pool.end_plan(3)
    assert (pool.states[block_id], pool.num_available()) == (RELEASING, 0)


def test_an_emptied_block_is_cached_after_its_plan():
    pool = make(1)
    block_id = emptied(pool)
    pool.end_plan(3)
    pool.step_done(3)
    assert (pool.states[block_id], pool.find(key(1))) == (CACHED, block_id)


def test_an_emptied_block_that_was_given_out_is_nothing_to_the_end_of_the_plan():
    pool = make(1)
    emptied(pool)
    block_id = pool.allocate()
    pool.end_plan(3)
    pool.check_integrity({block_id: 1})


def test_an_emptied_block_may_be_found_and_used_again():
    pool = make(1)
    block_id = emptied(pool)
    pool.take(block_id)
    pool.end_plan(3)
    pool.check_integrity({block_id: 1})
    assert pool.states[block_id] is USED


# -- integrity -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool():
    """Blocks 1 and 2 in use, 3 cached, 4 releasing, 5 free."""
    pool = make(5)
    for number in range(1, 5):
        pool.register(pool.allocate(), key(number))
    pool.release(3)
    pool.release(4, busy_until=9)
    pool.check_integrity({1: 1, 2: 1})
    return pool


@pytest.mark.parametrize("references", [{}, {1: 1}, {1: 2, 2: 1}, {1: 1, 2: 1, 5: 1}, {1: 1, 2: 1, 9: 1}])
def test_integrity_notices_references_that_are_lost_doubled_or_made_up(pool, references):
    with pytest.raises(AssertionError):
        pool.check_integrity(Counter(references))


CORRUPTIONS = {
    "a free block is queued twice": lambda pool: pool._free.append(5),
    "a free block is queued nowhere": lambda pool: pool._free.remove(5),
    "a block in use is queued as free": lambda pool: pool._free.append(1),
    "a cached block is queued nowhere": lambda pool: pool._cached[0].clear(),
    "a cached block is queued in two levels": lambda pool: pool._cached[1].update({3: None}),
    "a releasing block waits for nothing": lambda pool: pool._releasing.clear(),
    "a block in use is emptied": lambda pool: pool._emptied.update({1: None}),
    "a state is not counted": lambda pool: pool.states.__setitem__(5, USED),
    "a count is wrong": lambda pool: pool.counts.__setitem__(USED, 3),
    "a block is made up": lambda pool: pool.counts.__setitem__(RELEASING, 2),
    "a reference is not counted": lambda pool: pool.ref_counts.__setitem__(1, 2),
    "the sum of references is wrong": lambda pool: setattr(pool, "num_references", 3),
    "the number of shared blocks is wrong": lambda pool: setattr(pool, "num_shared", 1),
    "a key points at another block": lambda pool: pool._index.__setitem__(key(1), 2),
    "a key points at a block without it": lambda pool: pool._index.__setitem__(key(8), 5),
    "a free block holds a key": lambda pool: (pool.keys.__setitem__(5, key(8)), pool._index.__setitem__(key(8), 5)),
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_integrity_notices_that(pool, corrupt):
    corrupt(pool)
    with pytest.raises((AssertionError, KeyError)):
        pool.check_integrity({1: 1, 2: 1})
