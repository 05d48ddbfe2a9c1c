"""One pool of blocks as a cache: which block is evicted next, who is told, and which prefix is where."""

from __future__ import annotations

import pytest

from kvarto.cluster.block_space import BlockPool, State
from kvarto.cluster.policies import EVICTION

FREE, CACHED, RELEASING, EMPTIED, USED = State


def make(num_blocks=3, eviction="lru", keep_cached=True):
    return BlockPool(num_blocks, keep_cached=keep_cached, eviction=EVICTION[eviction])


def key(number):
    return bytes([number]) * 16


def cached(pool, number, priority=0, num_hits=0):
    """A block that holds the prefix `number` and is nobody's, after so many hits."""
    block_id = pool.allocate()
    pool.register(block_id, key(number), priority)
    pool.release(block_id)
    for _ in range(num_hits):
        pool.take(block_id)
        pool.count_hit(block_id)
        pool.release(block_id)
    return block_id


def evicted(pool, count):
    """The numbers of the prefixes that so many allocations push out, in order."""
    gone = []
    pool.on_evict = lambda block_id, key: gone.append(key[0])
    for _ in range(count):
        pool.allocate()
    return gone


# -- eviction --------------------------------------------------------------------------------------------------------


def test_free_blocks_are_given_out_before_cached_ones():
    pool = make(3)
    cached(pool, 1)
    assert evicted(pool, 2) == []


def test_the_longest_unused_is_evicted_first():
    pool = make(3)
    for number in (1, 2, 3):
        cached(pool, number)
    assert evicted(pool, 3) == [1, 2, 3]


def test_a_hit_makes_a_block_the_last_to_be_evicted():
    pool = make(3)
    first = cached(pool, 1)
    cached(pool, 2)
    cached(pool, 3)
    pool.take(first)
    pool.release(first)
    assert evicted(pool, 3) == [2, 3, 1]


def test_an_evicted_block_is_found_no_more():
    pool = make(1)
    cached(pool, 1)
    pool.allocate()
    assert pool.find(key(1)) is None


def test_whoever_is_told_of_an_eviction_still_finds_the_block_in_use():
    """It must not be given out a second time by what follows from the eviction."""
    pool, seen = make(1), []
    cached(pool, 1)
    pool.on_evict = lambda block_id, key: seen.append((pool.states[block_id], pool.find(key)))
    block_id = pool.allocate()
    assert seen == [(USED, block_id)]


def test_retention_evicts_what_was_never_found_before_what_was():
    pool = make(3, "retention")
    cached(pool, 1, num_hits=1)
    cached(pool, 2)
    cached(pool, 3)
    assert evicted(pool, 3) == [2, 3, 1]


def test_retention_evicts_what_urgent_requests_filled_after_the_rest():
    pool = make(4, "retention")
    cached(pool, 1, priority=-1, num_hits=1)
    cached(pool, 2, priority=-1)
    cached(pool, 3, num_hits=1)
    cached(pool, 4)
    assert evicted(pool, 4) == [4, 2, 3, 1]


def test_one_more_reference_alone_is_no_hit():
    """A fork takes a block, too."""
    pool = make(2, "retention")
    first = cached(pool, 1)
    cached(pool, 2)
    pool.take(first)
    pool.take(first)
    pool.release(first)
    pool.release(first)
    assert evicted(pool, 2) == [2, 1]
    assert pool._uses[first] == (0, 0)


def test_lru_heeds_neither_hits_nor_priorities():
    pool = make(2)
    cached(pool, 1, priority=-1, num_hits=3)
    cached(pool, 2)
    assert evicted(pool, 2) == [1, 2]


def test_a_block_with_new_contents_begins_without_hits():
    pool = make(1, "retention")
    cached(pool, 1, num_hits=3)
    block_id = pool.allocate()
    pool.register(block_id, key(2))
    pool.release(block_id)
    assert pool._uses[block_id] == (0, 0)


# -- keys ------------------------------------------------------------------------------------------------------------


def test_a_prefix_that_is_registered_twice_is_that_of_the_first_block():
    pool = make()
    first, second = pool.allocate(), pool.allocate()
    assert [pool.register(block_id, key(1)) for block_id in (first, second)] == [True, False]
    assert (pool.find(key(1)), pool.keys[second]) == (first, None)


def test_the_second_of_two_with_one_prefix_is_free_when_it_is_given_back():
    pool = make()
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, key(1))
    pool.register(second, key(1))
    pool.release(second)
    pool.check_integrity({first: 1})
    assert (pool.states[second], pool.find(key(1))) == (FREE, first)


def test_a_block_that_is_to_be_forgotten_is_free_when_it_is_given_back():
    pool = make()
    block_id = pool.allocate()
    pool.register(block_id, key(1))
    pool.forget(block_id)
    pool.release(block_id)
    assert (pool.states[block_id], pool.find(key(1))) == (FREE, None)


@pytest.mark.parametrize(("eviction", "priority", "num_hits"), [("lru", 0, 0), ("retention", -1, 2)])
def test_a_cached_block_that_is_forgotten_is_free(eviction, priority, num_hits):
    pool = make(2, eviction)
    block_id = cached(pool, 1, priority, num_hits)
    pool.forget(block_id)
    pool.check_integrity({})
    assert (pool.states[block_id], pool.find(key(1))) == (FREE, None)


def test_nobody_is_told_of_the_eviction_of_a_block_that_was_forgotten():
    pool = make(1)
    pool.forget(cached(pool, 1))
    assert evicted(pool, 1) == []


@pytest.mark.parametrize("give_back", [
    lambda pool, block_id: pool.release(block_id, busy_until=4),
    lambda pool, block_id: (pool.empty(block_id, 4), pool.end_plan(4)),
], ids=["releasing", "emptied"])
def test_a_block_that_is_forgotten_while_a_plan_names_it_is_free_after_that(give_back):
    pool = make(1)
    block_id = pool.allocate()
    pool.register(block_id, key(1))
    give_back(pool, block_id)
    pool.forget(block_id)
    states = [pool.states[block_id]]
    pool.step_done(4)
    pool.check_integrity({})
    assert ([*states, pool.states[block_id]], pool.find(key(1))) == ([RELEASING, FREE], None)


def test_a_prefix_that_was_forgotten_may_be_registered_again():
    pool = make()
    pool.forget(cached(pool, 1))
    block_id = pool.allocate()
    assert pool.register(block_id, key(1))
    assert pool.find(key(1)) == block_id


def test_to_forget_a_block_without_a_prefix_is_nothing():
    pool = make()
    block_id = pool.allocate()
    pool.forget(block_id)
    pool.check_integrity({block_id: 1})
