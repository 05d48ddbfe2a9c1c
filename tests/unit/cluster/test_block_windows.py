"""Blocks behind a sliding window: which ones a sequence gives back, who else may hold them, and where prompts begin.

Blocks hold 8 tokens. KV group 0 has no window; group 1 has one of 20 tokens unless a test says otherwise.
"""

from __future__ import annotations

import pytest

from kvarto.cluster.block_space import BlockSpace, State
from kvarto.cluster.block_space.windows import enough_blocks
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.request import KVPool

FULL = KVGroupSpec(layer_ids=(0,))
ROOT = b"r" * 16
TOKENS = list(range(100))


def windowed(window=20, num_sinks=0):
    return KVGroupSpec(layer_ids=(1,), window=window, num_sinks=num_sinks)


class Space(BlockSpace):
    def __init__(self, *groups, num_blocks=20, num_host_blocks=0, caching=True):
        groups = list(groups or (FULL, windowed()))
        super().__init__(groups, [num_blocks] * len(groups), 8, num_host_blocks=[num_host_blocks] * len(groups),
                         enable_prefix_caching=caching)

    def hold(self, seq_id, num_tokens, root=ROOT):
        """A sequence that has computed the first of `TOKENS`."""
        blocks = self.open(seq_id, root=root)
        self.grow(blocks, num_tokens)
        self.offer(blocks, TOKENS[:num_tokens])
        return blocks

    def trim(self, blocks, busy_until=-1):
        self.release_behind_windows(blocks, busy_until=busy_until)
        self.check_integrity()
        return behind(blocks)


def behind(blocks, group=1):
    """Indices of the null blocks in a table."""
    return [index for index, entry in enumerate(blocks.tables[group]) if not entry]


