"""Blocks that several sequences hold: by forks, with copy-on-write, and by content."""

from __future__ import annotations

import pytest

from kvarto.cluster.block_space import BlockSpace, State
from kvarto.protos.errors import KvartoError
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.step import BlockMoves

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


# -- forks -----------------------------------------------------------------------------------------------------------


def test_a_fork_shares_every_block():
    space = make(4)
    parent = held(space, 1, 20)
    child, = forked(space, parent, 2)
    assert (child.tables, space.num_used) == (parent.tables, 3)


def test_a_fork_of_one_that_holds_blocks_already_is_a_defect():
    space = make(4)
    with pytest.raises(KvartoError, match="fork"):
        space.fork(held(space, 1, 4), held(space, 2, 4))


def test_a_shared_last_block_is_not_written_in_place():
    space = make(4)
    parent = held(space, 1, 5)
    child, = forked(space, parent, 2)
    assert not space.extend_in_place(child, 6)


def test_a_full_last_block_is_shared_without_a_copy():
    space = make(4)
    parent = held(space, 1, 8)
    child, = forked(space, parent, 2)
    assert len(space.grow(child, 9)[0][0]) == 1
    assert space.end_plan() == []


def test_the_first_to_write_a_shared_last_block_has_it_copied():
    space = make(4)
    parent = held(space, 1, 13)
    child, = forked(space, parent, 2)
    shared = parent.tables[0][-1]
    new, copied = space.grow(child, 14)
    assert (new, space.end_plan()) == ([], [BlockMoves(copies=[(shared, copied[0])])])
    assert (child.tables[0][-1], parent.tables[0][-1]) == (copied[0], shared)


def test_a_copy_is_made_in_every_kv_group():
    space = make(4, 6)
    parent = held(space, 1, 13)
    child, = forked(space, parent, 2)
    _, copied = space.grow(child, 14)
    assert [moves.copies for moves in space.end_plan()] == [
        [(table[-1], block_id)] for table, block_id in zip(parent.tables, copied, strict=True)]


def test_the_last_to_write_a_shared_block_has_it_for_itself():
    space = make(6)
    parent = held(space, 1, 13)
    for child in forked(space, parent, 2, 3, 4):
        space.grow(child, 14)
    assert space.grow(parent, 14) == ([], [])
    assert len(space.end_plan()[0].copies) == 3


def test_the_block_that_is_copied_may_be_written_by_its_last_holder_in_the_same_plan():
    """Moves come before steps: the contents that are copied are those of before."""
    space = make(4)
    parent = held(space, 1, 5)
    child, = forked(space, parent, 2)
    space.grow(child, 6)
    space.grow(parent, 6)
    space.check_integrity()


def test_the_source_of_a_copy_is_not_given_out_before_the_copy_is_made():
    space = make(3)
    parent = held(space, 1, 5)
    child, = forked(space, parent, 2)
    space.grow(child, 6)
    space.free(parent, busy_until=-1)
    assert count(space, State.RELEASING) == 1


@pytest.mark.parametrize(("writers", "missing"), [((1,), 1), ((2,), 1), ((1, 2), 2), ((1, 2, 3), 2)])
def test_copies_that_writing_will_take_are_foretold(writers, missing):
    """Of three that share a block, as many as write it need one of their own, but the last."""
    space = make(9)
    parent = held(space, 1, 5)
    members = [parent, *forked(space, parent, 2, 3)]
    assert space.num_missing([(blocks, 6) for blocks in members if blocks.seq_id in writers]) == [missing]
    before = space.num_used
    for blocks in members:
        if blocks.seq_id in writers:
            space.grow(blocks, 6)
    assert space.num_used - before == missing


def test_a_fork_of_a_fork_is_copied_as_often_as_it_is_written():
    space = make(9)
    parent = held(space, 1, 5)
    child, = forked(space, parent, 2)
    grandchild, = forked(space, child, 3)
    for blocks in (grandchild, child, parent):
        space.grow(blocks, 6)
        space.check_integrity()
    assert len({blocks.tables[0][0] for blocks in (parent, child, grandchild)}) == 3


def test_a_fork_outlives_its_parent():
    space = make(4)
    parent = held(space, 1, 20)
    child, = forked(space, parent, 2)
    space.free(parent, busy_until=-1)
    space.check_integrity()
    assert (space.num_used, space.extend_in_place(child, 21) or space.grow(child, 21)) == (3, ([], []))


# -- sharing by content ----------------------------------------------------------------------------------------------

TOKENS = list(range(100, 140))


def offered(space, seq_id, num_tokens, tokens=TOKENS, root=ROOT):
    blocks = held(space, seq_id, num_tokens, root)
    space.offer(blocks, tokens)
    space.check_integrity()
    return blocks


