"""Compaction in the block space: fresh blocks, what becomes of the old ones, and how many blocks a sequence takes.

Blocks hold 8 tokens.
"""

from __future__ import annotations

import pytest

from kvarto.cluster.block_space import BlockSpace, State
from kvarto.cluster.block_space.sparsity import Sparsity, most_seqs
from kvarto.protos.errors import ConfigError
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.sparsity import KVSparsity

FULL = KVGroupSpec(layer_ids=(0,))
ROOT = b"r" * 16
TOKENS = list(range(100))


def spec(policy="tova", budget=12, interval=8, window=1):
    return KVSparsity(policy=policy, budget=budget, interval=interval, window=window)


class Space(BlockSpace):
    def __init__(self, num_blocks=20, num_host_blocks=0):
        super().__init__([FULL], [num_blocks], 8, num_host_blocks=[num_host_blocks], enable_prefix_caching=True,
                         sparsity=spec())

    def hold(self, seq_id, num_tokens):
        blocks = self.open(seq_id, root=ROOT)
        self.grow(blocks, num_tokens)
        self.offer(blocks, TOKENS[:num_tokens])
        return blocks

    def drop(self, blocks, num_kept=12, busy_until=0):
        fresh = self.compact(blocks, num_kept, busy_until=busy_until)
        self.check_integrity()
        return fresh


def test_what_is_kept_stands_in_fresh_blocks():
    space = Space()
    blocks = space.hold(1, 30)
    old = list(blocks.tables[0])
    fresh, = space.drop(blocks)
    assert blocks.tables == [fresh] and len(fresh) == 2 and not set(fresh) & set(old)


def test_lengths_are_of_rows_and_what_was_dropped_is_remembered():
    space = Space()
    blocks = space.hold(1, 30)
    space.drop(blocks)
    space.grow(blocks, 20)
    space.drop(blocks)
    assert (blocks.num_tokens, blocks.num_dropped, blocks.capacity) == (12, 18 + 8, 16)
    assert (space.num_compactions, space.num_dropped_rows) == (2, 26)


def test_the_old_blocks_wait_for_the_result_of_the_plan_that_reads_them():
    space = Space()
    space.drop(space.hold(1, 30), busy_until=0)
    before = space.devices[0].counts[State.RELEASING]
    space.step_done(0)
    assert (before, space.devices[0].counts[State.RELEASING]) == (4, 0)


def test_cached_prompt_blocks_stay_findable():
    space = Space()
    space.drop(space.hold(1, 30))
    space.step_done(0)
    assert len(space.match(space.open(2, root=ROOT), TOKENS[:30])) == 3


def test_what_others_hold_loses_a_reference_and_nothing_else():
    space = Space()
    blocks = space.hold(1, 30)
    other = space.open(2, root=ROOT)
    space.attach(other, space.match(other, TOKENS[:30]))
    space.drop(blocks)
    assert [space.devices[0].ref_counts[block] for block in other.tables[0]] == [1, 1, 1]


def test_rows_that_were_chosen_are_never_offered():
    space = Space()
    blocks = space.hold(1, 30)
    space.drop(blocks, 16)
    space.grow(blocks, 24)
    space.offer(blocks, TOKENS[:38])
    assert [space.devices[0].keys[block] for block in blocks.tables[0]] == [None] * 3
    space.check_integrity()


def test_forks_share_what_was_kept():
    space = Space()
    blocks, child = space.hold(1, 30), space.open(2, root=ROOT)
    space.drop(blocks)
    space.fork(blocks, child)
    space.check_integrity()
    assert (child.tables, child.num_dropped) == (blocks.tables, 18)
    assert space.num_missing([(blocks, 13), (child, 13)]) == [1]


def test_a_sequence_that_is_freed_begins_anew():
    space = Space()
    blocks = space.hold(1, 30)
    space.drop(blocks)
    space.free(blocks, busy_until=0)
    assert (blocks.num_dropped, blocks.num_tokens, len(space.match(blocks, TOKENS[:30]))) == (0, 0, 3)