@pytest.mark.parametrize("window", [1, 2, 7, 8, 9, 16, 20, 33])
@pytest.mark.parametrize("num_sinks", [0, 1, 8, 9])
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 20, 27, 28, 29, 48, 57])
def test_what_no_query_to_come_sees_is_given_back_and_nothing_else(window, num_sinks, num_tokens):
    """Told position by position, by what `KVGroupSpec` says of the queries from `num_tokens` on."""
    space = Space(FULL, windowed(window, num_sinks))
    found = space.trim(space.hold(1, num_tokens))
    seen = {position // 8 for query in range(num_tokens, num_tokens + 50) for position in range(query + 1)
            if position > query - window or position < num_sinks}
    assert found == [index for index in range(-(-num_tokens // 8)) if index not in seen]


def test_a_group_without_a_window_gives_nothing_back():
    space = Space()
    blocks = space.hold(1, 60)
    space.trim(blocks)
    assert (behind(blocks, 0), space.devices[0].counts[State.USED]) == ([], 8)


def test_no_entry_is_given_back_twice():
    space = Space()
    blocks = space.hold(1, 40)
    assert space.trim(blocks) == space.trim(blocks) == [0, 1]
    space.grow(blocks, 50)
    assert space.trim(blocks) == [0, 1, 2]


def test_blocks_that_a_plan_in_flight_reads_come_free_with_its_result():
    space = Space(FULL, windowed(), caching=False)
    space.trim(space.hold(1, 40), busy_until=3)
    device = space.devices[1]
    assert (device.counts[State.RELEASING], device.num_available()) == (2, 15)
    space.step_done(2)
    assert device.num_available() == 15
    space.step_done(3)
    assert device.num_available() == 17


def test_a_block_that_another_sequence_sees_stays():
    space = Space()
    parent = space.hold(1, 40)
    child = space.open(2)
    space.fork(parent, child)
    shared = list(parent.tables[1])
    space.trim(parent)
    assert (child.tables[1], space.devices[1].ref_counts[shared[0]]) == (shared, 1)
    space.trim(child)
    assert space.devices[1].ref_counts[shared[0]] == 0


def test_what_a_chunk_reads_is_not_given_out_when_its_last_holder_is_swapped_out():
    """By the same plan: the swap-out comes first, but what is brought into its place would come before the reading."""
    space = Space(num_host_blocks=10)
    other = space.hold(1, 24)
    blocks = space.open(2, root=ROOT)
    space.attach(blocks, space.match(blocks, TOKENS[:64]))
    shared = list(other.tables[1])
    assert blocks.tables[1] == shared
    space.grow(blocks, 64)
    space.release_behind_windows(blocks, busy_until=space.moves.step_id)
    space.swap_out([other], busy_until=-1)
    assert all(space.devices[1].states[block] is State.RELEASING for block in shared)
    space.end_plan()
    space.check_integrity()


def test_a_fork_has_given_back_what_its_parent_has():
    space = Space()
    parent, child = space.hold(1, 40), space.open(2)
    space.trim(parent)
    space.fork(parent, child)
    assert space.trim(child) == [0, 1]
    for blocks in (parent, child):
        space.free(blocks, busy_until=-1)
        space.check_integrity()
    assert space.num_used == 0


def test_a_sequence_that_was_freed_begins_anew_with_all_of_its_blocks():
    space = Space()
    blocks = space.hold(1, 40)
    space.trim(blocks)
    space.free(blocks, busy_until=-1)
    space.grow(blocks, 40)
    assert behind(blocks) == []
    space.check_integrity()


def test_what_fell_behind_can_still_be_found():
    space = Space()
    blocks = space.hold(1, 40)
    key = blocks.keys[0]
    space.trim(blocks)
    assert space.devices[1].states[space.devices[1].find(key)] is State.CACHED


# -- prefix hits -----------------------------------------------------------------------------------------------------


def cached(space, num_tokens=64):
    """Keys of a prompt that was computed and has ended."""
    blocks = space.hold(1, num_tokens)
    space.free(blocks, busy_until=-1)
    return blocks.keys


def lose(space, group, *indices, keys):
    for index in indices:
        space.devices[group].forget(space.devices[group].find(keys[index]))


def hit(space):
    """How many blocks a prompt of all `TOKENS` finds."""
    return len(space.match(space.open(2, root=ROOT), TOKENS))


@pytest.mark.parametrize(("lost", "num_found"), [
    ((0,), 8), ((0, 1, 2, 3, 4), 8), ((5,), 5), ((6,), 6), ((7,), 7), ((4, 7), 4), ((2, 6), 6), ((0, 5), 5),
    ((2, 5), 2), ((3, 6), 3)])
def test_only_the_blocks_that_the_window_sees_must_be_there(lost, num_found):
    """A query at 8 k sees 19 tokens before it: blocks k - 3 .. k - 1."""
    space = Space()
    lose(space, 1, *lost, keys=cached(space))
    assert hit(space) == num_found


@pytest.mark.parametrize(("lost", "num_found"), [((0,), 0), ((3,), 3), ((7,), 7)])
def test_a_group_without_a_window_must_have_every_block(lost, num_found):
    space = Space()
    lose(space, 0, *lost, keys=cached(space))
    assert hit(space) == num_found


@pytest.mark.parametrize(("lost", "num_found"), [((0,), 0), ((1,), 1), ((2,), 8), ((2, 3), 8), ((2, 7), 7)])
def test_the_blocks_of_the_sinks_must_be_there(lost, num_found):
    space = Space(FULL, windowed(20, num_sinks=9))
    lose(space, 1, *lost, keys=cached(space))
    assert hit(space) == num_found


@pytest.mark.parametrize("window", [1, 8, 9, 20, 33])
@pytest.mark.parametrize("num_sinks", [0, 3, 9])
@pytest.mark.parametrize("seed", range(8))
def test_the_longest_prefix_that_can_be_used_is_found(window, num_sinks, seed):
    """Told block by block, by what the queries after the prefix see."""
    space = Space(FULL, windowed(window, num_sinks))
    keys = cached(space)
    lost = {index for index in range(8) if (seed + 3) * (index + 5) % 7 < 2}
    lose(space, 1, *lost, keys=keys)

    def is_usable(count):
        seen = {position // 8 for query in range(8 * count, 8 * count + 50) for position in range(8 * count)
                if position > query - window or position < num_sinks}
        return not seen & lost

    match = space.match(space.open(2, root=ROOT), TOKENS)
    assert len(match) == max(count for count in range(9) if is_usable(count))


def test_a_sequence_that_begins_with_a_hit_holds_what_it_sees_of_it():
    space = Space(FULL, windowed(20, num_sinks=3))
    cached(space)
    blocks = space.open(2, root=ROOT)
    match = space.match(blocks, TOKENS)
    assert space.num_to_take(match) == [8, 4]
    space.attach(blocks, match)
    assert (behind(blocks, 0), behind(blocks)) == ([], [1, 2, 3, 4])
    space.check_integrity()
    space.grow(blocks, 65)
    space.offer(blocks, TOKENS)
    space.free(blocks, busy_until=-1)
    space.check_integrity()
    assert space.num_used == 0


# -- swapping --------------------------------------------------------------------------------------------------------


def test_only_what_is_still_seen_is_swapped():
    space = Space(num_host_blocks=8)
    blocks = space.hold(1, 60, root=None)
    space.trim(blocks)
    assert space.num_to_swap_out([blocks]) == 8
    space.swap_out([blocks], busy_until=-1)
    assert [sum(entry < 0 for entry in table) for table in blocks.tables] == [8, 3]
    assert [len(moves.swap_outs) for moves in space.end_plan()] == [8, 3]
    space.step_done(0)
    assert space.num_to_swap_in([blocks]) == [8, 3]
    space.swap_in([blocks])
    assert behind(blocks) == [0, 1, 2, 3, 4]
    space.end_plan()
    space.step_done(1)
    space.check_integrity()


def test_a_hit_on_host_blocks_brings_back_what_is_seen():
    space = Space(num_blocks=8, num_host_blocks=8)
    cached(space)
    space.free(space.hold(3, 64, root=None), busy_until=-1)
    space.end_plan()
    space.step_done(0)
    blocks = space.open(2, root=ROOT)
    match = space.match(blocks, TOKENS)
    assert (len(match), space.num_on_host(match), space.num_to_take(match)) == (8, 8, [8, 3])
    space.attach(blocks, match)
    assert [len(moves.swap_ins) for moves in space.end_plan()] == [8, 3]
    space.step_done(1)
    space.check_integrity()


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "tokens"), [
    ((FULL,), 80), ((FULL, windowed()), 80), ((windowed(), FULL), 160), ((windowed(), windowed(40)), 80)])
def test_capacity_is_that_of_the_groups_without_a_window_where_there_are_any(groups, tokens):
    space = BlockSpace(list(groups), [10, 20][: len(groups)], 8)
    assert space.capacity_tokens == tokens


@pytest.mark.parametrize("kind", [KVPool, KVGroupSpec])
def test_a_pool_with_a_window_needs_no_more_than_windows_sinks_and_a_chunk(kind):
    fields = {"num_blocks": 1} if kind is KVPool else {"layer_ids": (0,)}
    assert enough_blocks(kind(**fields), 8, 3, 64) is None
    assert enough_blocks(kind(window=20, num_sinks=4, **fields), 8, 3, 61) == 3 * (3 + 1 + 2) + 8