def found(space, num_tokens, tokens=TOKENS, root=ROOT):
    """How many blocks of a prompt are found."""
    return len(space.match(space.open(77, root=root), tokens[:num_tokens]))


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(7, 0), (8, 0), (9, 1), (16, 1), (17, 2), (24, 2), (25, 2)])
def test_a_hit_covers_full_blocks_and_leaves_a_token_to_compute(num_tokens, num_blocks):
    space = caching(9)
    offered(space, 1, 23)
    assert found(space, num_tokens) == num_blocks


def test_a_hit_must_hold_in_every_kv_group():
    space = caching(9, 9)
    blocks = offered(space, 1, 16)
    space.devices[1].forget(blocks.tables[1][1])
    assert found(space, 30) == 1


def test_nothing_is_found_behind_a_gap():
    space = caching(9)
    blocks = offered(space, 1, 24)
    space.devices[0].forget(blocks.tables[0][0])
    assert found(space, 30) == 0


def test_blocks_are_not_offered_before_they_are_full():
    space = caching(9)
    offered(space, 1, 15)
    assert found(space, 30) == 1


def test_blocks_are_not_offered_beyond_the_tokens_that_are_known():
    space = caching(9)
    offered(space, 1, 24, TOKENS[:23])
    assert found(space, 30) == 2


def test_another_root_finds_nothing():
    space = caching(9)
    offered(space, 1, 16)
    assert found(space, 30, root=b"s" * 16) == 0


def test_a_sequence_without_a_root_neither_offers_nor_finds():
    space = caching(9)
    offered(space, 1, 16, root=None)
    assert (found(space, 30), found(space, 30, root=None)) == (0, 0)


def test_two_that_computed_the_same_are_found_once():
    space = caching(9)
    first, second = held(space, 1, 16, ROOT), held(space, 2, 16, ROOT)
    space.offer(second, TOKENS)
    space.offer(first, TOKENS)
    space.check_integrity()
    assert [places[0] for places in space.match(space.open(77, root=ROOT), TOKENS)] == second.tables[0]


def attached(space, seq_id, tokens):
    blocks = space.open(seq_id, root=ROOT)
    space.attach(blocks, space.match(blocks, tokens))
    return blocks


def test_what_is_found_is_shared():
    space = caching(9)
    owner = offered(space, 1, 20)
    blocks = attached(space, 2, TOKENS)
    space.check_integrity()
    assert (blocks.tables[0], blocks.num_tokens) == (owner.tables[0][:2], 16)


def test_what_is_found_while_it_is_releasing_is_not_given_out_afterwards():
    space = caching(2)
    space.free(offered(space, 1, 16), busy_until=5)
    blocks = attached(space, 2, TOKENS)
    space.step_done(5)
    space.check_integrity()
    assert (len(blocks.tables[0]), space.num_free) == (2, 0)


@pytest.mark.parametrize(("state", "taken"), [("used", 0), ("cached", 2), ("releasing", 0)])
def test_only_what_could_be_given_out_otherwise_counts_as_taken(state, taken):
    space = caching(9)
    blocks = offered(space, 1, 16)
    if state != "used":
        space.free(blocks, busy_until=5 if state == "releasing" else -1)
    assert space.num_to_take(space.match(space.open(77, root=ROOT), TOKENS)) == [taken]


def test_blocks_that_others_still_hold_keep_their_keys_when_one_is_disowned():
    space = caching(9)
    owner = offered(space, 1, 24)
    attached(space, 2, TOKENS[:17])
    space.disown_keys(owner)
    space.check_integrity()
    assert found(space, 40) == 2


def test_disowned_blocks_are_found_by_nobody():
    space = caching(9)
    owner = offered(space, 1, 24)
    space.disown_keys(owner)
    space.free(owner, busy_until=-1)
    space.check_integrity()
    assert (found(space, 40), count(space, State.FREE)) == (0, 9)


def test_the_beginning_of_a_prompt_is_evicted_last():
    space = caching(4)
    space.free(offered(space, 1, 24), busy_until=-1)
    held(space, 2, 16)
    assert found(space, 40) == 2


def test_retention_counts_a_hit_on_a_block_in_use():
    """A system prompt that simultaneous requests share was found by all of them but the first."""
    space = caching(3, eviction_policy="retention")
    owner = offered(space, 1, 16)
    for blocks in (attached(space, 2, TOKENS[:17]), owner):
        space.free(blocks, busy_until=-1)
    space.free(offered(space, 3, 8, tokens=[7] * 8), busy_until=-1)
    held(space, 4, 8)
    assert found(space, 17) == 2