def test_what_was_kept_goes_to_the_host_and_back():
    space = Space(num_host_blocks=4)
    blocks = space.hold(1, 30)
    space.drop(blocks)
    space.end_plan()
    space.swap_out([blocks], busy_until=0)
    space.end_plan()
    space.check_integrity()
    space.swap_in([blocks])
    space.check_integrity()
    assert (len(blocks.tables[0]), blocks.num_tokens, blocks.num_dropped) == (2, 12, 18)


def test_a_match_leaves_what_must_be_computed():
    space = Space()
    space.hold(1, 30)
    assert [len(space.match(space.open(2, root=ROOT), TOKENS[:30], most)) for most in (None, 24, 23, 7, 0)] == [
        3, 3, 2, 0, 0]


def test_a_group_with_a_window_is_refused():
    with pytest.raises(ConfigError, match="kv_sparsity"):
        BlockSpace([KVGroupSpec(layer_ids=(0,), window=20)], [20], 8, sparsity=spec())


# -- when ------------------------------------------------------------------------------------------------------------


def lengths(policy, num_prompt, num_tokens, chunk, **options):
    """A sequence step by step, in chunks of at most so many tokens: (tokens computed, rows held) after each."""
    sparsity = Sparsity(spec(policy, **options), 8)
    computed = dropped = 0
    steps = []
    while computed < num_tokens:
        stop = sparsity.next_compaction(num_prompt, computed, dropped)
        computed += sparsity.chunk(num_prompt, computed, dropped, min(chunk, num_tokens - computed))
        if computed == stop:
            dropped = computed - sparsity.spec.budget
        steps.append((computed, computed - dropped))
    return steps


@pytest.mark.parametrize("chunk", [1, 5, 8, 100])
def test_tokens_are_dropped_at_the_same_lengths_in_whatever_chunks(chunk):
    steps = dict(lengths("tova", 30, 60, chunk))
    assert [computed for computed, rows in steps.items() if rows == 12 and computed > 12] == [30, 38, 46, 54]


def test_a_prompt_is_held_whole_until_its_end():
    assert lengths("h2o", 30, 30, 10) == [(10, 10), (20, 20), (30, 12)]


def test_a_prompt_within_the_budget_is_compacted_when_the_interval_is_full():
    assert lengths("tova", 5, 21, 100) == [(20, 12), (21, 13)]


def test_snapkv_drops_nothing_of_the_output():
    assert lengths("snapkv", 30, 60, 100) == [(30, 12), (60, 42)]


@pytest.mark.parametrize("chunk", [4, 7, 9, 29])
def test_the_queries_that_score_a_prompt_are_computed_together(chunk):
    steps = [0, *(computed for computed, _ in lengths("snapkv", 30, 30, chunk, window=4))]
    assert steps[-1] == 30 and steps[-1] - steps[-2] >= 4


def test_a_step_with_no_room_for_them_computes_none():
    assert Sparsity(spec("snapkv", window=4), 8).chunk(30, 26, 0, 3) == 0


@pytest.mark.parametrize(("policy", "num_prompt", "most"), [
    ("tova", 30, 29), ("tova", 5, 19), ("snapkv", 30, 26), ("snapkv", 12, None)])
def test_a_prefix_hit_leaves_the_queries_that_score_the_first_compaction(policy, num_prompt, most):
    window = 4 if policy == "snapkv" else 1
    assert Sparsity(spec(policy, window=window), 8).most_cached(num_prompt) == most


@pytest.mark.parametrize("policy", ["tova", "snapkv"])
@pytest.mark.parametrize("num_prompt", [1, 12, 13, 19, 20, 21, 30, 64])
@pytest.mark.parametrize("num_more", [0, 1, 7, 8, 9, 30])
def test_the_blocks_that_a_sequence_takes_are_those_of_its_worst_step(policy, num_prompt, num_more):
    most, before, end = 0, 0, num_prompt + num_more
    sparsity = Sparsity(spec(policy), 8)
    for _, rows in lengths(policy, num_prompt, end, 1):
        held = before + 1
        most = max(most, -(-held // 8) + (2 if rows <= before else 0))
        before = rows
    assert sparsity.blocks_to_reach(num_prompt, 0, 0, end) == most


def test_a_step_has_room_for_one_token_of_each_and_the_queries_of_one():
    assert [most_seqs(each, 64, 50) for each in (None, spec(), spec("snapkv", window=32))] == [50, 50, 19]
